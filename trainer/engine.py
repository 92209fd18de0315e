"""The engine that the trainer starts when it is given none."""

import sys
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from ..rollout.engines.server_engine import ServerEngine
from ..rollout.engines.vllm_engine import VLLMEngine
from ..rollout.options import EngineOptions

if TYPE_CHECKING:
    from .trainer import AStarPOTrainer


def make_engine(trainer: "AStarPOTrainer", options: EngineOptions) -> VLLMEngine | ServerEngine:
    """Start an engine with the trainer's model, long enough for its prompts, built for the way the policy will take."""
    if options.engine == "server":
        return ServerEngine(trainer.model.config._name_or_path, options, revision=trainer.model_revision)
    link, config = policy_link(trainer, options.policy_link), trainer.model.config
    return VLLMEngine(
        config._name_or_path,
        options.max_model_len or trainer.longest_prompt() + trainer.max_completion_length,
        revision=trainer.model_revision,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        options=options,
        lora_rank=trainer.model.peft_config["default"].r if link == "adapter" else None,
        writable=link == "copied",
    )


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
