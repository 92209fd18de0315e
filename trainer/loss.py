"""The A*-PO loss (arXiv 2505.20686, stage 2). Torch only.

The loss of an episode of K turns is Σ_k λ_k w_k (β2·ℓ_k + V_k − R_k)²; a plain completion is the case K = 1.

Suffixes name the dimensions: B completions or episodes, T tokens, K turns.
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


def turn_log_ratios(
    logps_BT: torch.Tensor, ref_logps_BT: torch.Tensor, turn_ids_BT: torch.Tensor, turns: int
) -> torch.Tensor:
    """ℓ_k of each turn, from one forward pass of the whole episode.

    Args:
        logps_BT (`torch.Tensor`):
            Log-probs of the policy, shape (B, T).
        ref_logps_BT (`torch.Tensor`):
            Log-probs of the frozen reference, shape (B, T).
        turn_ids_BT (`torch.Tensor`):
            k on the tokens of turn k = 1 … K, 0 on padding and on text that the policy did not write. For a plain
            completion that is its mask.
        turns (`int`):
            K.

    Returns:
        `torch.Tensor`: ℓ of shape (B, K), 0 for a turn that an episode does not have.
    """
    of_turns = [sequence_log_ratio(logps_BT, ref_logps_BT, turn_ids_BT == turn) for turn in range(1, turns + 1)]
    return torch.stack(of_turns, dim=1)


LARGEST_RATIO = 3.0
"""Completions that the trainer holds this much likelier than the engine did are left out by `sequence_mis`, as in TRL."""


def mismatch_weights(log_mismatch_BK: torch.Tensor) -> torch.Tensor:
    """Importance weights of turns that the engine sampled from slightly other probabilities than the trainer computes.

    Sampling from μ instead of π biases the gradient: E_μ[(β2·ℓ + V − r) ∇ ln π] needs the ratio π/μ of the whole turn. Where it
    is above `LARGEST_RATIO` the turn is masked (sequence-level masked importance sampling, TRL's `sequence_mask`).

    Args:
        log_mismatch_BK (`torch.Tensor`):
            Σ_t ln π(y_t) − ln μ(y_t) of each turn, shape (B, K).

    Returns:
        `torch.Tensor`: Weights of shape (B, K), without gradient.
    """
    ratio_BK = log_mismatch_BK.detach().exp()
    return torch.where(ratio_BK <= LARGEST_RATIO, ratio_BK, 0.0)


def astarpo_loss(
    log_ratio_BK: torch.Tensor,
    values_BK: torch.Tensor,
    rewards_BK: torch.Tensor,
    weights_BK: torch.Tensor,
    beta2: float,
) -> torch.Tensor:
    """(β2·ℓ + V* − r)² per turn, divided by 2·β2. Works element by element, so any equal shapes will do.

    Divided, because the gradient of the bare square carries the factor 2·β2 = 0.002: it would be 500 times smaller
    than the policy gradient it equals on-policy, no gradient clipping would ever act, and Adam's epsilon would.

    Args:
        log_ratio_BK (`torch.Tensor`):
            ℓ from [`turn_log_ratios`], shape (B, K).
        values_BK (`torch.Tensor`):
            V* of the state in which each turn begins (of the prompt, for the first), shape (B, K).
        rewards_BK (`torch.Tensor`):
            Rewards, shape (B, K).
        weights_BK (`torch.Tensor`):
            λ_k w_k; 0 for a turn that is not there or has no signal. (A residual of 0 is no such thing: it pulls to the
            reference.)
        beta2 (`float`):
            KL temperature, > 0.

    Returns:
        `torch.Tensor`: Losses of shape (B, K); their sum over turns, averaged over the episodes with signal, is the objective.
    """
    residual_BK = beta2 * log_ratio_BK + values_BK - rewards_BK
    return torch.where(weights_BK > 0, weights_BK * residual_BK**2, 0.0) / (2 * beta2)
