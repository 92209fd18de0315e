"""What an update logs; docs/metrics.md says what each metric means.

Means over completions or tokens are kept as totals until they are logged (and in checkpoints with them), so that they depend
neither on how a batch was divided into micro-batches nor on where a run was interrupted.

Suffixes name the dimensions: G rows of all processes, F reward functions, B episodes, T tokens, K turns.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from ..rollout.episode import Episode, EpisodeKind, TurnGrade

Metrics = dict[str, list[float]]

TOTALS = (
    *("tokens", "entropy", "log_ratio", "weight", "residual", "square"),
    *("solved", "solved_residual", "solved_target", "unsolved_residual", "unsolved_target"),
)
PREFIX = "total/"
TRAINING_TOKENS, TRAINING_SECONDS = PREFIX + "training_tokens", PREFIX + "training_seconds"
EVAL_REWARDS = PREFIX + "eval_rewards"
"""Rewards of an evaluation, from which its interval is computed once all are there."""


def loss_totals(
    log_ratio_BK: torch.Tensor, entropies_BT: torch.Tensor, inputs: dict[str, Any], beta2: float
) -> torch.Tensor:
    """Totals of a pass in the order of `TOTALS`, a tensor of shape (11,).

    Args:
        log_ratio_BK (`torch.Tensor`):
            ℓ = Σ_t ln π/π_ref of each turn, shape (B, K).
        entropies_BT (`torch.Tensor`):
            Entropy of the policy at each token in nats, shape (B, T).
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


class PassTotals:
    """What the passes of a micro-batch, or of a whole update, measured.

    It travels with a batch, so that a pass that runs out of memory leaves nothing behind: its `PassTotals` is dropped.

    Args:
        began (`float`):
            When the work began, from `time.perf_counter`.
    """

    def __init__(self, began: float):
        self.began = began
        self.loss = 0.0
        self.totals = torch.zeros(len(TOTALS))
        self.parts: list[dict[str, torch.Tensor]] = []
        """For episodes of several turns: residuals and labels, and what a value network learns from."""

    def add(
        self, log_ratio_BK: torch.Tensor, entropies_BT: torch.Tensor, inputs: dict[str, Any], beta2: float
    ) -> None:
        """Take in a pass."""
        self.totals = self.totals + loss_totals(log_ratio_BK, entropies_BT, inputs, beta2).cpu()
        if log_ratio_BK.shape[1] == 1:
            return
        before_BK = inputs["values"] - inputs["centres"]
        part = {name: inputs[name].cpu() for name in ("labels", "success", "hidden") if name in inputs}
        # An update whose numbers are broken is left out; what it would leave behind here would stay.
        part["present"] = (inputs["present"] & log_ratio_BK.isfinite()).cpu()
        part["residual"] = (inputs["rewards"] - beta2 * log_ratio_BK - before_BK).cpu()
        part["log_ratio"] = log_ratio_BK.cpu()
        self.parts.append(part)

    def extend(self, passes: "PassTotals", loss: float) -> None:
        """Take in the passes of a micro-batch."""
        self.loss += loss
        self.parts += passes.parts


def add_totals(metrics: Metrics, totals: Sequence[float]) -> None:
    """Keep a micro-batch's totals, summed over processes."""
    for name, total in zip(TOTALS, totals, strict=True):
        metrics[PREFIX + name].append(total)


def finish_metrics(metrics: Metrics, eval_samples: int) -> dict[str, float | None]:
    """The means since the last log; None where a metric was never a number.

    Args:
        metrics (`Metrics`):
            Values since the last log, and totals.
        eval_samples (`int`):
            Completions per prompt in an evaluation.
    """
    if TRAINING_TOKENS in metrics:
        tokens, seconds = sum(metrics.pop(TRAINING_TOKENS)), sum(metrics.pop(TRAINING_SECONDS))
        metrics["training/tokens_per_second"] = [tokens / max(1e-9, seconds)]
    if EVAL_REWARDS in metrics:
        _add_interval(metrics, metrics.pop(EVAL_REWARDS), eval_samples)
    if PREFIX + TOTALS[0] in metrics:
        _divide_totals(metrics)
    means: dict[str, float | None] = {}
    for name, values in metrics.items():
        numbers = [value for value in values if not math.isnan(value)]
        means[name] = sum(numbers) / len(numbers) if numbers else None
    return means


def _divide_totals(metrics: Metrics) -> None:
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
    """V* and advantages of a whole batch, all tensors of shape (G,); V* is NaN where it is not known."""
    known_G = values_G[~values_G.isnan()]
    metrics["v_star"].append(values_G.nanmean().item())
    if len(known_G):
        metrics["v_star/std"].append(known_G.std(correction=0).item())
        metrics["v_star/zero"].append((known_G < 1e-6).float().mean().item())
        metrics["v_star/one"].append((known_G > 1 - 1e-6).float().mean().item())
    metrics["advantage"].append(advantages_G[has_signal_G].mean().item())
    metrics["no_signal"].append((~has_signal_G).float().mean().item())


def add_rewards(metrics: Metrics, names: Sequence[str], rewards_GF: torch.Tensor, weighted_G: torch.Tensor) -> None:
    """Rewards by function and in all, as TRL logs them; NaN is no signal."""
    for number, name in enumerate(names):
        metrics[f"rewards/{name}/mean"].append(rewards_GF[:, number].nanmean().item())
        metrics[f"rewards/{name}/std"].append(_nanstd(rewards_GF[:, number]))
    metrics["reward"].append(weighted_G.nanmean().item())
    metrics["reward_std"].append(_nanstd(weighted_G))


def _nanstd(values_G: torch.Tensor) -> float:
    known_G = values_G[~values_G.isnan()]
    return known_G.std().item() if len(known_G) > 1 else math.nan


def add_completions(metrics: Metrics, lengths: Sequence[tuple[int, int, bool]]) -> int:
    """Lengths of a whole batch's completions, as TRL logs them.

    Args:
        metrics (`Metrics`):
            Where the metrics go.
        lengths (`Sequence[tuple[int, int, bool]]`):
            For each episode: tokens of the prompt, tokens that the model wrote, and whether the last turn was truncated.

    Returns:
        `int`: Tokens in all.
    """
    written = [float(tokens) for _, tokens, _ in lengths]
    ended = [float(tokens) for _, tokens, is_truncated in lengths if not is_truncated] or [0.0]
    for name, values in (("", written), ("_terminated", ended)):
        metrics[f"completions/mean{name}_length"].append(fmean(values))
        metrics[f"completions/min{name}_length"].append(min(values))
        metrics[f"completions/max{name}_length"].append(max(values))
    metrics["completions/clipped_ratio"].append(fmean(is_truncated for *_, is_truncated in lengths))
    return sum(prompt + tokens for prompt, tokens, _ in lengths)


def add_roles(metrics: Metrics, kind: EpisodeKind, grades: Sequence[Sequence[TurnGrade]]) -> None:
    """Mean reward of the turns of each role, and what else the kind says of a batch of episodes.

    Args:
        metrics (`Metrics`):
            Where the metrics go.
        kind ([`EpisodeKind`]):
            Says what each turn earns.
        grades (`Sequence[Sequence[TurnGrade]]`):
            One grade a role for each episode.
    """
    for number, role in enumerate(kind.roles):
        rewards = [
            kind.reward(role, row[number].reward, int(number > 0 and row[0].reward > 0))
            for row in grades
            if row[0].reward is not None and row[number].reward is not None
        ]
        if rewards:
            metrics[f"{role}/reward"].append(fmean(rewards))
    for name, value in kind.metrics(grades).items():
        if value is not None:
            metrics[name].append(value)


def add_residuals(metrics: Metrics, roles: Sequence[str], moments: torch.Tensor) -> None:
    """Mean residual β2·ℓ + V − R of each role in an update, with V before it was centred; `moments` of shape (3, K, Z)."""
    for number, role in enumerate(roles):
        count, total = moments[0, number].sum().item(), moments[1, number].sum().item()
        if count:
            metrics[f"residual/{role}"].append(-total / count)


def _add_interval(metrics: Metrics, rewards: Sequence[float], num_samples: int) -> None:
    """95 % interval of an evaluation's mean reward over the choice of prompts, for rewards between 0 and 1.

    `rewards` are those of all completions, the `num_samples` of a prompt after one another; NaN for no signal counts as 0.
    """
    from ..rollout.evaluation import confidence_interval

    scores = [0.0 if reward != reward else reward for reward in rewards]
    if not scores or min(scores) < 0 or max(scores) > 1:
        return
    rates = [fmean(scores[start : start + num_samples]) for start in range(0, len(scores), num_samples)]
    low, high = confidence_interval(rates, num_samples)
    metrics["reward/ci95_low"], metrics["reward/ci95_high"] = [low], [high]


def add_sampling(metrics: Metrics, episodes: Sequence[Episode], seconds: float, sync_seconds: float) -> None:
    """Tokens that this process's engine sampled per second, and how long the policy took to reach it."""
    tokens = sum(len(turn.completion.token_ids) for episode in episodes for turn in episode.turns)
    metrics["engine/tokens_per_second"].append(tokens / max(1e-9, seconds))
    metrics["engine/sync_seconds"].append(sync_seconds)


def add_training_time(metrics: Metrics, tokens: int, seconds: float) -> None:
    """Tokens of prompts and completions in a micro-batch of this process, and what its forward and backward pass took."""
    metrics[TRAINING_TOKENS].append(float(tokens))
    metrics[TRAINING_SECONDS].append(seconds)


def add_peak_memory(metrics: Metrics) -> None:
    """Most GPU memory that PyTorch has held so far, in GiB."""
    if torch.cuda.is_available():
        metrics["memory/peak_gb"].append(torch.cuda.max_memory_reserved() / 2**30)
