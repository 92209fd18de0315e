"""V* for the rows of a training set: from the pool's rewards to a `v_star` column."""

import math
import sys
from typing import TYPE_CHECKING, Any

from ..rollout.data import Problem
from ..rollout.pool import ReferencePool, rewards_tensor
from ..rollout.values import optimal_values
from ..verifier import extract_gold

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import AStarPOConfig
    from .turn_options import TurnOptions

REWARDS = "reference_rewards"
VALUE = "v_star"


def training_set(dataset: "Dataset | None", args: "AStarPOConfig", options: "TurnOptions") -> "Dataset":
    """The training set with V*, if its reference rewards are known yet.

    They are those in the data set, or those that the pool named in `args.pool` has for its problems. A data set without
    either is returned as it is: the trainer then does stage 1. Where `options.value` gives values to prompts without samples,
    only a part of the data set need be in the pool; V* of the others is NaN for now.
    """
    if dataset is None:
        if args.pool is None:
            raise ValueError(
                "There is nothing to train on: pass a `train_dataset`, or name a reference pool with --pool."
            )
        return with_values(_open_pool(args, options).to_dataset(), args)
    if REWARDS in dataset.column_names:
        if args.pool is not None and (options.is_pag or options.value in ("constant", "network")):
            _open_pool(args, options)
        return with_values(dataset, args)
    is_partial = options.value in ("constant", "network")
    if args.pool is None:
        if len(dataset) == 0:
            raise ValueError("The training set is empty. Check --limit and any filter before it.")
        return dataset
    return with_values(_joined(dataset, _open_pool(args, options), is_partial), args, is_partial)


def _joined(dataset: "Dataset", pool: ReferencePool, is_partial: bool) -> "Dataset":
    """Look the data set's problems up in a pool, by their ids."""
    rewards = pool.rewards()
    ids = [problem_of(row).prompt_id for row in dataset.to_list()]
    missing = [row for row, prompt_id in enumerate(ids) if prompt_id not in rewards]
    if is_partial and 0 < len(missing) < len(ids):
        print(
            f"{len(missing)} of {len(ids)} prompts have no reference samples; their V* is estimated", file=sys.stderr
        )
        unknown: list[float | None] = [None] * pool.manifest.num_samples
        return dataset.add_column(REWARDS, [rewards.get(prompt_id, unknown) for prompt_id in ids])  # pyright: ignore[reportCallIssue]
    if missing:
        raise ValueError(
            f"The pool in `{pool.folder}` has no samples for {len(missing)} of {len(ids)} rows of the training set, the first is "
            f"row {missing[0]}. Messages (system prompt included) and gold answer must be those that were sampled. Train on "
            "`ReferencePool.open(...).to_dataset()`, leave the pool out and stage 1 is done anew, or set value=network to estimate "
            "the V* of rows that were not sampled."
        )
    return dataset.add_column(REWARDS, [rewards[prompt_id] for prompt_id in ids])  # pyright: ignore[reportCallIssue]


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of a row of a training set, under the same id that `astarpo-rollout` gives it."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    gold = row.get("solution")
    return Problem(tuple(dict(message) for message in messages), "" if gold is None else extract_gold(str(gold)))


def _open_pool(args: "AStarPOConfig", options: "TurnOptions") -> ReferencePool:
    """The pool named in `args.pool`, after checking that both stages follow the same rules."""
    assert args.pool is not None
    pool = ReferencePool.open(args.pool)
    made = pool.manifest.fingerprint
    for name in ("temperature", "require_eos"):
        if made[name] != getattr(args, name):
            raise ValueError(
                f"The pool in `{args.pool}` was sampled with {name}={made[name]}, training is set to "
                f"{name}={getattr(args, name)}: V* would belong to another reward. Set --{name} {made[name]}, or sample "
                "another pool."
            )
    for name, wanted in options.fingerprint().items():  # completions can take the first attempts of a pool of episodes
        if made.get(name, "single" if name == "episode" else None) != wanted:
            raise ValueError(
                f"The pool in `{args.pool}` was sampled with {name}={made.get(name, 'single')!r}, training is set to {name}={wanted!r}: "
                f"its values would belong to other episodes. Sample another with `astarpo-rollout --episode pag` and this {name}, or "
                "set it as in the pool."
            )
    if made.get("adapter") is not None:
        raise ValueError(
            f"The pool in `{args.pool}` was sampled with an adapter, so its V* belongs to that policy and not to the reference, "
            "which is the model with the adapter off. Merge the adapter into the model and sample that, or sample without."
        )
    return pool


def with_values(dataset: "Dataset", args: "AStarPOConfig", is_partial: bool = False) -> "Dataset":
    """Add V* to a training set, and leave out what carries no signal.

    Args:
        dataset ([`~datasets.Dataset`]):
            A data set with a `reference_rewards` column: at least `num_value_samples` rewards per row.
        args ([`AStarPOConfig`]):
            `beta1`, `num_value_samples`, `filter_all_incorrect`.
        is_partial (`bool`, *optional*, defaults to `False`):
            Keep rows without any reward; their V* is NaN.

    Raises:
        ValueError: If the rows have too few rewards, or if no prompt was ever solved.
    """
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
        if (is_partial if math.isnan(value) else best[row] > 0 or not args.filter_all_incorrect)
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
