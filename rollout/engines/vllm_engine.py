"""The vLLM engine, in this process.

In process because then the policy needs no transport (`inline`, see `policy_link.py`), scheduling is deterministic,
and one CUDA context serves engine and trainer. All knowledge of vLLM lives here, in `policy_link.py` and in
`shared_weights.py`. Paths in comments are those of vLLM 0.32.
"""

import ctypes
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..hardware import Hardware, log_choices
from ..options import EngineOptions
from .inline import InlineLayers, attach_to, attached_at_start
from .interface import (
    Completion,
    EngineError,
    Failure,
    FinishReason,
    PolicyLink,
    SamplingSettings,
    isolate_failures,
    stop_token_ids,
)
from .processes import ending, joins_launcher, starting
from .shared_weights import INLINE, SHARED, WRITABLE, SharedWeights, lending, register_loaders, unpack_embeddings

if TYPE_CHECKING:
    import torch

_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank` (`MaxLoRARanks` in vllm/config/lora.py)."""

_ALIVE: "weakref.WeakSet[VLLMEngine]" = weakref.WeakSet()
"""Engines of this process that are not closed."""
_CLOSED: list[Any] = []
"""`LLM`s of closed engines, kept while other engines live: when vLLM shuts down or collects one, it destroys the process groups
that all engines of the process use (`cleanup_dist_env_and_memory` in vllm/v1/engine/core.py)."""


class VLLMEngine:
    """Samples completions with vLLM.

    Args:
        model (`str`):
            Hub id or folder.
        max_model_len (`int`):
            Most tokens of prompt and completion together.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        options ([`EngineOptions`], *optional*):
            Sizes; its `policy_link` decides how the engine is built.
        lora_rank (`int`, *optional*):
            Highest LoRA rank; needed only with `policy_link="adapter"`.
        writable (`bool`, *optional*, defaults to `False`):
            Keep weights in a form that new weights can be written into (`policy_link="copied"`). On CPU this turns
            vLLM's weight repacking off, which makes decoding slower.
        shared ([`SharedWeights`], *optional*):
            Take the weights of this model in the same process, and let it use the engine's; on CPU as slow as `writable`.
        inline ([`InlineLayers`], *optional*):
            Layers of an adapter that will be sampled with `policy_link="inline"`. With CUDA graphs they must be known at the start.

    Raises:
        ValueError: If vLLM is not installed or refuses the model; the message names the fix.
    """

    def __init__(
        self,
        model: str,
        max_model_len: int,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        options: EngineOptions | None = None,
        lora_rank: int | None = None,
        writable: bool = False,
        shared: SharedWeights | None = None,
        inline: InlineLayers | None = None,
    ):
        options = options or EngineOptions()
        self.model = model
        self.writable = writable
        self.shared = shared
        self.inline = inline
        self.has_graphs = options.cuda_graphs == "on"
        self.lora_rank = lora_rank
        self.weights_overwritten = False
        self.max_model_len = max_model_len
        self.max_num_seqs = options.sequences
        self._cache_owner: PolicyLink | None = None
        self._busy = False
        self._request_count = 0
        self.llm = self._start(model, revision, dtype, options)
        _ALIVE.add(self)
        # Also where nobody calls `close`: collecting the `LLM` would take the process groups from the other engines.
        self._finalizer = weakref.finalize(self, _CLOSED.append, self.llm)
        self._finalizer.atexit = False
        self.stop_token_ids = stop_token_ids(model, revision, self.llm.get_tokenizer())

    def _start(self, model: str, revision: str | None, dtype: str, options: EngineOptions) -> Any:
        import torch

        end_closed_engines()
        # Without it `LLM` runs the engine core in a process of its own (vllm/v1/engine/llm_engine.py), where neither hooks nor
        # shared tensors reach it, and its scheduling depends on timing.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        llm_class = _llm_class()
        with (
            starting(),
            lending(self.shared) if self.shared else nullcontext(),
            attached_at_start(self.inline) if self.inline else nullcontext(),
        ):
            arguments = {"model": model, "revision": revision, **self._on(dtype), **self._sizes(options)}
            try:
                llm = llm_class(**arguments)
            except ValueError:
                raise  # of vLLM's or ours, with the fix in the message
            except Exception as error:
                raise ValueError(
                    f"vLLM did not start ({type(error).__name__}: {error}); its log above says more. `--engine transformers` "
                    "samples without it, several times slower."
                ) from error
            if self.writable or self.shared:
                llm.apply_model(unpack_embeddings)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the profile run allocated, 1 to 2 GB, and torch keeps
        return llm

    def _on(self, dtype: str) -> dict[str, Any]:
        """vLLM's arguments that follow from the GPU."""
        hardware = Hardware.detect(dtype)
        log_choices(hardware)
        if self.lora_rank is not None:
            hardware.use_tuned_kernels()
        return {"dtype": hardware.dtype, **hardware.engine_arguments()}

    def _sizes(self, options: EngineOptions) -> dict[str, Any]:
        """vLLM's arguments besides the model."""
        import torch

        arguments: dict[str, Any] = {
            "max_model_len": self.max_model_len,
            "max_num_seqs": options.sequences,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "kv_cache_memory_bytes": options.kv_cache_bytes,
            # `kv_cache_memory_bytes` decides the size, but vLLM still refuses to start unless this share of the whole GPU is free
            # (`request_memory` in vllm/v1/worker/utils.py): 0.3 would ask for 24 GB of an H100.
            "gpu_memory_utilization": 0.01,
            **self._graphs(options),
            # Else the model's own generation_config.json, often with a top_p and a top_k, becomes the default
            # (`generation_config` in vllm/config/model.py).
            "generation_config": "vllm",
            # After temperature, as the trainer scores. The default is "raw_logprobs", before it (`logprobs_mode` in
            # vllm/config/model.py).
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": logging.getLogger("vllm").isEnabledFor(logging.INFO),
            # The samples of one prompt, and the turns of one episode, share the keys and values of what they begin with. vLLM
            # hashes blocks by their tokens and the name of a loaded adapter (vllm/v1/core/kv_cache_utils.py) and knows nothing
            # of weights that change under it: see `stream`.
            "enable_prefix_caching": True,
        }
        if not torch.cuda.is_available():
            # When a prompt is prefilled in parts, vLLM samples a token after each part, drops it, and turns the request's
            # generator back with `set_offset` (vllm/v1/worker/gpu_model_runner.py). torch's CPU generators have no offset
            # ("CPU Generator does not use offset"), so a prompt must fit into one step.
            tokens = options.max_num_batched_tokens or 4096
            arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(tokens, self.max_model_len)}
        if torch.cuda.is_available() and joins_launcher():
            # The usual executor takes GPU 0 in every process. `ExecutorWithExternalLauncher`
            # (vllm/v1/executor/uniproc_executor.py) is made for processes that torchrun or accelerate has started: it reads
            # RANK and LOCAL_RANK and joins their process group.
            arguments["distributed_executor_backend"] = "external_launcher"
        if self.lora_rank is not None:
            rank = next((r for r in _MAX_LORA_RANKS if r >= self.lora_rank), None)
            if rank is None:
                raise ValueError(f"LoRA rank {self.lora_rank} is above vLLM's highest, {_MAX_LORA_RANKS[-1]}.")
            arguments |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": rank}
        if self.writable or self.shared or self.inline:
            register_loaders(attach_to)
            arguments["load_format"] = SHARED if self.shared else WRITABLE if self.writable else INLINE
        return arguments

    def _graphs(self, options: EngineOptions) -> dict[str, Any]:
        """vLLM's arguments about CUDA graphs.

        Graphs of decoding steps only, and no torch.compile (`mode` 0), which would run no Python hooks: what warm-up runs is captured as
        it is, the hooks of `inline` with it. Sizes are powers of two, else capturing takes a minute.
        """
        import torch

        if not self.has_graphs:
            return {"enforce_eager": True}
        if not torch.cuda.is_available():
            raise ValueError("cuda_graphs=on needs a GPU. Leave it out.")
        sizes = [2**power for power in range(12) if 2**power < options.sequences] + [options.sequences]
        return {
            "enforce_eager": False,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": sizes,
            },
        }

    @property
    def kv_cache_tokens(self) -> int:
        """How many tokens the KV cache holds, between two calls of `stream` too."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def reset_prefix_cache(self) -> None:
        """Forget the cached keys and values of all prompts."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running. Finish them first.")

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt; see [`Engine.stream`]."""
        self._check(prompts, settings, policy)
        # vLLM's keys of cached blocks (`generate_block_hash_extra_keys` in vllm/v1/core/kv_cache_utils.py) know neither weights
        # nor the hooks of `inline`, so no block may outlive the policy that it was computed with.
        changed = policy.sync() if policy is not None else False
        if changed or policy is not self._cache_owner:
            self.reset_prefix_cache()
            self._cache_owner = policy
        with policy.active() if policy is not None else nullcontext() as lora_request:

            def run(indices: Sequence[int]) -> Iterator[tuple[int, Completion]]:
                requests = [
                    (index, prompts[index], self._sampling_params(settings, seeds[index])) for index in indices
                ]
                return self._run(requests, lora_request)

            yield from isolate_failures(prompts, run)

    def _check(self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, policy: PolicyLink | None) -> None:
        if self._busy:
            raise RuntimeError("This engine is already sampling; exhaust or close that stream first.")
        if self.shared is not None:
            self.shared.check()
        if policy is None and self.weights_overwritten:
            raise RuntimeError(
                "This engine's weights were overwritten by the policy (policy_link=copied), so it cannot sample the "
                "reference any more. Sample the reference before training, or start another engine."
            )
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + settings.max_completion_length > self.max_model_len:
            raise ValueError(
                f"A prompt of {longest} tokens and completions of up to {settings.max_completion_length} do not fit into "
                f"max_model_len={self.max_model_len}. Raise --max_model_len or lower --max_completion_length."
            )

    def _run(
        self, requests: Sequence[tuple[int, Sequence[int], Any]], lora_request: Any
    ) -> Iterator[tuple[int, Completion]]:
        engine = self.llm.llm_engine
        waiting = list(requests)[::-1]
        running: dict[str, int] = {}
        self._busy = True
        try:
            while waiting or running:
                # Twice what is decoded at once: the scheduler always has a next request, and few have to be aborted when the
                # caller closes the stream.
                while waiting and len(running) < 2 * self.max_num_seqs:
                    index, prompt, params = waiting.pop()
                    with _naming((index,)):
                        request_id = str(self._request_count)
                        self._request_count += 1
                        prompt = {"prompt_token_ids": list(prompt)}
                        engine.add_request(request_id, prompt, params, lora_request=lora_request)
                    running[request_id] = index
                with _naming(tuple(running.values())):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        yield running.pop(output.request_id), _completion(output.outputs[0])
        finally:
            self._busy = False
            if running:
                self._abort(list(running))

    def _abort(self, request_ids: list[str]) -> None:
        engine = self.llm.llm_engine
        engine.abort_request(request_ids)
        while engine.has_unfinished_requests():
            engine.step()
        # A step that failed has left blocks in the prefix cache whose keys and values were never computed.
        self.reset_prefix_cache()

    def _sampling_params(self, settings: SamplingSettings, seed: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            max_tokens=settings.max_completion_length,
            stop_token_ids=self.stop_token_ids,
            seed=seed if settings.temperature > 0 else None,
            logprobs=0 if settings.logprobs else None,  # 0: of the sampled token and no other
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def load_adapter(self, version: int, path: str) -> Any:
        """Load an adapter from disk; returns the `LoRARequest` that requests must carry."""
        from vllm.lora.request import LoRARequest

        request = LoRARequest(f"policy-{version}", version, path)
        if not self.llm.llm_engine.add_lora(request):
            raise RuntimeError(f"vLLM refused the adapter in {path}; its log above says why.")
        return request

    def unload_adapter(self, request: Any) -> None:
        """Forget an adapter."""
        self.llm.llm_engine.remove_lora(request.lora_int_id)

    def modules(self) -> "dict[str, torch.nn.Module]":
        """The engine's own modules by name, for the policy links."""
        return self.llm.apply_model(lambda module: dict(module.named_modules()))[0]

    def packed_modules(self) -> dict[str, list[str]]:
        """Which layers of the model the engine fuses into one, such as `qkv_proj` from q, k and v."""
        return self.llm.apply_model(lambda module: dict(getattr(module, "packed_modules_mapping", {})))[0]

    @property
    def dtype(self) -> "torch.dtype":
        """Type of the weights and activations."""
        return self.llm.model_config.dtype

    @property
    def device(self) -> "torch.device":
        """Where the weights are."""
        return self.llm.apply_model(lambda module: next(module.parameters()).device)[0]

    def close(self) -> None:
        """Free the engine's memory. While another engine lives in this process, that waits until the last one is closed."""
        _ALIVE.discard(self)
        del self.llm
        self._finalizer()
        end_closed_engines()


def end_closed_engines() -> None:
    """Free the memory of engines that were closed, or dropped without closing, once no engine of this process is alive.

    Call it before free memory is measured, as for a plan.
    """
    import gc

    import torch

    if _ALIVE or not _CLOSED:
        return
    with ending():
        while _CLOSED:
            _CLOSED.pop().llm_engine.engine_core.shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _llm_class() -> Any:
    """vLLM's `LLM`; a `ValueError` with the fix where it is not installed.

    Imported in a thread: something that vLLM imports keeps the stack of frames from which it was imported for good, and with it
    the engine and whatever else (a trainer) is being built there.
    """
    import torch

    if torch.version.cuda is None:
        try:
            # vLLM's CPU build needs it, says so only in its log, and fails at its first operator (vllm/v1/worker/cpu_worker.py).
            ctypes.CDLL("libnuma.so.1")
        except OSError as error:
            raise ValueError(
                "vLLM's CPU build needs the library libnuma, which this system lacks: `sudo apt install libnuma1`, or what your "
                "distribution calls it."
            ) from error
    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(lambda: import_module("vllm").LLM).result()
        except ImportError as error:
            raise ValueError(
                "vLLM is not installed. Run `pip install astarpo[gpu]` on a GPU machine; docs/start.md has the commands for others. "
                f"The import said: {error}"
            ) from error


@contextmanager
def _naming(in_flight: tuple[int, ...]) -> Iterator[None]:
    """Say which prompts were being sampled when vLLM raised."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"{type(error).__name__}: {error}", in_flight) from error


def _completion(output: Any) -> Completion:
    token_ids = tuple(output.token_ids)
    logprobs = ()
    if output.logprobs is not None:
        logprobs = tuple(entry[token].logprob for token, entry in zip(token_ids, output.logprobs, strict=True))
    return Completion(token_ids, logprobs, FinishReason(output.finish_reason))
