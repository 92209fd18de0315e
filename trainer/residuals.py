"""Residuals of earlier updates, by role and label: what centres V and scales the weights. Torch only.

Lagged, so that neither depends on the action whose residual it enters: the expected gradient stays what it is.

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
        self._answers = [k for k, role in enumerate(kind.roles) if role in kind.answers]
        self._others = [k for k in range(self._turns) if k not in self._answers]
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

    def balance(self, labels_BK: torch.Tensor) -> torch.Tensor:
        """1 / 2P(label) for turns that are not answers (PAG's verifications), at most `LARGEST_BALANCE`, and 1 for the others,
        shape (B, K)."""
        balance_BK = torch.ones(labels_BK.shape)
        for k in self._others:
            count_Z = self.moments[0, k]
            if count_Z.sum() > 0:
                weight_Z = (count_Z.sum() / (2 * count_Z).clamp(min=1e-12)).clamp(max=LARGEST_BALANCE).float()
                balance_BK[:, k] = weight_Z[labels_BK[:, k].long().cpu()]
        return balance_BK

    def weights(self, centred: bool) -> torch.Tensor:
        """1 / spread of each turn's residuals, shape (K,). The answers share one spread, every other turn has its own."""
        groups = [self._answers, *([k] for k in self._others)]
        spreads = {k: self.spread(group, centred) for group in groups for k in group}
        return torch.tensor([1 / spreads[k] for k in range(self._turns)])


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
