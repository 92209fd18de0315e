"""What training itself shows of the policy's chances of success, so that V follows the policy instead of staying with the reference.

Two things are tracked. What the policy has learnt everywhere is one shift of the logits for each role and label: a random walk,
filtered after Kalman, of which the first value is known exactly (0, the policy being the reference). What it has learnt on one prompt is
that prompt's own successes and trials, old ones counting less (SPO, arXiv 2509.13232, has such counts). An update is valued by what
was known before it, so V does not depend on the completions that it values and the expected gradient stays what it is.

Suffixes name the dimensions: B episodes, K turns, Z = 2 labels (whether the first turn succeeded; 0 for the first turn itself).
"""

from typing import Any

import torch

DRIFT = 0.1
"""Variance by which the shift of a role and label may move in an update, in squared logits."""
DECAY = 0.85
"""What is left of a prompt's counts after each update."""
WORTH = 2.0
"""How many of a prompt's own trials its shifted chance is worth, however many reference samples it comes from: the policy moves every
prompt a little differently. (With `DRIFT` and `DECAY` chosen on one seed of benchmarks/values.py; docs/results.md.)"""
EDGE = 0.01
"""Chances are shifted as if they were at least so far from 0 and 1, where no shift would move them."""


class Tracker:
    """A common shift of the logits, and counts by prompt.

    Args:
        turns (`int`):
            K.
    """

    def __init__(self, turns: int):
        self.shift_KZ = torch.zeros(turns, 2, dtype=torch.float64)
        self._variance_KZ = torch.zeros(turns, 2, dtype=torch.float64)
        # By prompt: successes, trials, and the update that they are of.
        self._counts: dict[int, tuple[float, float, int]] = {}
        self._updates = 0

    def shifted(self, chance_BK: torch.Tensor, label_BK: torch.Tensor) -> torch.Tensor:
        """The reference's chances, moved by what the policy has learnt everywhere; shape (B, K), NaN where they are."""
        columns = torch.arange(chance_BK.shape[1])
        return (chance_BK.clamp(EDGE, 1 - EDGE).logit() + self.shift_KZ[columns, label_BK.long()]).sigmoid()

    def joined(self, chance_B: torch.Tensor, prompts: list[int]) -> torch.Tensor:
        """Shifted chances of first turns with what their prompts showed in training.

        Args:
            chance_B (`torch.Tensor`):
                From [`Tracker.shifted`], shape (B,).
            prompts (`list[int]`):
                Keys of the prompts.
        """
        seen_B2 = torch.tensor([self._seen(prompt) for prompt in prompts], dtype=torch.float64)
        successes_B, more_B = seen_B2[:, 0], seen_B2[:, 1]
        return (successes_B + WORTH * chance_B) / (more_B + WORTH)

    def _seen(self, prompt: int) -> tuple[float, float]:
        successes, trials, when = self._counts.get(prompt, (0.0, 0.0, self._updates))
        left = DECAY ** (self._updates - when)
        return successes * left, trials * left

    def add(
        self,
        prompts: list[int],
        shifted_BK: torch.Tensor,
        label_BK: torch.Tensor,
        success_BK: torch.Tensor,
        present_BK: torch.Tensor,
    ) -> None:
        """Take in an update, once its values were used.

        Args:
            prompts (`list[int]`):
                Keys of the prompts, one an episode.
            shifted_BK (`torch.Tensor`):
                The chances that [`Tracker.shifted`] gave.
            label_BK (`torch.Tensor`):
                Labels.
            success_BK (`torch.Tensor`):
                Whether each turn succeeded, 0 or 1.
            present_BK (`torch.Tensor`):
                Whether the turn is there and has a signal.
        """
        self._updates += 1
        chance_BK, success_BK = shifted_BK.double(), success_BK.double()
        for z in (0, 1):
            here_BK = present_BK & (label_BK == z)
            information_K = torch.where(here_BK, chance_BK * (1 - chance_BK), 0.0).sum(0)
            surprise_K = torch.where(here_BK, success_BK - chance_BK, 0.0).sum(0)
            before_K = self._variance_KZ[:, z] + DRIFT
            variance_K = before_K / (1 + before_K * information_K)
            self.shift_KZ[:, z] += variance_K * surprise_K
            self._variance_KZ[:, z] = variance_K
        for row, prompt in enumerate(prompts):
            if present_BK[row, 0]:
                successes, trials = self._seen(prompt)
                self._counts[prompt] = successes + float(success_BK[row, 0]), trials + 1.0, self._updates

    def to_json(self) -> dict[str, Any]:
        """The tracker as plain data."""
        counts = [[prompt, *entry] for prompt, entry in self._counts.items()]
        state = {"shift": self.shift_KZ.tolist(), "variance": self._variance_KZ.tolist(), "updates": self._updates}
        return {**state, "counts": counts}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tracker":
        """A tracker from what `to_json` gave."""
        tracker = cls(len(content["shift"]))
        tracker.shift_KZ = torch.tensor(content["shift"], dtype=torch.float64)
        tracker._variance_KZ = torch.tensor(content["variance"], dtype=torch.float64)
        tracker._counts = {prompt: (successes, trials, when) for prompt, successes, trials, when in content["counts"]}
        tracker._updates = content["updates"]
        return tracker
