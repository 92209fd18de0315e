"""Rewards of the turns of a PAG episode, and the closed forms of their values. Torch only.

Suffixes name the dimensions: B episodes, K = 3 turns (attempt, verify, revise).
"""

import math
from collections.abc import Sequence

import torch

from .verdict import Verdict


def turn_rewards(
    first_right: bool, verdict: Verdict, second_right: bool | None, alpha: float
) -> tuple[float, float, float | None]:
    """Rewards of attempt, verifier and revision (arXiv 2506.10406, section 3).

    R₁ = acc(y₁), R_v = 1 where the verdict is true of y₁ (no verdict is never), R₂ = acc(y₂) + α (acc(y₂) − acc(y₁)).

    Args:
        first_right (`bool`):
            Whether the attempt is right.
        verdict ([`Verdict`]):
            What the verifier said.
        second_right (`bool`, *optional*):
            Whether the revision is right; None where there is none.
        alpha (`float`):
            Weight of the change, at least 0.
    """
    says_right = verdict is Verdict.CORRECT
    verified = verdict is not Verdict.NONE and says_right == first_right
    second = None if second_right is None else second_right + alpha * (second_right - first_right)
    return float(first_right), float(verified), second


def binary_value(success: torch.Tensor, beta1: float) -> torch.Tensor:
    """V* of a turn that earns 1 with probability p under the reference and else 0: β₁ ln(1 + p (e^{1/β₁} − 1)).

    Args:
        success (`torch.Tensor`):
            p, in [0, 1].
        beta1 (`float`):
            Temperature, > 0.
    """
    return _soft_maximum(success.double(), 1.0, beta1)


def revision_value(success: torch.Tensor, first_right: torch.Tensor, alpha: float, beta1: float) -> torch.Tensor:
    """V* of the revision: −α z + β₁ ln(1 + p₂ (e^{(1+α)/β₁} − 1)), z = acc(y₁) being part of the state.

    Args:
        success (`torch.Tensor`):
            p₂, the reference's chance that its revision is right.
        first_right (`torch.Tensor`):
            z, 1 where the attempt was right.
        alpha (`float`):
            Weight of the change.
        beta1 (`float`):
            Temperature, > 0.
    """
    return _soft_maximum(success.double(), 1 + alpha, beta1) - alpha * first_right.double()


def _soft_maximum(success: torch.Tensor, reward: float, beta1: float) -> torch.Tensor:
    """β₁ ln(1 − p + p e^{R/β₁}), without overflow at small β₁."""
    if not beta1 > 0:
        raise ValueError(f"beta1 must be positive, got {beta1}.")
    fails, succeeds = (1 - success).log(), success.log() + reward / beta1
    return beta1 * torch.logaddexp(fails, succeeds)


def check_alpha(alpha: float) -> None:
    """Raise a `ValueError` unless α is finite and at least 0."""
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be 0 or more, got {alpha}: it weighs acc2 − acc1 in the revision's reward.")


def refuse_partial(rewards: Sequence[float | None]) -> None:
    """Raise a `ValueError` unless every answer's reward is 0, 1, or without signal (None or NaN)."""
    partial = [reward for reward in rewards if reward not in (None, 0.0, 1.0) and reward == reward]
    if partial:
        raise ValueError(
            f"An answer of an episode earned {partial[0]}. In PAG episodes an answer is right (1), wrong (0) or without signal "
            "(None): the verifier's reward is whether its verdict is true. Use one such reward function with weight 1, or "
            "--episode single (episode=single)."
        )
