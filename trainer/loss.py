"""The A*-PO loss (arXiv 2505.20686, stage 2). Torch only.

Suffixes name the dimensions: B completions, T tokens.
"""

import torch


def sequence_log_ratio(logps_BT: torch.Tensor, ref_logps_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """ℓ = Σ_t log π(y_t) − log π_ref(y_t), summed (not averaged) over a completion's tokens, EOS included.

    Args:
        logps_BT (`torch.Tensor`):
            Log-probs of the policy, shape (B, T).
        ref_logps_BT (`torch.Tensor`):
            Log-probs of the frozen reference, shape (B, T).
        mask_BT (`torch.Tensor`):
            1 on tokens that the policy generated, 0 on padding and on text it did not write.

    Returns:
        `torch.Tensor`: ℓ of shape (B,), in nats.
    """
    return torch.where(mask_BT.bool(), logps_BT - ref_logps_BT, 0.0).sum(-1)


def astarpo_loss(
    log_ratio_B: torch.Tensor,
    values_B: torch.Tensor,
    rewards_B: torch.Tensor,
    weights_B: torch.Tensor,
    beta2: float,
) -> torch.Tensor:
    """(β2·ℓ + V* − r)² per completion, divided by 2·β2.

    Divided, because the gradient of the bare square carries the factor 2·β2 = 0.002: it would be 500 times smaller
    than the policy gradient it equals on-policy, no gradient clipping would ever act, and Adam's epsilon would.

    Args:
        log_ratio_B (`torch.Tensor`):
            ℓ from [`sequence_log_ratio`], shape (B,).
        values_B (`torch.Tensor`):
            V* of each completion's prompt, shape (B,).
        rewards_B (`torch.Tensor`):
            Rewards, shape (B,).
        weights_B (`torch.Tensor`):
            1, or 0 for a completion without signal. (A residual of 0 is no such thing: it pulls to the reference.)
        beta2 (`float`):
            KL temperature, > 0.

    Returns:
        `torch.Tensor`: Losses of shape (B,); their mean over the completions with signal is the objective.
    """
    residual_B = beta2 * log_ratio_B + values_B - rewards_B
    return torch.where(weights_B > 0, weights_B * residual_B**2, 0.0) / (2 * beta2)
