"""The loss: its gradient is the policy gradient of the KL-regularised objective, whatever V* is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astarpo.trainer import astarpo_loss, sequence_log_ratio

BETA2 = 0.1


def test_log_ratio_sums_masked_tokens_only():
    logps = torch.tensor([[-1.0, -2.0, float("nan")]])
    reference = torch.tensor([[-1.5, -1.0, 0.0]])
    assert sequence_log_ratio(logps, reference, torch.tensor([[1, 1, 0]])).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.72, 1.5])
def test_expected_gradient_is_that_of_the_regularised_objective(value):
    """docs/algorithm.md, Gradient: E_y∼π ∇L = −∇J_β2 for any V (the loss carries the factor 1 / 2β2)."""
    torch.manual_seed(0)
    theta = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    rewards = torch.tensor([0, 1, 0, 0, 1, 0, 1], dtype=torch.float64)
    logps = theta.log_softmax(-1)
    losses = astarpo_loss(logps - reference, torch.full((7,), value).double(), rewards, torch.ones(7), BETA2)
    (gradient,) = torch.autograd.grad((logps.exp().detach() * losses).sum(), theta)

    logps = theta.log_softmax(-1)
    objective = (logps.exp() * (rewards - BETA2 * (logps - reference))).sum()
    (expected,) = torch.autograd.grad(-objective, theta)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_is_zero_at_the_optimum():
    """At β1 = β2 the optimal policy satisfies β2·ℓ = r − V* for every completion."""
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    rewards = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    value = BETA2 * torch.logsumexp(reference + rewards / BETA2, 0)
    optimal = reference + (rewards - value) / BETA2
    losses = astarpo_loss(optimal - reference, value.expand(3), rewards, torch.ones(3), BETA2)
    assert losses.abs().max() < 1e-20


def test_no_signal_has_no_weight_even_when_infinite():
    losses = astarpo_loss(
        torch.tensor([float("inf"), 1.0]), torch.zeros(2), torch.zeros(2), torch.tensor([0.0, 1.0]), BETA2
    )
    assert losses.tolist() == pytest.approx([0.0, 0.05])


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 1000))
def test_padding_and_order_do_not_matter(batch, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    logps = torch.randn(batch, 6, generator=generator)
    reference = torch.randn(batch, 6, generator=generator)
    mask = torch.rand(batch, 6, generator=generator) < 0.7
    values, rewards = torch.rand(2, batch, generator=generator)
    plain = astarpo_loss(sequence_log_ratio(logps, reference, mask), values, rewards, torch.ones(batch), BETA2)

    order = torch.randperm(batch, generator=generator)
    garbage = torch.randn(batch, padding, generator=generator) * 100
    padded, padded_reference = (torch.cat([tensor[order], garbage], 1) for tensor in (logps, reference))
    padded_mask = torch.cat([mask[order], torch.zeros(batch, padding, dtype=torch.bool)], 1)
    shuffled = astarpo_loss(
        sequence_log_ratio(padded, padded_reference, padded_mask),
        values[order],
        rewards[order],
        torch.ones(batch),
        BETA2,
    )
    assert torch.allclose(plain[order], shuffled, atol=1e-5)


def test_gradient_equals_finite_differences():
    torch.manual_seed(1)
    reference, mask = torch.randn(3, 4).double(), torch.ones(3, 4)
    values, rewards = torch.rand(2, 3).double()
    logps = torch.randn(3, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: astarpo_loss(sequence_log_ratio(x, reference, mask), values, rewards, torch.ones(3), BETA2), logps
    )
