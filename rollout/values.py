"""V*, the optimal value of a prompt, from the rewards of reference samples. Torch only."""

import math

import torch


def optimal_values(rewards: torch.Tensor, beta1: float) -> torch.Tensor:
    r"""Estimate V*(x) = β1 ln( 1/N Σ_i exp(r_i / β1) ) from N reference samples (arXiv 2505.20686, stage 1).

    Args:
        rewards (`torch.Tensor`):
            Rewards of shape (P, N): N reference samples for each of P prompts. NaN marks a sample without signal (its
            gold answer or its grading failed); it is left out of its prompt's mean.
        beta1 (`float`):
            Temperature of the soft maximum, > 0. Infinity gives the mean reward, values near 0 the maximum.

    Returns:
        `torch.Tensor`: float64 values of shape (P,), NaN where a prompt has no sample with signal.
    """
    if not beta1 > 0:
        raise ValueError(f"beta1 must be positive, got {beta1}; use infinity for the mean reward.")
    rewards = rewards.double()
    if math.isinf(beta1):
        return rewards.nanmean(-1)
    scored = ~rewards.isnan()
    exponents = torch.where(scored, rewards / beta1, -math.inf)
    counts = scored.sum(-1)
    values = beta1 * (torch.logsumexp(exponents, dim=-1) - counts.double().log())
    return torch.where(counts > 0, values, math.nan)


def two_point_value(chance_S: torch.Tensor, low: float, high: float, beta1: float) -> torch.Tensor:
    r"""V* of a state whose turn earns `high` with chance p and else `low`: β1 ln((1 − p) e^{low/β1} + p e^{high/β1}).

    For low = 0 and high = 1 this is what [`optimal_values`] gives for p·N successes in N samples, for any p.

    Args:
        chance_S (`torch.Tensor`):
            p in [0, 1], shape (S,).
        low (`float`):
            Reward of a failure.
        high (`float`):
            Reward of a success.
        beta1 (`float`):
            Temperature, > 0; infinity for the mean reward.

    Returns:
        `torch.Tensor`: float64 values of shape (S,).
    """
    if not beta1 > 0:
        raise ValueError(f"beta1 must be positive, got {beta1}.")
    chance_S = chance_S.double()
    if math.isinf(beta1):
        return low + chance_S * (high - low)
    # Relative to `low`, in logarithms: e^{high/β1} overflows at small β1.
    return low + beta1 * torch.logaddexp((1 - chance_S).log(), chance_S.log() + (high - low) / beta1)
