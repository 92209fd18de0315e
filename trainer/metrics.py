"""What an update logs besides TRL's metrics; docs/metrics.md says what each means.

Means over completions or tokens are kept as totals until they are logged (and in checkpoints with them), so that they
depend neither on how a batch was cut into micro-batches nor on where a run was interrupted.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from ..rollout.episodes.episode import ROLES
from ..rollout.evaluation import confidence_interval

Metrics = dict[str, list[float]]

TOTALS = (
    *("tokens", "entropy", "log_ratio", "weight", "residual", "square"),
    *("solved", "solved_residual", "solved_target", "unsolved_residual", "unsolved_target"),
)
PREFIX = "total/"
TRAINING_TOKENS, TRAINING_SECONDS = PREFIX + "training_tokens", PREFIX + "training_seconds"


def loss_totals(
    log_ratio_BK: torch.Tensor, entropies_BT: torch.Tensor, inputs: dict[str, Any], beta2: float
) -> torch.Tensor:
    """Totals of a micro-batch in the order of `TOTALS`, a tensor of shape (11,).

    Args:
        log_ratio_BK (`torch.Tensor`):
            ℓ = Σ_t ln π/π_ref of each turn, shape (B, K).
        entropies_BT (`torch.Tensor`):
            Entropy of the policy at each token, shape (B, T).
        inputs (`dict[str, Any]`):
            The batch: `turn_ids` of shape (B, T), `values`, `rewards` and `weights`, each of shape (B, K).
        beta2 (`float`):
            KL temperature.
    """
    written_BT = inputs["turn_ids"] > 0
    counted_BK = (inputs["weights"] > 0).float()
    solved_BK = counted_BK * (inputs["rewards"] > 0)
    unsolved_BK = counted_BK - solved_BK
    target_BK = inputs["rewards"] - inputs["values"]
    residual_BK = beta2 * log_ratio_BK - target_BK
    parts = [
        *(written_BT, entropies_BT * written_BT, log_ratio_BK),
        *(counted_BK, residual_BK * counted_BK, residual_BK**2 * counted_BK),
        *(
            solved_BK,
            residual_BK * solved_BK,
            target_BK * solved_BK,
            residual_BK * unsolved_BK,
            target_BK * unsolved_BK,
        ),
    ]
    return torch.stack([part.float().sum() for part in parts])


def add_totals(metrics: Metrics, totals: list[float]) -> None:
    """Keep a micro-batch's totals, summed over processes."""
    for name, total in zip(TOTALS, totals, strict=True):
        metrics[PREFIX + name].append(total)


def divide_totals(metrics: Metrics) -> None:
    """Turn the totals since the last log into the means that are logged."""
    if TRAINING_TOKENS in metrics:
        tokens, seconds = sum(metrics.pop(TRAINING_TOKENS)), sum(metrics.pop(TRAINING_SECONDS))
        metrics["training/tokens_per_second"] = [tokens / max(1e-9, seconds)]
    if PREFIX + TOTALS[0] not in metrics:
        return
    sums = {name: sum(metrics.pop(PREFIX + name)) for name in TOTALS}
    unsolved = sums["weight"] - sums["solved"]
    metrics["entropy"] = [_mean(sums["entropy"], sums["tokens"])]
    # On-policy, the mean of ln π/π_ref over sampled tokens is an unbiased estimate of the KL per token.
    metrics["kl"] = [_mean(sums["log_ratio"], sums["tokens"])]
    metrics["residual/mean"] = [_mean(sums["residual"], sums["weight"])]
    metrics["residual/mean_square"] = [_mean(sums["square"], sums["weight"])]
    for name, count in (("solved", sums["solved"]), ("unsolved", unsolved)):
        if count > 0:
            metrics[f"residual/{name}"] = [sums[f"{name}_residual"] / count]
            metrics[f"target/{name}"] = [sums[f"{name}_target"] / count]


def _mean(total: float, count: float) -> float:
    return total / max(1.0, count)


def add_scores(
    metrics: Metrics, values_G: torch.Tensor, advantages_G: torch.Tensor, has_signal_G: torch.Tensor
) -> None:
    """V* and advantages of a whole generation, all tensors of shape (G,); V* is NaN where it is unknown."""
    known_G = values_G[~values_G.isnan()]
    metrics["v_star"].append(values_G.nanmean().item())
    if len(known_G):
        metrics["v_star/std"].append(known_G.std(correction=0).item())
        metrics["v_star/zero"].append((known_G < 1e-6).float().mean().item())
        metrics["v_star/one"].append((known_G > 1 - 1e-6).float().mean().item())
    metrics["advantage"].append(advantages_G[has_signal_G].mean().item())
    metrics["no_signal"].append((~has_signal_G).float().mean().item())


def add_turns(
    metrics: Metrics,
    rewards_GK: torch.Tensor,
    present_GK: torch.Tensor,
    labels_GK: torch.Tensor,
    verdicts: Sequence[str],
) -> None:
    """Rewards of the turns, the verifier's recalls and how often there was a revision, of a whole generation of episodes.

    Args:
        metrics (`Metrics`):
            Where to.
        rewards_GK (`torch.Tensor`):
            Rewards of attempt, verification and revision.
        present_GK (`torch.Tensor`):
            Whether the turn is there and has signal.
        labels_GK (`torch.Tensor`):
            Whether the attempt was right, in the columns of verification and revision.
        verdicts (`Sequence[str]`):
            `correct`, `wrong` or `none` for each episode.
    """
    for turn, name in enumerate(ROLES):
        here_G = present_GK[:, turn] > 0
        if here_G.any():
            metrics[f"{name}/reward"].append(rewards_GK[here_G, turn].mean().item())
    verified_G = present_GK[:, 1] > 0
    for name, label in (("correct_recall", 1), ("wrong_recall", 0)):
        here_G = verified_G & (labels_GK[:, 1] == label)
        if here_G.any():
            metrics[f"verify/{name}"].append(rewards_GK[here_G, 1].mean().item())
    metrics["verify/no_verdict"].append(fmean(verdict == "none" for verdict in verdicts))
    metrics["revise/rate"].append(fmean(verdict == "wrong" for verdict in verdicts))


def add_residuals(metrics: Metrics, moments: torch.Tensor) -> None:
    """Mean residual β2·ℓ + V − R of each role in an update, with V before it was centred; `moments` of shape (3, K, Z)."""
    for turn, name in enumerate(ROLES):
        count, total = moments[0, turn].sum().item(), moments[1, turn].sum().item()
        if count:
            metrics[f"residual/{name}"].append(-total / count)


def add_interval(metrics: Metrics, rewards: list[float], num_samples: int) -> None:
    """95 % interval of an evaluation's mean reward, over the choice of prompts; for rewards between 0 and 1.

    Args:
        metrics (`Metrics`):
            The evaluation's metrics.
        rewards (`list[float]`):
            One per completion, the `num_samples` of a prompt after one another; NaN for no signal counts as 0.
        num_samples (`int`):
            Completions per prompt, the k of avg@k.
    """
    scores = [0.0 if reward != reward else reward for reward in rewards]
    if not scores or min(scores) < 0 or max(scores) > 1:
        return
    rates = [fmean(scores[start : start + num_samples]) for start in range(0, len(scores), num_samples)]
    low, high = confidence_interval(rates, num_samples)
    metrics["reward/ci95_low"], metrics["reward/ci95_high"] = [low], [high]


def add_speed(metrics: Metrics, tokens: int, sampling_s: float, bringing_s: float) -> None:
    """Tokens that this process's engine sampled, in how long, and how long the policy took to reach it."""
    metrics["engine/tokens_per_second"].append(tokens / max(1e-9, sampling_s))
    metrics["engine/bring_seconds"].append(bringing_s)


def add_training_time(metrics: Metrics, tokens: int, seconds: float) -> None:
    """Tokens of prompts and completions in a micro-batch of this process, and what its forward and backward pass took."""
    metrics[TRAINING_TOKENS].append(float(tokens))
    metrics[TRAINING_SECONDS].append(seconds)


def add_peak_memory(metrics: Metrics) -> None:
    """Most GPU memory that PyTorch has held so far, in GiB."""
    if torch.cuda.is_available():
        metrics["memory/peak_gb"].append(torch.cuda.max_memory_reserved() / 2**30)
