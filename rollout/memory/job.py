"""Sizes for a job that is about to start on this machine, or a refusal before anything is loaded."""

import logging
from collections.abc import Callable
from dataclasses import replace

from ..hardware import Hardware
from ..options import EngineOptions, ModelOptions
from . import formulas
from .plan import Plan, RunSizes, describe, plan_run
from .shape import ModelShape, Unplannable

logger = logging.getLogger(__name__)

RESERVE = 0.05
"""Share of the free memory that is left alone: the allocator's gaps."""


def memory_budget(options: EngineOptions, held: int = 0) -> int | None:
    """Bytes that a job may take of the GPU; None where nothing is planned. End closed engines first (`end_closed_engines`).

    The caller ends engines that are closed but still hold memory (`engines.vllm_engine.end_closed_engines`) before.

    Args:
        options ([`EngineOptions`]):
            The job's.
        held (`int`, *optional*, defaults to `0`):
            Bytes that it holds there already, such as a model that was loaded before.

    Raises:
        ValueError: If `budget_gb` is not positive, or more than the GPU has left.
    """
    import torch

    budget = None if options.budget_gb is None else int(options.budget_gb * 1e9)
    if budget is not None and budget <= 0:
        raise ValueError(f"budget_gb={options.budget_gb} must be positive.")
    if not torch.cuda.is_available():
        return budget
    # This process has its own context already, so it is missing from what is free, but plans count it.
    reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() + formulas.CONTEXT
    left = torch.cuda.mem_get_info()[0] + reusable + held
    if budget is None:
        return int(left * (1 - RESERVE))
    if budget > left:
        raise ValueError(
            f"budget_gb={options.budget_gb} is more than the {left / 1e9:.1f} GB that are left on "
            f"{torch.cuda.get_device_name()}. Lower it, or end what else runs there."
        )
    return budget


def shape_to_plan(read: Callable[[], ModelShape], options: EngineOptions) -> ModelShape | None:
    """The model's shape; None, with a message, where it cannot be planned and no budget asks for a plan."""
    try:
        return read()
    except Unplannable as error:
        if options.budget_gb is not None:
            raise
        logger.warning("not planned: %s", error)
        return None


def plan_job(options: EngineOptions, shape: ModelShape, sizes: RunSizes, budget: int) -> tuple[EngineOptions, Plan]:
    """Fill in what the options leave open.

    Args:
        options ([`EngineOptions`]):
            The job's; what is set there is kept.
        shape ([`ModelShape`]):
            The model.
        sizes ([`RunSizes`]):
            The job.
        budget (`int`):
            Bytes that it may take.

    Raises:
        ValueError: If it does not fit; the message names the cheapest change that would.
    """
    sizes = replace(
        sizes,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_bytes=None if options.kv_cache_gb is None else options.kv_cache_bytes,
        cuda_graphs=options.cuda_graphs == "on",
    )
    plan = plan_run(shape, sizes, budget)
    if not plan.fits:
        raise ValueError(
            f"This run does not fit: it would need {plan.peak / 1e9:.1f} GB ({plan.largest_phase}) and may take "
            f"{budget / 1e9:.1f} GB. What would fit: {plan.advice}. `astarpo-plan` shows every line."
        )
    chosen = plan.sizes
    logger.info("planned: %s", describe(plan))
    filled = replace(
        options,
        max_num_seqs=chosen.max_num_seqs,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
        kv_cache_gb=(chosen.kv_cache_bytes or 0) / 1e9,
    )
    return filled, plan


def cache_of_share(share: float, total: int, shape: ModelShape, sizes: RunSizes) -> int:
    """Bytes of KV cache that vLLM has under TRL's `vllm_gpu_memory_utilization`: that share of the card, less weights and a step.

    Args:
        share (`float`):
            Share of the card, above 0 and at most 1.
        total (`int`):
            Bytes of the card.
        shape ([`ModelShape`]):
            The model.
        sizes ([`RunSizes`]):
            The run.

    Raises:
        ValueError: If that leaves no room for one sequence.
    """
    if not 0 < share <= 1:
        raise ValueError(f"vllm_gpu_memory_utilization={share} is not between 0 and 1.")
    tokens = sizes.max_num_batched_tokens or max(2048, sizes.sequence)
    step = formulas.engine_activations(shape, tokens, sizes.width) + formulas.sampler(shape, sizes.max_num_seqs or 64)
    held = formulas.weights(shape, sizes.width) + step
    cache, least = int(share * total) - held, sizes.sequence * formulas.key_values_per_token(shape, sizes.width)
    if cache < least:
        raise ValueError(
            f"vllm_gpu_memory_utilization={share} is {share * total / 1e9:.1f} GB of this GPU, of which the engine's weights and a step "
            f"take {held / 1e9:.1f}; one sequence needs {least / 1e9:.2f} GB of KV cache. Raise it, or leave it out: memory is planned then."
        )
    return cache


def planned_engine(options: EngineOptions) -> str:
    """The engine that is planned for: `transformers`, or `vllm`, which `auto` is where a plan is made without a machine."""
    return "transformers" if options.engine == "transformers" else "vllm"


def plan_rollout(model: ModelOptions, options: EngineOptions, sequence: int, completion: int) -> EngineOptions:
    """Sizes of a job without a trainer, whose engine runs in this process.

    Args:
        model ([`ModelOptions`]):
            The model.
        options ([`EngineOptions`]):
            The engine's.
        sequence (`int`):
            Most tokens of prompt and completion.
        completion (`int`):
            Most tokens of a completion.

    Raises:
        ValueError: If it does not fit.
    """
    import torch

    budget = memory_budget(options)
    if budget is None:
        return options
    shape = shape_to_plan(lambda: ModelShape.of(model.model_name_or_path, model.model_revision), options)
    if shape is None:
        return options
    engine = planned_engine(options)
    if engine == "transformers":
        width = shape.width(Hardware.detect(model.dtype).dtype)
    else:  # vLLM loads float32 weights as 16 bit
        width = 2 if model.dtype == "auto" and torch.cuda.is_available() else shape.width(model.dtype)
    sizes = RunSizes(sequence, completion, rank=None, width=width, trains=False, engine=engine)
    return plan_job(options, shape, sizes, budget)[0]
