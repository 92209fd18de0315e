"""Ray Data over vLLM engines: one engine per worker, on one machine or on many.

Ray hands out blocks of prompts and restarts what dies; the engines are the same as without Ray, with the same seeds, and
one process grades and writes the pool, so all of its guarantees hold.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..options import EngineOptions
from .interface import Completion, EngineError, Failure, FinishReason, PolicyLink, SamplingSettings

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BATCHES = 4
"""Blocks hold this many times what an engine decodes at once: it runs empty at a block's end, rows arrive block by block."""


class RayEngine:
    """Samples completions with a pool of vLLM engines that Ray Data feeds.

    Args:
        model (`str`):
            Hub id, or a folder that every node sees.
        max_model_len (`int`):
            Most tokens of prompt and completion together.
        options ([`EngineOptions`]):
            `ray_workers`, `ray_address`, and the sizes of each engine.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        adapter (`str`, *optional*):
            Folder or hub id of a LoRA adapter; sampled with [`OwnAdapter`].
    """

    def __init__(
        self,
        model: str,
        max_model_len: int,
        options: EngineOptions,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        adapter: str | None = None,
    ):
        ray = _import_ray()
        self.max_model_len = max_model_len
        self._options = options
        self._arguments = {
            "model": os.path.abspath(model) if os.path.isdir(model) else model,
            "max_model_len": max_model_len,
            "revision": revision,
            "dtype": dtype,
            "options": options,
            "adapter": os.path.abspath(adapter) if adapter and os.path.isdir(adapter) else adapter,
        }
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(
                address=options.ray_address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        resources = ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        self._workers = options.ray_workers or max(1, self._gpus)
        if self._gpus and self._workers > self._gpus:
            raise ValueError(f"--ray_workers {self._workers}, but Ray has {self._gpus} GPUs; each worker takes one.")
        self._cpus = 1 if self._gpus else max(1, int(resources.get("CPU", 1)) // self._workers)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt; see [`Engine.stream`]."""
        import ray.data
        from ray.exceptions import RayError

        rows = [
            {"index": index, "prompt": list(prompt), "seed": seed}
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        block = min(BLOCK_BATCHES * self._options.sequences, math.ceil(len(rows) / self._workers))
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        arguments = {**self._arguments, "settings": settings, "sample_adapter": policy is not None}
        sampled = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / block)).map_batches(
            RayWorker,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_kwargs=arguments,
            compute=ray.data.ActorPoolStrategy(size=self._workers),
            num_cpus=self._cpus,
            num_gpus=1 if self._gpus else 0,
            max_restarts=4,
            max_task_retries=1,
        )
        try:
            batches: Any = sampled.iter_batches(batch_size=None, batch_format="pyarrow")
            for batch in batches:
                for row in batch.to_pylist():
                    yield row["index"], _from_row(row)
        except RayError as error:
            raise EngineError(f"Ray: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Stop Ray, if it was started here."""
        if self._ours:
            _import_ray().shutdown()


class RayWorker:
    """One engine in a Ray actor: a block of prompts in, a block of completions out."""

    def __init__(self, settings: SamplingSettings, sample_adapter: bool, adapter: str | None, **arguments: Any):
        from .lora import SavedLora
        from .policy_link import InlineLink
        from .vllm_engine import VLLMEngine

        self._settings = settings
        self._engine = VLLMEngine(**arguments)
        self._policy = InlineLink(self._engine, SavedLora.open(adapter)) if sample_adapter and adapter else None

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        """Sample a block."""
        import pyarrow as pa

        indices = batch["index"].to_pylist()
        stream = self._engine.stream(
            batch["prompt"].to_pylist(), batch["seed"].to_pylist(), self._settings, self._policy
        )
        rows = []
        try:
            rows += [{"index": indices[position], **_to_row(completion)} for position, completion in stream]
        except EngineError as error:  # this block's failure, not the whole job's
            done = {row["index"] for row in rows}
            rows += [{"index": index, "failure": str(error)} for index in indices if index not in done]
        return pa.Table.from_pylist(rows, schema=_row_schema())


def _row_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            ("index", pa.int64()),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float64())),
            ("finish_reason", pa.string()),
            ("failure", pa.string()),
        ]
    )


def _to_row(completion: Completion | Failure) -> dict[str, Any]:
    if isinstance(completion, Failure):
        return {"failure": completion.reason}
    return {
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason.value,
    }


def _from_row(row: dict[str, Any]) -> Completion | Failure:
    if row["failure"] is not None:
        return Failure(row["failure"])
    return Completion(tuple(row["token_ids"]), tuple(row["logprobs"]), FinishReason(row["finish_reason"]))


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed. Run `pip install astarpo[ray]`.") from error
    return ray
