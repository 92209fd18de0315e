"""Sizes of a training run, chosen before the model is loaded."""

import copy
import os
import sys
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from ..rollout.memory import ModelShape, RunSizes
from ..rollout.options import EngineOptions
from ..rollout.planned import memory_budget, planned
from .config import AStarPOConfig

USUAL_PROMPT = 512
"""Tokens of prompt that are planned for when `max_prompt_length` is not given."""


@dataclass(frozen=True, slots=True)
class TrainingSizes:
    """What was planned.

    Attributes:
        args ([`AStarPOConfig`]):
            With `gradient_checkpointing` decided.
        engine_options ([`EngineOptions`]):
            With the engine's sizes.
        rows_at_once (`int`, *optional*):
            Completions of one pass through the model; None is a whole micro-batch.
    """

    args: AStarPOConfig
    engine_options: EngineOptions
    rows_at_once: int | None = None


def plan_training(
    model: Any, args: AStarPOConfig, options: EngineOptions, peft_config: PeftConfig | None, has_own_engine: bool
) -> TrainingSizes:
    """Plan a run: on a GPU, or wherever `budget_gb` is given, if its engine runs in this process.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            As given to the trainer.
        args ([`AStarPOConfig`]):
            As given to the trainer.
        options ([`EngineOptions`]):
            As given to the trainer.
        peft_config ([`~peft.PeftConfig`], *optional*):
            As given to the trainer.
        has_own_engine (`bool`):
            Whether the caller brings an engine, whose sizes are decided already.

    Raises:
        ValueError: If the run does not fit; the message names the cheapest change that would.
    """
    if options.engine == "transformers" or not args.use_vllm:
        print("completions come from transformers' own generate, several times slower than vLLM", file=sys.stderr)
    budget = memory_budget(options)
    if budget is None or has_own_engine or options.engine != "vllm" or not args.use_vllm:
        return TrainingSizes(_with_checkpointing(args, True), options)
    shape = ModelShape.of(model, _init(args, "revision")) if isinstance(model, str) else _shape_of(model)
    dtype = _init(args, "dtype") if isinstance(model, str) else str(model.dtype).removeprefix("torch.")
    filled, plan = planned(options, shape, _sizes(shape.width(dtype), args, options, peft_config), budget)
    chosen = plan.sizes
    assert chosen.gradient_checkpointing is not None
    return TrainingSizes(_with_checkpointing(args, chosen.gradient_checkpointing), filled, chosen.micro_batch)


def _sizes(width: int, args: AStarPOConfig, options: EngineOptions, peft_config: PeftConfig | None) -> RunSizes:
    completion = args.max_completion_length or 256
    targets = getattr(peft_config, "target_modules", None)
    batch = args.per_device_train_batch_size
    # Several processes must make the same passes, so there a micro-batch is one pass.
    is_alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    link = options.policy_link if options.policy_link != "auto" else "inline" if peft_config else "copied"
    return RunSizes(
        options.max_model_len or (args.max_prompt_length or USUAL_PROMPT) + completion,
        completion,
        rank=None if peft_config is None else int(getattr(peft_config, "r", 16)),
        targets=None if targets is None or isinstance(targets, str) else tuple(targets),
        width=width,
        policy_link=link,
        share_base_weights=peft_config is not None and options.share_base_weights != "off",
        gradient_checkpointing=args.gradient_checkpointing,
        micro_batch=None if is_alone else batch,
        batch=batch,
    )


def _with_checkpointing(args: AStarPOConfig, chosen: bool) -> AStarPOConfig:
    if args.gradient_checkpointing is not None:
        return args
    decided = copy.copy(args)  # the caller may make another trainer with its own
    decided.gradient_checkpointing = chosen
    return decided


def _init(args: AStarPOConfig, name: str) -> Any:
    kwargs = args.model_init_kwargs
    return kwargs.get(name) if isinstance(kwargs, dict) else None


def _shape_of(model: Any) -> ModelShape:
    return ModelShape.of_config(model.config, str(model.config._name_or_path))
