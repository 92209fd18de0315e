"""What centres V and scales the weights of turns, by role and label. Torch only.

Residuals are those of earlier updates, so that neither centre nor spread depends on the action whose residual it enters: the
expected gradient stays what it is. Labels are those of the present update: whether an attempt is right belongs to the state of
its verifier and not to what the verifier does, so counting them is as unbiased, and an old count would be of another policy.

Suffixes name the dimensions: B episodes, K turns, Z = 2 labels (whether the first turn succeeded; 0 for the first turn itself).
"""

from collections.abc import Sequence

import torch

from ..rollout.episode import EpisodeKind

DECAY = 0.9
"""What is left of an update's weight in the next one."""
SPREAD_FLOOR = 0.05
LARGEST_BALANCE = 5.0


class LaggedResiduals:
    """Decaying moments of R − β2·ℓ − V.

    Args:
        kind ([`EpisodeKind`]):
            Its turns, and which of them are answers.
        moments (`torch.Tensor`, *optional*):
            Counts, sums and sums of squares, shape (3, K, Z), float64; zeros when not given.
    """

    def __init__(self, kind: EpisodeKind, moments: torch.Tensor | None = None):
        self._turns = len(kind.roles)
        self._others = judged_roles(kind)
        self._answers = [k for k in range(self._turns) if k not in self._others]
        self.moments = torch.zeros(3, self._turns, 2, dtype=torch.float64) if moments is None else moments.double()

    def add(self, moments: torch.Tensor) -> None:
        """Take in an update's moments, from [`residual_moments`], summed over its micro-batches and processes."""
        self.moments = DECAY * self.moments + moments.double().cpu()

    def centre(self, labels_BK: torch.Tensor) -> torch.Tensor:
        """The mean residual of each turn's role and label, shape (B, K); 0 where there was none yet."""
        count_KZ, sum_KZ, _ = self.moments
        mean_KZ = torch.where(count_KZ > 0, sum_KZ / count_KZ.clamp(min=1e-12), 0.0).to(labels_BK.device)
        return torch.stack([mean_KZ[k][labels_BK[:, k].long()] for k in range(self._turns)], dim=1).float()

    def spread(self, roles: Sequence[int], centred: bool) -> float:
        """Standard deviation of the residuals of some roles; 1 before there were any.

        Args:
            roles (`Sequence[int]`):
                Their columns.
            centred (`bool`):
                Whether V was centred, so that only what varies within a role and label is left.
        """
        count_KZ, sum_KZ, square_KZ = self.moments[:, list(roles)]
        if count_KZ.sum() <= 1:
            return 1.0
        per_cell = (sum_KZ**2 / count_KZ.clamp(min=1e-12)).sum()
        explained = per_cell if centred else sum_KZ.sum() ** 2 / count_KZ.sum()
        variance = (square_KZ.sum() - explained) / count_KZ.sum()
        return max(SPREAD_FLOOR, float(variance.clamp(min=0.0).sqrt()))

    def weights(self, centred: bool) -> torch.Tensor:
        """1 / spread of each turn's residuals, shape (K,). The answers share one spread, every other turn has its own."""
        groups = [self._answers, *([k] for k in self._others)]
        spreads = {k: self.spread(group, centred) for group in groups for k in group}
        return torch.tensor([1 / spreads[k] for k in range(self._turns)])


def judged_roles(kind: EpisodeKind) -> list[int]:
    """Columns of the turns that are not answers, and so judge one (PAG's verifications)."""
    return [k for k, role in enumerate(kind.roles) if role not in kind.answers]


def label_counts(labels_BK: torch.Tensor, present_BK: torch.Tensor) -> torch.Tensor:
    """How many turns that count have each label, shape (K, Z)."""
    return torch.stack([(present_BK & (labels_BK == z)).sum(0) for z in (0, 1)], dim=1)


def balanced(kind: EpisodeKind, labels_BK: torch.Tensor, counts_KZ: torch.Tensor) -> torch.Tensor:
    """Weights with which verifications of right and of wrong attempts count alike: n / 2n_z for turns that are not answers, at
    most `LARGEST_BALANCE`, and 1 for the others.

    Args:
        kind ([`EpisodeKind`]):
            Says which turns are answers.
        labels_BK (`torch.Tensor`):
            0 or 1.
        counts_KZ (`torch.Tensor`):
            From [`label_counts`], of the whole update over all processes.

    Returns:
        `torch.Tensor`: Shape (B, K).
    """
    weights_BK = torch.ones(labels_BK.shape)
    for k in judged_roles(kind):
        count_Z = counts_KZ[k].double()
        weight_Z = (count_Z.sum() / (2 * count_Z).clamp(min=1e-12)).clamp(max=LARGEST_BALANCE).float()
        weights_BK[:, k] = weight_Z[labels_BK[:, k].long().cpu()]
    return weights_BK


def residual_moments(residual_BK: torch.Tensor, labels_BK: torch.Tensor, present_BK: torch.Tensor) -> torch.Tensor:
    """Counts, sums and sums of squares by role and label.

    Args:
        residual_BK (`torch.Tensor`):
            R − β2·ℓ − V, with V before it was centred.
        labels_BK (`torch.Tensor`):
            0 or 1.
        present_BK (`torch.Tensor`):
            Whether the turn counts.

    Returns:
        `torch.Tensor`: float64, shape (3, K, Z).
    """
    x_BK = residual_BK.double()
    rows = []
    for power in range(3):
        total_BK = torch.where(present_BK, x_BK**power, 0.0)  # no product: 0 times NaN is NaN
        rows.append(torch.stack([torch.where(labels_BK == z, total_BK, 0.0).sum(0) for z in (0, 1)], dim=1))
    return torch.stack(rows)
