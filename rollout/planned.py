"""The planner at work: sizes for a job that is about to start, or a refusal before anything is loaded."""

import sys
from dataclasses import replace

from .memory import ModelShape, Plan, RunSizes, plan_run
from .options import EngineOptions, ModelOptions

RESERVE = 0.05
"""Share of the free memory that is left alone: the allocator's gaps."""


def memory_budget(options: EngineOptions) -> int | None:
    """Bytes that a job may take of the GPU; None where nothing is planned."""
    import torch

    if options.budget_gb is not None:
        if not options.budget_gb > 0:
            raise ValueError(f"budget_gb={options.budget_gb} must be positive.")
        return int(options.budget_gb * 1e9)
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[0] * (1 - RESERVE))


def planned(options: EngineOptions, shape: ModelShape, sizes: RunSizes, budget: int) -> tuple[EngineOptions, Plan]:
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
    )
    plan = plan_run(shape, sizes, budget)
    if not plan.fits:
        raise ValueError(
            f"This run does not fit: it would need {plan.peak / 1e9:.1f} GB ({plan.largest_phase}) and may take "
            f"{budget / 1e9:.1f} GB. What would fit: {plan.advice}. `astarpo-plan` shows every line."
        )
    chosen = plan.sizes
    print(f"planned: {describe(plan)}", file=sys.stderr)
    filled = replace(
        options,
        max_num_seqs=chosen.max_num_seqs,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
        kv_cache_gb=(chosen.kv_cache_bytes or 0) / 2**30,
    )
    return filled, plan


def describe(plan: Plan) -> str:
    """A plan in one line."""
    chosen = plan.sizes
    words = [
        f"peak {plan.peak / 1e9:.1f} GB of {plan.budget / 1e9:.1f} GB ({plan.largest_phase})",
        f"{chosen.max_num_seqs} completions decoded at once",
        f"KV cache {(chosen.kv_cache_bytes or 0) / 2**30:.2f} GiB",
    ]
    if chosen.trains:
        checkpointed = "with" if chosen.gradient_checkpointing else "without"
        words.append(f"{chosen.micro_batch} completions trained at once, {checkpointed} gradient checkpointing")
        words.append("one copy of the base weights" if chosen.share_base_weights else "two copies of the base weights")
    return ", ".join(words)


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
    budget = memory_budget(options)
    if budget is None:
        return options
    shape = ModelShape.of(model.model_name_or_path, model.model_revision)
    sizes = RunSizes(sequence, completion, rank=None, width=shape.width(model.dtype), trains=False)
    return planned(options, shape, sizes, budget)[0]
