"""V* for the rows of a training set: from the pool's rewards to a `v_star` column."""

import math
from typing import TYPE_CHECKING, Any

from ..rollout.pool import ReferencePool, rewards_tensor
from ..rollout.values import optimal_values

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import AStarPOConfig

REWARDS = "reference_rewards"
VALUE = "v_star"


def open_pool(args: "AStarPOConfig") -> "Dataset":
    """The data set of the pool named in `args.pool`, after checking that both stages follow the same rules."""
    if args.pool is None:
        raise ValueError(
            "Stage 2 needs V*: pass a `train_dataset` with a `reference_rewards` column, or name a reference pool with "
            "--pool (made by `astarpo-rollout`)."
        )
    pool = ReferencePool.open(args.pool)
    made = pool.manifest.fingerprint
    for name in ("temperature", "require_eos"):
        if made[name] != getattr(args, name):
            raise ValueError(
                f"The pool in `{args.pool}` was sampled with {name}={made[name]}, training is set to "
                f"{name}={getattr(args, name)}: V* would belong to another reward. Set --{name} {made[name]}, or sample "
                "another pool."
            )
    if made.get("adapter") is not None:
        raise ValueError(
            f"The pool in `{args.pool}` was sampled with an adapter, so its V* belongs to that policy and not to the reference, "
            "which is the model with the adapter off. Merge the adapter into the model and sample that, or sample without."
        )
    return pool.to_dataset()


def with_values(dataset: "Dataset", args: "AStarPOConfig") -> "Dataset":
    """Add V* to a training set, and leave out what carries no signal.

    Args:
        dataset ([`~datasets.Dataset`]):
            A data set with a `reference_rewards` column: at least `num_value_samples` rewards per row.
        args ([`AStarPOConfig`]):
            `beta1`, `num_value_samples`, `filter_all_incorrect`.

    Raises:
        ValueError: If the column is missing or too short, or if no prompt was ever solved.
    """
    if REWARDS not in dataset.column_names:
        raise ValueError(
            f"The training set has no `{REWARDS}` column (it has {', '.join(dataset.column_names)}), so V* is unknown. "
            "Make a pool with `astarpo-rollout` and pass `ReferencePool.open(folder).to_dataset()`."
        )
    if len(dataset) == 0:
        raise ValueError("The training set is empty. Check --limit, the pool and any filter before it.")
    rewards = _rewards(dataset, args)
    shortest = min(len(row) for row in rewards)
    if shortest < args.num_value_samples:
        raise ValueError(
            f"V* is set to use {args.num_value_samples} reference samples, a prompt has {shortest}. Set "
            f"--num_value_samples {shortest}, or sample more with `astarpo-rollout --num_samples`."
        )
    best = [max((reward or 0.0 for reward in row), default=0.0) for row in rewards]
    if max(best) <= 0:
        raise ValueError(
            f"The reference never solved any of the {len(rewards)} prompts, so there is nothing to reinforce: every reward "
            "would stay 0. Use easier problems, a stronger model, longer completions, or check the gold answers with "
            "`astarpo-verify`."
        )
    values = optimal_values(rewards_tensor(rewards), args.beta1).tolist()
    kept = [
        row
        for row, value in enumerate(values)
        if not math.isnan(value) and (best[row] > 0 or not args.filter_all_incorrect)
    ]
    return dataset.add_column(VALUE, values).select(kept)  # pyright: ignore[reportCallIssue]


def with_eval_values(dataset: Any, args: "AStarPOConfig") -> Any:
    """Add V* to an evaluation set (or a dictionary of them) that has reference rewards; nothing is left out."""
    if isinstance(dataset, dict):
        return {name: with_eval_values(part, args) for name, part in dataset.items()}
    if dataset is None or REWARDS not in dataset.column_names:
        return dataset
    values = optimal_values(rewards_tensor(_rewards(dataset, args)), args.beta1).tolist()
    return dataset.add_column(VALUE, values)


def _rewards(dataset: "Dataset", args: "AStarPOConfig") -> list[list[float | None]]:
    return [list(row[: args.num_value_samples]) for row in dataset[REWARDS]]
