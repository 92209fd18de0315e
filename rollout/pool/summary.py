"""Statistics of a pool: solve rates, pass@k, lengths, and the spread of V*."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import optimal_values

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from .reading import ReferencePool

BETAS = (0.1, 0.25, 0.5, 1.0, 2.0)


def summarize(pool: "ReferencePool") -> dict[str, Any]:
    """Counts, solve rates, pass@k, lengths and the spread of V* of a pool, as plain data.

    Solve rates, pass@k and V* need all samples; they are missing from the summary of an unfinished pool.
    """
    import numpy as np

    rows = pool.read(["sample_index", "reward", "num_tokens", "finish_reason", "outcome", "role"])
    turns = pool.manifest.turns
    table = _of_turn(rows, 0, turns)
    rewards = table["reward"].drop_null().to_numpy()
    lengths = table["num_tokens"].to_numpy()
    summary: dict[str, Any] = {
        "num_prompts": pool.manifest.num_prompts,
        "num_samples": pool.manifest.num_samples,
        "turns": turns,
        "rows": pool.num_rows,
        "failed": len(pool.manifest.failures),
        "mean_reward": float(rewards.mean()) if len(rewards) else None,
        "mean_tokens": float(lengths.mean()) if len(lengths) else None,
        "finish_reasons": dict(Counter(table["finish_reason"].to_pylist())),
        "outcomes": dict(Counter(table["outcome"].to_pylist())),
        "never_solved": None,
        "always_solved": None,
    }
    if turns > 1 and rows.num_rows:
        later = [_of_turn(rows, turn, turns) for turn in range(1, turns)]
        summary["later_turns"] = {turn["role"][0].as_py(): _turn_summary(turn) for turn in later}
    if len(lengths):
        summary["token_quantiles"] = {f"p{q}": float(np.percentile(lengths, q)) for q in (5, 50, 95, 100)}
    if pool.manifest.is_settled and pool.num_rows:
        summary |= _solving(pool.reward_matrix())
    return summary


def _of_turn(table: "pa.Table", turn: int, turns: int) -> "pa.Table":
    return table.filter(table["sample_index"].to_numpy() % turns == turn)


def _turn_summary(table: "pa.Table") -> dict[str, Any]:
    """Of the later turns of one role: the mean reward of those with signal, their outcomes and lengths."""
    rewards = table["reward"].drop_null().to_numpy()
    lengths = table["num_tokens"].to_numpy()
    return {
        "mean_reward": float(rewards.mean()) if len(rewards) else None,
        "graded": len(rewards),
        "mean_tokens": float(lengths[lengths > 0].mean()) if (lengths > 0).any() else None,
        "outcomes": dict(Counter(table["outcome"].to_pylist())),
    }


def _solving(rewards: "np.ndarray") -> dict[str, Any]:
    import numpy as np
    import torch

    num_samples = rewards.shape[1]
    solved = (np.nan_to_num(rewards) > 0).sum(axis=1)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= num_samples]
    values = {beta: optimal_values(torch.from_numpy(rewards), beta) for beta in BETAS}
    known = {beta: value[~value.isnan()] for beta, value in values.items()}
    return {
        "never_solved": float((solved == 0).mean()),
        "always_solved": float((solved == num_samples).mean()),
        "solved_histogram": np.bincount(solved, minlength=num_samples + 1).tolist(),
        "pass_at_k": {str(k): pass_at_k(solved.tolist(), num_samples, k) for k in ks},
        "v_star": {
            str(beta): {"mean": float(value.mean()), "std": float(value.std(correction=0))}
            for beta, value in known.items()
            if len(value)
        },
    }


def pass_at_k(solved: list[int], num_samples: int, k: int) -> float:
    """Chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k), averaged over prompts (Chen et al. 2021).

    Args:
        solved (`list[int]`):
            How many samples of each prompt are right, c.
        num_samples (`int`):
            Samples per prompt, n.
        k (`int`):
            At most n.
    """
    ways = math.comb(num_samples, k)
    return sum(1 - math.comb(num_samples - right, k) / ways for right in solved) / len(solved)


def plot_summary(summary: dict[str, Any], path: Path) -> None:
    """Draw solve counts, pass@k and V* into an image file; raises `ValueError` for an unfinished pool."""
    if "solved_histogram" not in summary:
        raise ValueError("An unfinished pool has no solve rates to draw. Finish it with the command that began it.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    counts, passes, values = figure.subplots(1, 3)
    counts.bar(range(len(summary["solved_histogram"])), summary["solved_histogram"])
    counts.set(xlabel=f"right samples of {summary['num_samples']}", ylabel="prompts", title="solved")
    passes.plot(list(summary["pass_at_k"]), list(summary["pass_at_k"].values()), marker="o")
    passes.set(xlabel="k", ylim=(0, 1), title="pass@k of the reference")
    betas = list(summary["v_star"])
    means = [summary["v_star"][beta]["mean"] for beta in betas]
    spreads = [summary["v_star"][beta]["std"] for beta in betas]
    values.errorbar(betas, means, yerr=spreads, marker="o", capsize=3)
    values.set(xlabel="beta1", ylim=(-0.1, 1.1), title="V*, mean and spread over prompts")
    figure.savefig(path, dpi=120)
