"""The engine that the trainer starts when it is given none."""

import sys
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from ..rollout.engines.server_engine import ServerEngine
from ..rollout.engines.shared_weights import SharedWeights, SharingError, why_not_shareable
from ..rollout.engines.vllm_engine import VLLMEngine
from ..rollout.options import EngineOptions

if TYPE_CHECKING:
    from .trainer import AStarPOTrainer


def make_engine(trainer: "AStarPOTrainer", options: EngineOptions) -> VLLMEngine | ServerEngine:
    """Start an engine with the trainer's model, long enough for its prompts, built for the way the policy will take."""
    if options.engine == "server":
        return ServerEngine(trainer.model.config._name_or_path, options, revision=trainer.model_revision)
    shared = share_weights(trainer, options)
    if shared is None:
        return _vllm_engine(trainer, options)
    try:
        return _vllm_engine(trainer, options, shared)
    except BaseException as error:
        shared.take_back(trainer.accelerator.device)
        if options.share_base_weights == "on" or not isinstance(error, SharingError):
            raise
        print(f"share_base_weights=off: {error} Engine and trainer hold a copy each.", file=sys.stderr)
    return _vllm_engine(trainer, options)


def _vllm_engine(trainer: "AStarPOTrainer", options: EngineOptions, shared: SharedWeights | None = None) -> VLLMEngine:
    link, config = policy_link(trainer, options.policy_link), trainer.model.config
    return VLLMEngine(
        config._name_or_path,
        options.max_model_len or trainer.longest_prompt() + trainer.longest_completion,
        revision=trainer.model_revision,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        options=options,
        lora_rank=trainer.model.peft_config["default"].r if link == "adapter" else None,
        writable=link == "copied",
        shared=shared,
    )


def sharing_is_wanted(options: EngineOptions) -> bool:
    """Whether `share_base_weights` asks for one copy: on CPU `auto` does not, an engine decodes faster there from weights that
    it packed for itself."""
    return options.share_base_weights == "on" or (options.share_base_weights == "auto" and torch.cuda.is_available())


def share_weights(trainer: "AStarPOTrainer", options: EngineOptions) -> SharedWeights | None:
    """One copy of the base weights for trainer and engine, where `share_base_weights` and the model allow it.

    Raises:
        ValueError: If it was asked for and is not possible.
    """
    if not sharing_is_wanted(options):
        return None
    is_wrapped = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    reason = "FSDP or DeepSpeed owns them" if is_wrapped else why_not_shareable(trainer.model)
    if reason is None:
        weights = SharedWeights(trainer.model)
        if trainer.accelerator.device.type == "cuda":
            weights.park()
        return weights
    if options.share_base_weights == "on":
        raise ValueError(f"share_base_weights=on is not possible: {reason}. Set it to auto or off.")
    print(f"share_base_weights=off: {reason}, so engine and trainer hold a copy each", file=sys.stderr)
    return None


def policy_link(trainer: "AStarPOTrainer", asked: str) -> str:
    """`inline`, `adapter` or `copied`: what was asked for, or what suits the model and what wraps it."""
    if not isinstance(trainer.model, PeftModel):
        return "copied" if asked == "auto" else asked
    if trainer.is_sharded and asked in ("auto", "inline"):
        if trainer.accelerator.is_main_process:
            print(
                "policy_link=adapter: FSDP or ZeRO-3 divides the adapter's weights among processes, so there are none that "
                "`inline` could read; after every update they are gathered and loaded into each engine",
                file=sys.stderr,
            )
        return "adapter"
    return "inline" if asked == "auto" else asked
