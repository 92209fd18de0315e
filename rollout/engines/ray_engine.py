"""Ray over vLLM engines: one engine per worker, on one machine or on many.

Ray places the workers and restarts those that die; the engines are the same as without Ray, with the same seeds, and one process
grades and writes the pool, so all of its guarantees hold. Workers live as long as the [`RayEngine`], so the next `stream` (the
next turn of an episode) finds the model loaded and, often, the turns before in a prefix cache.
"""

import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..options import EngineOptions
from .interface import Completion, EngineError, Failure, PolicyLink, SamplingSettings

BLOCK_BATCHES = 4
"""Blocks hold this many times what an engine decodes at once: it runs empty at a block's end, rows arrive block by block."""
BLOCKS_AT_WORKER = 2
"""Blocks that a worker is given at once: it begins the second while the rows of the first travel and are graded."""


class RayEngine:
    """Samples completions with vLLM engines in Ray actors.

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
            Folder or hub id of a LoRA adapter; sampled with [`OwnModelLink`].

    Raises:
        ValueError: If Ray is not installed, has fewer GPUs or CPUs than workers, or a worker cannot start its engine.
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
        self._sequences = options.sequences
        self._workers: list[Any] = []
        self._ours = not ray.is_initialized()
        if self._ours:
            ray.init(
                address=options.ray_address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        arguments = {
            # Workers have working directories of their own.
            "model": os.path.abspath(model) if os.path.isdir(model) else model,
            "max_model_len": max_model_len,
            "revision": revision,
            "dtype": dtype,
            "options": options,
            "adapter": os.path.abspath(adapter) if adapter and os.path.isdir(adapter) else adapter,
        }
        try:
            self._workers = _start_workers(options.ray_workers, arguments)
        except BaseException:
            self.close()
            raise

    @property
    def max_num_seqs(self) -> int:
        """Most completions that are decoded at once, by all workers together."""
        return self._sequences * len(self._workers)

    @property
    def kv_cache_tokens(self) -> None:
        """None: no worker is bound to the prompts that it was given before, so its cache may hold others."""

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt; see [`Engine.stream`]. Completions arrive block by block."""
        import ray
        from ray.exceptions import RayError

        size = max(1, min(BLOCK_BATCHES * self._sequences, math.ceil(len(prompts) / len(self._workers))))
        waiting = deque(range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size))
        free = deque(self._workers * BLOCKS_AT_WORKER)
        running: dict[Any, tuple[Any, range]] = {}
        try:
            while waiting or running:
                while waiting and free:
                    worker, block = free.popleft(), waiting.popleft()
                    task = worker.sample.remote(
                        [list(prompts[i]) for i in block], [seeds[i] for i in block], settings, policy is not None
                    )
                    running[task] = worker, block
                (task, *_), _ = ray.wait(list(running))
                worker, block = running.pop(task)
                free.append(worker)
                try:
                    sampled = ray.get(task)
                except RayError as error:
                    raise EngineError(f"Ray: {type(error).__name__}: {error}", tuple(block)) from error
                yield from ((block[position], completion) for position, completion in sampled)
        finally:
            # A block that has begun cannot be called back and goes on; one that waits at a worker can.
            for task in running:
                ray.cancel(task)

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        ray = _import_ray()
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        if self._ours:
            ray.shutdown()


class RayWorker:
    """One engine in a Ray actor: a block of prompts in, a block of completions out.

    Args:
        adapter (`str`, *optional*):
            Folder or hub id of a LoRA adapter.
        **arguments:
            Those of [`VLLMEngine`].
    """

    def __init__(self, adapter: str | None, **arguments: Any):
        from .inline import InlineLink
        from .policy_link import SavedLora
        from .vllm_engine import VLLMEngine

        self._engine = VLLMEngine(**arguments)
        self._policy = InlineLink(self._engine, SavedLora.open(adapter)) if adapter else None

    def is_ready(self) -> bool:
        """Return True, which Ray does not before the engine has started."""
        return True

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        use_adapter: bool,
    ) -> list[tuple[int, Completion | Failure]]:
        """Sample a block; an engine that fails makes failures of what is left of this block and does not end the job."""
        sampled: dict[int, Completion | Failure] = {}
        try:
            for position, completion in self._engine.stream(
                prompts, seeds, settings, self._policy if use_adapter else None
            ):
                sampled[position] = completion
        except EngineError as error:
            for position in range(len(prompts)):
                sampled.setdefault(position, Failure(str(error)))
        return list(sampled.items())


def _start_workers(asked: int | None, arguments: dict[str, Any]) -> list[Any]:
    """Start the actors and wait until their engines have started.

    Raises:
        ValueError: If there are too few GPUs or CPUs, or an engine does not start.
    """
    import ray
    from ray.exceptions import RayError

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    count = asked or max(1, gpus)
    if gpus and count > gpus:
        raise ValueError(f"--ray_workers {count}, but Ray has {gpus} GPUs; each worker takes one.")
    if count > cpus:  # Ray would wait for more CPUs without end
        raise ValueError(f"--ray_workers {count}, but Ray has {cpus} CPUs; each worker takes at least one.")
    worker_class: Any = ray.remote(RayWorker).options(
        num_cpus=1 if gpus else cpus // count,
        num_gpus=1 if gpus else 0,
        # Ray starts a worker anew that dies, and gives it the blocks again that it had, with the same seeds.
        max_restarts=4,
        max_task_retries=1,
    )
    workers = [worker_class.remote(**arguments) for _ in range(count)]
    try:
        ray.get([worker.is_ready.remote() for worker in workers])
    except RayError as error:
        raise ValueError(f"A Ray worker could not start its engine: {error}") from error
    return workers


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed. Run `pip install astarpo[ray]`.") from error
    return ray
