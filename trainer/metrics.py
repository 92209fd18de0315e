"""What an update logs; docs/metrics.md says what each metric means.

Means over completions or tokens are kept as totals until they are logged (and in checkpoints with them), so that they depend
neither on how a batch was divided into micro-batches nor on where a run was interrupted.

Suffixes name the dimensions: G rows of all processes, F reward functions, B episodes, T tokens, K turns.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object, reduce

from ..rollout.episode import Episode, EpisodeKind, TurnGrade
from ..rollout.rewards import Rewards
from .loss import turn_log_ratios
from .residuals import judged_roles
from .targets import Targets

Metrics = dict[str, list[float]]

TOTALS = (
    *("tokens", "entropy", "log_ratio", "weight", "residual", "square"),
    *("solved", "solved_residual", "solved_target", "unsolved_residual", "unsolved_target"),
    *("turns", "mismatch", "mismatch_square", "ratio", "ratio_square", "gap", "k3"),
)
PREFIX = "total/"
TRAINING_TOKENS, TRAINING_SECONDS = PREFIX + "training_tokens", PREFIX + "training_seconds"
REWARDS = PREFIX + "rewards"
"""Rewards one by one: the interval of an evaluation is computed once all are there."""


def loss_totals(
    log_ratio_BK: torch.Tensor,
    logps_BT: torch.Tensor,
    entropies_BT: torch.Tensor,
    inputs: dict[str, Any],
    beta2: float,
) -> torch.Tensor:
    """Totals of a pass in the order of `TOTALS`, a tensor of shape (18,).

    Args:
        log_ratio_BK (`torch.Tensor`):
            ℓ = Σ_t ln π/π_ref of each turn, shape (B, K).
        logps_BT (`torch.Tensor`):
            Log-probs of the policy, shape (B, T).
        entropies_BT (`torch.Tensor`):
            Entropy of the policy at each token in nats, shape (B, T).
        inputs (`dict[str, Any]`):
            The batch: `turn_ids` and `sampling_logps` of shape (B, T), `values`, `rewards` and `weights`, each of shape (B, K).
        beta2 (`float`):
            KL temperature.
    """
    written_BT = inputs["turn_ids"] > 0
    counted_BK = (inputs["weights"] > 0).float()
    solved_BK = counted_BK * (inputs["rewards"] > 0)
    unsolved_BK = counted_BK - solved_BK
    target_BK = inputs["rewards"] - inputs["values"]
    residual_BK = beta2 * log_ratio_BK - target_BK
    # Over the tokens of an earlier policy the mean of ln π_lag/π is what estimates a KL: that of the present policy from it.
    kl_BK = -log_ratio_BK if "has_mismatch" in inputs else log_ratio_BK
    parts = [
        *(written_BT, entropies_BT * written_BT, kl_BK),
        *(counted_BK, residual_BK * counted_BK, residual_BK**2 * counted_BK),
        *(
            solved_BK,
            residual_BK * solved_BK,
            target_BK * solved_BK,
            residual_BK * unsolved_BK,
            target_BK * unsolved_BK,
        ),
        *_mismatch_parts(logps_BT, inputs),
    ]
    return torch.stack([part.float().sum() for part in parts])


def _mismatch_parts(logps_BT: torch.Tensor, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """How far the engine's probabilities are from the trainer's, by turn and by token.

    Stored completions (they have `has_mismatch`) are compared under the policy that sampled them, where both probabilities are known.
    """
    turn_ids_BT, turns = inputs["turn_ids"], inputs["values"].shape[1]
    if "has_mismatch" in inputs:
        logps_BT = inputs["ref_logps"]
        turn_ids_BT = turn_ids_BT * inputs["has_mismatch"][:, None]
    log_mismatch_BK = turn_log_ratios(logps_BT, inputs["sampling_logps"], turn_ids_BT, turns)
    is_there_BK = torch.stack([(turn_ids_BT == k).any(1) for k in range(1, turns + 1)], dim=1)
    ratio_BK = torch.where(is_there_BK, log_mismatch_BK.exp(), 0.0)
    delta_BT = torch.where(turn_ids_BT > 0, logps_BT - inputs["sampling_logps"], 0.0)
    return [
        *(is_there_BK, log_mismatch_BK, log_mismatch_BK**2, ratio_BK, ratio_BK**2),
        *(delta_BT.abs(), delta_BT.exp() - 1 - delta_BT),
    ]


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
        self.scored: list[tuple[dict[str, Any], torch.Tensor]] = []
        """The batch of each pass, and the policy's log-probs of it: what the probe looks at."""
        self.parts: list[dict[str, torch.Tensor]] = []
        """Residuals and labels of the turns, and what tracker or critic learn from."""

    def add(
        self,
        log_ratio_BK: torch.Tensor,
        logps_BT: torch.Tensor,
        entropies_BT: torch.Tensor,
        inputs: dict[str, Any],
        beta2: float,
    ) -> None:
        """Take in a pass."""
        self.totals = self.totals + loss_totals(log_ratio_BK, logps_BT, entropies_BT, inputs, beta2).cpu()
        self.scored.append(({n: value for n, value in inputs.items() if isinstance(value, torch.Tensor)}, logps_BT))
        before_BK = inputs["values"] - inputs["centres"]
        names = ("labels", "success", "prompt", "shifted", "chance", "hidden")
        part = {name: inputs[name].cpu() for name in names if name in inputs}
        # An update whose numbers are broken is left out; what it would leave behind here would stay.
        part["present"] = (inputs["present"] & log_ratio_BK.isfinite()).cpu()
        part["target"] = (inputs["rewards"] - beta2 * log_ratio_BK).cpu()
        part["residual"] = part["target"] - before_BK.cpu()
        part["log_ratio"] = log_ratio_BK.cpu()
        self.parts.append(part)

    def extend(self, passes: "PassTotals", loss: float) -> None:
        """Take in the passes of a micro-batch."""
        self.loss += loss
        self.totals = self.totals + passes.totals
        self.parts += passes.parts
        self.scored += passes.scored

    def kl(self) -> float:
        """ln π/π_ref in nats per token, over this process's tokens."""
        sums = dict(zip(TOTALS, self.totals.tolist(), strict=True))
        return sums["log_ratio"] / max(1.0, sums["tokens"])


def add_totals(metrics: Metrics, totals: Sequence[float]) -> None:
    """Keep a micro-batch's totals, summed over processes."""
    for name, total in zip(TOTALS, totals, strict=True):
        metrics[PREFIX + name].append(total)


def finish_metrics(metrics: Metrics, eval_samples: int | None) -> dict[str, float | None]:
    """The means since the last log; None where a metric was never a number.

    Args:
        metrics (`Metrics`):
            Values since the last log, and totals.
        eval_samples (`int`, *optional*):
            Completions per prompt of an evaluation; None in training.
    """
    if TRAINING_TOKENS in metrics:
        tokens, seconds = sum(metrics.pop(TRAINING_TOKENS)), sum(metrics.pop(TRAINING_SECONDS))
        metrics["training/tokens_per_second"] = [tokens / max(1e-9, seconds)]
    rewards = metrics.pop(REWARDS, [])
    if eval_samples is not None:
        _add_interval(metrics, rewards, eval_samples)
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
    if sums["turns"]:
        metrics["engine/logp_gap"] = [_mean(sums["gap"], sums["tokens"])]
        metrics["mismatch/k3"] = [_mean(sums["k3"], sums["tokens"])]
        mean = sums["mismatch"] / sums["turns"]
        metrics["mismatch/spread"] = [math.sqrt(max(0.0, sums["mismatch_square"] / sums["turns"] - mean**2))]
        metrics["mismatch/effective_share"] = [sums["ratio"] ** 2 / max(1e-12, sums["ratio_square"]) / sums["turns"]]
    metrics["residual/mean"] = [_mean(sums["residual"], sums["weight"])]
    metrics["residual/mean_square"] = [_mean(sums["square"], sums["weight"])]
    for name, count in (("solved", sums["solved"]), ("unsolved", unsolved)):
        if count > 0:
            metrics[f"residual/{name}"] = [sums[f"{name}_residual"] / count]
            metrics[f"target/{name}"] = [sums[f"{name}_target"] / count]


def _mean(total: float, count: float) -> float:
    return total / max(1.0, count)


def gather_objects(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of their ranks."""
    return gather_object(items) if PartialState().num_processes > 1 else items


def gather_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors with the rows of all processes, on the CPU; every process has the same number of rows."""
    if PartialState().num_processes == 1:
        return [tensor.cpu() for tensor in tensors]
    return [gather(tensor.to(PartialState().device)).cpu() for tensor in tensors]  # pyright: ignore


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over processes."""
    return reduce(tensor, "sum") if PartialState().num_processes > 1 else tensor  # pyright: ignore


def add_batch(
    metrics: Metrics,
    kind: EpisodeKind,
    rows: Sequence[dict[str, Any]],
    episodes: Sequence[Episode],
    grades: Sequence[Sequence[TurnGrade]],
    rewards: Rewards,
    names: Sequence[str],
    target: Targets,
) -> dict[str, list[Any]]:
    """Log what was sampled and what it earned, over all processes.

    Rewards, and what reward functions logged for each answer, are those of the answers that stand in the end.

    Args:
        metrics (`Metrics`):
            Where the metrics go.
        kind ([`EpisodeKind`]):
            What an episode is.
        rows (`Sequence[dict[str, Any]]`):
            Rows of the data set.
        episodes (`Sequence[Episode]`):
            One for each row.
        grades (`Sequence[Sequence[TurnGrade]]`):
            One a role for each episode.
        rewards ([`Rewards`]):
            Of all answers, in the order of the episodes.
        names (`Sequence[str]`):
            Names of the reward functions.
        target ([`Targets`]):
            What the loss reads.

    Returns:
        `dict[str, list[Any]]`: The completions of all processes as columns, for people to read.
    """
    answers = [[turn for turn in episode.turns if turn.role in kind.answers] for episode in episodes]
    last = [end - 1 for end in itertools.accumulate(map(len, answers))]
    values_G, advantages_G, has_signal_G, final_GF, final_G = gather_rows(
        target.v_star, target.advantages, target.has_signal, rewards.per_function_NF[last], rewards.weighted_N[last]
    )
    _add_scores(metrics, values_G, advantages_G, has_signal_G)
    _add_rewards(metrics, names, final_GF, final_G)
    metrics[REWARDS] += final_G.tolist()
    # Sorted, because all processes must ask for the same names in the same order.
    for name in sorted(set(gather_objects(list(rewards.metrics)))):
        logged = gather_objects(rewards.metrics.get(name, []))
        metrics[name].append(fmean(logged))
    written = [sum(len(turn.completion.token_ids) for turn in episode.turns) for episode in episodes]
    truncated = [episode.turns[-1].is_truncated for episode in episodes]
    tokens = [len(episode.prompt) + count for episode, count in zip(episodes, written, strict=True)]
    metrics["num_tokens"] = [float(sum(gather_objects(tokens)))]
    _add_lengths(metrics, gather_objects(written), gather_objects(truncated))
    if len(kind.roles) > 1:
        _add_roles(metrics, kind, gather_objects(list(grades)))
        _add_label_mass(metrics, kind, target)
    is_chat = isinstance(rows[0]["prompt"], list)
    extra = {name: [values[place] for place in last] for name, values in rewards.extra.items()}
    common = set.intersection(*gather_objects([set(extra)]))
    return {
        "prompt": gather_objects([row["prompt"] for row in rows]),
        "completion": gather_objects([_readable(episode, kind, is_chat) for episode in episodes]),
        **{name: final_GF[:, number].tolist() for number, name in enumerate(names)},
        **{name: gather_objects(extra[name]) for name in sorted(common)},
        "v_star": values_G.tolist(),
        "advantage": advantages_G.tolist(),
    }


def _readable(episode: Episode, kind: EpisodeKind, is_chat: bool) -> str | list[dict[str, str]]:
    """An episode as people and trackers read completions: a text, or messages, the follow-up prompts among them."""
    messages = []
    for turn in episode.turns:
        if turn.number > 1:
            messages.append({"role": "user", "content": kind.follow_ups[turn.role]})
        messages.append({"role": "assistant", "content": turn.text})
    return messages if is_chat else "\n\n".join(message["content"] for message in messages)


def _add_scores(
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


def _add_rewards(metrics: Metrics, names: Sequence[str], rewards_GF: torch.Tensor, weighted_G: torch.Tensor) -> None:
    """Rewards by function and in all, as TRL logs them; NaN is no signal."""
    for number, name in enumerate(names):
        metrics[f"rewards/{name}/mean"].append(rewards_GF[:, number].nanmean().item())
        metrics[f"rewards/{name}/std"].append(_nanstd(rewards_GF[:, number]))
    metrics["reward"].append(weighted_G.nanmean().item())
    metrics["reward_std"].append(_nanstd(weighted_G))


def _nanstd(values_G: torch.Tensor) -> float:
    known_G = values_G[~values_G.isnan()]
    return known_G.std().item() if len(known_G) > 1 else math.nan


def _add_lengths(metrics: Metrics, written: Sequence[int], truncated: Sequence[bool]) -> None:
    """Lengths of completions as TRL logs them: tokens that the model wrote, and whether the last turn was truncated."""
    ended = [tokens for tokens, is_truncated in zip(written, truncated, strict=True) if not is_truncated] or [0]
    for name, lengths in (("", written), ("_terminated", ended)):
        metrics[f"completions/mean{name}_length"].append(fmean(lengths))
        metrics[f"completions/min{name}_length"].append(float(min(lengths)))
        metrics[f"completions/max{name}_length"].append(float(max(lengths)))
    metrics["completions/clipped_ratio"].append(fmean(truncated))


def _add_roles(metrics: Metrics, kind: EpisodeKind, grades: Sequence[Sequence[TurnGrade]]) -> None:
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
            kind.reward(role, reward, int(number > 0 and first > 0))
            for first, reward in ((row[0].reward, row[number].reward) for row in grades)
            if first is not None and reward is not None
        ]
        if rewards:
            metrics[f"{role}/reward"].append(fmean(rewards))
    for name, value in kind.metrics(grades).items():
        if value is not None:
            metrics[name].append(value)


def over_reference_of(rows: Sequence[dict[str, Any]], target: Targets) -> float | None:
    """How much more the first turns of all processes earned than the reference's samples of the same prompts, on average; None
    where a prompt's samples or signals are nowhere known."""
    differences_B = torch.full((len(rows),), math.nan)
    for number, row in enumerate(rows):
        known = [reward for reward in row.get("reference_rewards") or () if reward is not None]
        if known and target.present[number, 0]:
            differences_B[number] = target.success[number, 0] - fmean(known)
    differences_G = gather_rows(differences_B)[0]
    return None if differences_G.isnan().all() else differences_G.nanmean().item()


def _add_label_mass(metrics: Metrics, kind: EpisodeKind, target: Targets) -> None:
    """Sum of the weights of turns that judge a right and a wrong attempt, over all processes: what balancing makes equal."""
    for k in judged_roles(kind):
        masses = [(target.weights[:, k] * (target.labels[:, k] == z)).sum() for z in (0, 1)]
        wrong, right = gather_rows(torch.stack(masses)[None])[0].sum(0).tolist()
        metrics[f"{kind.roles[k]}/mass_right"].append(right)
        metrics[f"{kind.roles[k]}/mass_wrong"].append(wrong)


def add_residuals(metrics: Metrics, roles: Sequence[str], moments: torch.Tensor) -> None:
    """Mean residual β2·ℓ + V − R of each role in an update, with V before it was centred; `moments` of shape (3, K, Z)."""
    for number, role in enumerate(roles):
        count, total = moments[0, number].sum().item(), moments[1, number].sum().item()
        if count:
            metrics[f"residual/{role}"].append(-total / count)


def add_tracking(metrics: Metrics, kind: EpisodeKind, shift_KZ: torch.Tensor, joined: dict[str, torch.Tensor]) -> None:
    """How far the policy's chances have moved from the reference's, in logits, and how good the chances were that V came from.

    Args:
        metrics (`Metrics`):
            Where the metrics go.
        kind ([`EpisodeKind`]):
            Names the roles.
        shift_KZ (`torch.Tensor`):
            The tracker's shifts.
        joined (`dict[str, torch.Tensor]`):
            The update's `chance`, `success` and `present` of all processes, shape (G, K).
    """
    for k, role in enumerate(kind.roles):
        if k == 0:
            metrics["value/shift"].append(shift_KZ[0, 0].item())
        else:
            metrics[f"value/shift_{role}_wrong"].append(shift_KZ[k, 0].item())
            metrics[f"value/shift_{role}_right"].append(shift_KZ[k, 1].item())
    present_GK = joined["present"]
    if present_GK.any():
        errors_GK = (joined["chance"] - joined["success"]) ** 2
        metrics["value/brier"].append(errors_GK[present_GK].mean().item())


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
    """Most GPU memory that PyTorch has held so far, in GB (10⁹ bytes)."""
    if torch.cuda.is_available():
        metrics["memory/peak_gb"].append(torch.cuda.max_memory_reserved() / 1e9)
