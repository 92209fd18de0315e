"""What the loss reads of a batch of episodes: their tokens, and the rewards, values and weights of their turns.

Suffixes name the dimensions: B episodes of this process, P prompt tokens, T tokens after the prompt, K turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..rollout.episode import Episode, EpisodeKind, TurnGrade
from ..rollout.rewards import Rewards


@dataclass(frozen=True, slots=True)
class Targets:
    """What the loss reads, and what is logged of it. All tensors are on the CPU.

    Attributes:
        rewards (`torch.Tensor`):
            What each turn earned, shape (B, K); 0 where it does not count.
        values (`torch.Tensor`):
            V of the state in which each turn begins, centred where that was asked for, shape (B, K).
        weights (`torch.Tensor`):
            Weights in the loss, shape (B, K); 0 where a turn does not count.
        present (`torch.Tensor`):
            Whether a turn is there and has a signal, shape (B, K).
        labels (`torch.Tensor`):
            Whether the first turn succeeded, shape (B, K); 0 in the first column.
        success (`torch.Tensor`):
            The grades that the rewards come from, shape (B, K).
        centres (`torch.Tensor`):
            What centring added to V, shape (B, K).
        v_star (`torch.Tensor`):
            V* of the prompts before centring, shape (B,); NaN where it is not known.
    """

    rewards: torch.Tensor
    values: torch.Tensor
    weights: torch.Tensor
    present: torch.Tensor
    labels: torch.Tensor
    success: torch.Tensor
    centres: torch.Tensor
    v_star: torch.Tensor

    @property
    def advantages(self) -> torch.Tensor:
        """Σ_k (R_k − V_k) over the turns that count, shape (B,)."""
        return torch.where(self.present, self.rewards - self.values, 0.0).sum(1)

    @property
    def has_signal(self) -> torch.Tensor:
        """Whether any turn of an episode counts, shape (B,)."""
        return self.present.any(1)


@dataclass(frozen=True, slots=True)
class GradedEpisodes:
    """The episodes of a batch and what they earned, however they came about.

    Attributes:
        rows (`list[dict[str, Any]]`):
            Rows of the data set.
        episodes (`list[Episode]`):
            One for each row.
        rewards ([`Rewards`]):
            Of all answers, in the order of the episodes.
        grades (`list[tuple[TurnGrade, ...]]`):
            One a role for each episode.
        seconds (`float`):
            What sampling took; 0 for stored ones.
    """

    rows: list[dict[str, Any]]
    episodes: list[Episode]
    rewards: Rewards
    grades: list[tuple[TurnGrade, ...]]
    seconds: float


def successes(grades: Sequence[Sequence[TurnGrade]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The grades as numbers, and the labels that later turns are conditioned on.

    Args:
        grades (`Sequence[Sequence[TurnGrade]]`):
            For each episode one grade a role, from [`grade_turns`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Grades of shape (B, K), NaN for no signal; labels of shape (B, K), int64.
    """
    success_BK = torch.tensor(
        [[torch.nan if grade.reward is None else grade.reward for grade in row] for row in grades], dtype=torch.float32
    )
    label_BK = (success_BK[:, :1] > 0).long().repeat(1, success_BK.shape[1])
    label_BK[:, 0] = 0
    return success_BK, label_BK


def present_turns(success_BK: torch.Tensor, values_BK: torch.Tensor) -> torch.Tensor:
    """Which turns count: those that are there, have a signal and a value, in episodes whose first turn has a signal.

    Where nobody knows whether the first turn succeeded, nothing can be said of the later ones either. Weight 0 and not residual
    0: a residual of 0 would pull these turns towards the reference.

    Returns:
        `torch.Tensor`: bool, shape (B, K).
    """
    return ~success_BK.isnan() & ~success_BK[:, :1].isnan() & ~values_BK.isnan()


def targets(
    kind: EpisodeKind,
    success_BK: torch.Tensor,
    label_BK: torch.Tensor,
    values_BK: torch.Tensor,
    centres_BK: torch.Tensor,
    turn_weights_BK: torch.Tensor,
) -> Targets:
    """Put together what the loss reads.

    Args:
        kind ([`EpisodeKind`]):
            Says what each turn earns.
        success_BK, label_BK (`torch.Tensor`):
            From [`successes`].
        values_BK (`torch.Tensor`):
            V of each turn's state; NaN where it is not known.
        centres_BK (`torch.Tensor`):
            What to add to V (zeros for none).
        turn_weights_BK (`torch.Tensor`):
            λ_k w_k of the turns that count.
    """
    present_BK = present_turns(success_BK, values_BK)
    rewards_BK = torch.zeros_like(success_BK)
    for row, k in present_BK.nonzero().tolist():
        rewards_BK[row, k] = kind.reward(kind.roles[k], success_BK[row, k].item(), int(label_BK[row, k]))
    return Targets(
        rewards=rewards_BK,
        values=values_BK.nan_to_num(0.0) + centres_BK,
        weights=present_BK * turn_weights_BK,
        present=present_BK,
        labels=label_BK,
        success=success_BK.nan_to_num(0.0),
        centres=centres_BK,
        v_star=values_BK[:, 0],
    )


def collate(episodes: Sequence[Episode], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Episodes as padded tensors.

    Args:
        episodes (`Sequence[Episode]`):
            The episodes.
        pad_id (`int`):
            Token that fills up rows.
        device (`torch.device`):
            Where the tensors go.

    Returns:
        `dict[str, torch.Tensor]`: `prompt_ids` and `prompt_mask` of shape (B, P), padded left; `completion_ids`,
        `completion_mask`, `turn_ids` (k on the tokens of turn k, 0 on padding and on text that the policy did not write) and
        `sampling_logps` (the engine's log-probs) of shape (B, T), padded right.
    """
    prompts = [episode.prompt for episode in episodes]
    tokens = [episode.token_ids for episode in episodes]
    columns = {
        "prompt_ids": _padded(prompts, pad_id, left=True),
        "prompt_mask": _padded([[1] * len(ids) for ids in prompts], 0, left=True),
        "completion_ids": _padded(tokens, pad_id),
        "completion_mask": _padded([[1] * len(ids) for ids in tokens], 0),
        "turn_ids": _padded([episode.turn_ids for episode in episodes], 0),
        "sampling_logps": _padded([episode.logprobs or [0.0] * len(episode.token_ids) for episode in episodes], 0.0),
    }
    return {name: tensor.to(device) for name, tensor in columns.items()}


def _padded(rows: Sequence[Sequence[Any]], value: float, left: bool = False) -> torch.Tensor:
    longest = max(map(len, rows))
    pads = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if left else [*row, *pad] for pad, row in zip(pads, rows, strict=True)])


def split_rows(batch: dict[str, Any], rows: int | None) -> Iterator[dict[str, Any]]:
    """A batch in parts of at most `rows` rows; the batch itself where that is all of it."""
    count = len(batch["completion_ids"])
    if rows is None or rows >= count:
        yield batch
        return
    for start in range(0, count, rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}
