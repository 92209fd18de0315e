"""Sizes of a training run, chosen before the model is loaded."""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftConfig

from ..rollout.engines.start import sharing_is_wanted
from ..rollout.engines.vllm_engine import end_closed_engines
from ..rollout.episode import EpisodeKind, FollowUps
from ..rollout.memory import ModelShape, RunSizes, training_sizes
from ..rollout.memory.formulas import saved_activations
from ..rollout.memory.job import cache_of_share, memory_budget, plan_job, planned_engine, shape_to_plan
from ..rollout.options import EngineOptions
from ..rollout.prompts import load_tokenizer
from ..rollout.startup import chosen_engine
from .config import AStarPOConfig, completion_length
from .policy import options_of

logger = logging.getLogger(__name__)

USUAL_PROMPT = 512
"""Tokens of prompt that are planned for when `max_prompt_length` is not given."""
OF_MACHINE = 0.25
"""Share of the machine's memory that activations may take without a GPU before they are recomputed."""


@dataclass(frozen=True, slots=True)
class TrainingSizes:
    """What was planned.

    Attributes:
        gradient_checkpointing (`bool`):
            Whether activations are recomputed in the backward pass.
        engine_options ([`EngineOptions`]):
            The engine's, with its sizes filled in.
        rows_at_once (`int`, *optional*):
            Completions of one pass through the model; None is a whole micro-batch.
    """

    gradient_checkpointing: bool
    engine_options: EngineOptions
    rows_at_once: int | None = None


def plan_training(
    model: Any,
    args: AStarPOConfig,
    options: EngineOptions,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
    engine: Any = None,
    kind: EpisodeKind | None = None,
    tokenizer: Any = None,
    closes_engine: bool = False,
) -> TrainingSizes:
    """Plan a run: on a GPU, or wherever `budget_gb` is given, if its engine is started by the trainer in this process.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            As given to the trainer, like all that follow.
        args ([`AStarPOConfig`]):
            Configuration of the trainer.
        options ([`EngineOptions`]):
            The engine.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter.
        quantization_config (`Any`, *optional*):
            How the trainer's weights are quantised.
        engine ([`Engine`], *optional*):
            The caller's own engine, whose sizes are decided already.
        kind ([`EpisodeKind`], *optional*):
            What an episode is; a completion when not given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; the model's own when not given.
        closes_engine (`bool`, *optional*, defaults to `False`):
            Whether the engine is ended while the trainer works.

    Raises:
        ValueError: If the run does not fit; the message names the cheapest change that would.
    """
    recomputes = args.gradient_checkpointing
    if recomputes is None:
        recomputes = torch.cuda.is_available() or _recomputes_on_cpu(model, args, peft_config, kind, tokenizer)
    unplanned = TrainingSizes(recomputes, options)
    if options.engine == "transformers":
        logger.warning("Completions come from transformers, several times slower than from vLLM.")
    end_closed_engines()  # what they still hold is not free
    budget = _common(memory_budget(options, _bytes_on_gpu(model)))
    if budget is None or engine is not None or options.engine not in ("auto", "vllm", "transformers"):
        return unplanned
    reason = _why_not_planned(quantization_config)
    if reason:
        logger.warning("Memory is not planned: %s.", reason)
        return unplanned
    shape = shape_to_plan(lambda: _shape(model, args), options)
    if shape is None:
        return unplanned
    completion = _longest_completion(model, args, kind, tokenizer)
    sizes = training_sizes(
        args.max_prompt_length or USUAL_PROMPT,
        completion,
        width=shape.width(_dtype(model, args)),
        rank=None if peft_config is None else int(getattr(peft_config, "r", 16)),
        targets=getattr(peft_config, "target_modules", None),
        policy_link=options.policy_link,
        share_base_weights=sharing_is_wanted(options) and not args.cast_lm_head_to_fp32,
        gradient_checkpointing=args.gradient_checkpointing,
        batch=args.per_device_train_batch_size,
        # Several processes must make the same passes, so there a micro-batch is one pass.
        is_one_pass=_processes() > 1,
        max_model_len=options.max_model_len,
        engine=planned_engine(options),
        in_rounds=closes_engine,
    )
    filled, plan = plan_job(_with_share(args, options, shape, sizes), shape, sizes, budget)
    chosen = plan.sizes
    assert chosen.gradient_checkpointing is not None
    return TrainingSizes(chosen.gradient_checkpointing, filled, chosen.micro_batch)


def _recomputes_on_cpu(
    model: Any, args: AStarPOConfig, peft_config: PeftConfig | None, kind: EpisodeKind | None, tokenizer: Any
) -> bool:
    """Whether to recompute activations without a GPU: it halves the speed (what prompts begin with alike cannot be shared either), so
    only where those of a pass are large."""
    try:
        shape = _shape(model, args)
    except ValueError:  # unknown to the formulas, or no model at all, which is said where it is loaded
        return True
    row = (args.max_prompt_length or USUAL_PROMPT) + _longest_completion(model, args, kind, tokenizer)
    rank = 0 if peft_config is None else int(getattr(peft_config, "r", 16))
    kept = saved_activations(shape, row * args.per_device_train_batch_size, rank, is_checkpointed=False)
    if not (args.bf16 or args.fp16):
        kept *= 2  # the formula is for 16 bit
    return kept > OF_MACHINE * _memory_of_machine() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _memory_of_machine() -> int:
    """Bytes of memory, or of what a container may take of it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
            memory = min(memory, int(text))
    return memory


def _with_share(args: AStarPOConfig, options: EngineOptions, shape: ModelShape, sizes: RunSizes) -> EngineOptions:
    """The options with a KV cache of the size that TRL's share of the GPU gives it, where that is given and the size is not."""
    share = args.vllm_gpu_memory_utilization
    if share is None or options.kv_cache_gb is not None or options.engine == "transformers":
        return options
    if not torch.cuda.is_available():
        logger.warning("vllm_gpu_memory_utilization=%s is left out: there is no GPU to have a share of.", share)
        return options
    cache = cache_of_share(share, torch.cuda.mem_get_info()[1], shape, sizes) / 1e9
    logger.info("vllm_gpu_memory_utilization=%s is taken as kv_cache_gb=%.2f", share, cache)
    return replace(options, kv_cache_gb=cache)


def engine_of_training(
    args: AStarPOConfig, options: EngineOptions, model: Any = None, quantization_config: Any = None
) -> EngineOptions:
    """The options with the engine that this training starts.

    Args:
        args ([`AStarPOConfig`]):
            `use_vllm`, and the device of the trainer.
        options ([`EngineOptions`]):
            The engine that was asked for.
        model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The policy, as given to the trainer.
        quantization_config (`Any`, *optional*):
            How its weights are quantised.

    Raises:
        ValueError: If it cannot run here, cannot train, or would compute on another device than the trainer; the message names the fix.
    """
    if options.engine == "ray":
        raise ValueError(
            "Ray makes reference samples (astarpo-rollout); to train set --engine vllm, server or transformers."
        )
    options = chosen_engine(options if args.use_vllm else replace(options, engine="transformers"))
    is_quantized = quantization_config is not None or getattr(model, "is_quantized", False)
    if is_quantized and options.engine == "vllm":
        raise ValueError(
            "A policy in 4 or 8 bit is refused with vLLM in the same process: the engine would hold the same weights in 16 bit, which takes "
            "more memory than one 16-bit copy that both use, and it would sample from another model than the one that is trained. Leave "
            "load_in_4bit and load_in_8bit out, or set --engine transformers, which samples the quantised policy itself."
        )
    if options.engine == "vllm" and args.device.type == "cpu" and torch.cuda.is_available():
        raise ValueError(
            "The trainer is on the CPU (`accelerate launch --cpu`, or use_cpu), and vLLM would take the GPU. Remove that, or set "
            "CUDA_VISIBLE_DEVICES='' to use the CPU for both."
        )
    return options


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _common(budget: int | None) -> int | None:
    """The least of all processes' budgets: all must come to the same plan."""
    if budget is None or _processes() == 1:
        return budget
    return min(gather_object([budget]))


def _why_not_planned(quantization_config: Any) -> str | None:
    if quantization_config is not None:
        return "the trainer's weights are quantised, which the formulas do not know"
    for name, wrapper in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() in ("1", "true"):
            return f"{wrapper} divides the weights among processes, which the formulas do not know"
    return None


def _longest_completion(model: Any, args: AStarPOConfig, kind: EpisodeKind | None, tokenizer: Any) -> int:
    completion = completion_length(args)
    if kind is None or len(kind.roles) == 1:
        return completion
    if tokenizer is None:
        name = model if isinstance(model, str) else str(model.config._name_or_path)
        tokenizer = load_tokenizer(name, options_of(args.model_init_kwargs).get("revision"))
    return FollowUps.render(tokenizer, kind).longest_after_prompt(completion)


def _shape(model: Any, args: AStarPOConfig) -> ModelShape:
    if isinstance(model, str):
        return ModelShape.of(model, options_of(args.model_init_kwargs).get("revision"))
    return ModelShape.of_config(model.config, str(model.config._name_or_path))


def _dtype(model: Any, args: AStarPOConfig) -> str:
    """Type of the base weights; TRL loads a model by name in float32 unless told otherwise."""
    dtype = options_of(args.model_init_kwargs).get("dtype", "float32") if isinstance(model, str) else model.dtype
    return str(dtype).removeprefix("torch.") if dtype is not None else "auto"


def _bytes_on_gpu(model: Any) -> int:
    if not isinstance(model, torch.nn.Module):
        return 0
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type == "cuda")
