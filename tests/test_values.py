"""V* against the table of the reference notes, its limits and its invariances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astarpo.rollout import optimal_values

TABLE = {
    0.25: [0, 0.510, 0.667, 0.762, 0.831, 0.885, 0.930, 0.967, 1],
    0.5: [0, 0.294, 0.477, 0.611, 0.717, 0.804, 0.878, 0.943, 1],
    1.0: [0, 0.195, 0.357, 0.497, 0.620, 0.729, 0.828, 0.918, 1],
    2.0: [0, 0.156, 0.301, 0.435, 0.562, 0.681, 0.793, 0.899, 1],
}
rewards = st.lists(st.floats(-2, 2), min_size=1, max_size=16)


@pytest.mark.parametrize("beta1", TABLE)
def test_matches_the_table(beta1):
    solved = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    assert optimal_values(solved, beta1).tolist() == pytest.approx(TABLE[beta1], abs=6e-4)


@given(rewards)
def test_large_beta_gives_the_mean_and_small_beta_the_maximum(row):
    tensor = torch.tensor([row])
    assert optimal_values(tensor, 1e6).item() == pytest.approx(tensor.double().mean().item(), abs=1e-5)
    slack = 1e-3 * math.log(len(row)) + 1e-6
    assert optimal_values(tensor, 1e-3).item() == pytest.approx(max(row), abs=slack)


@given(rewards, st.floats(0.01, 10))
def test_lies_between_mean_and_maximum_and_ignores_order(row, beta1):
    value = optimal_values(torch.tensor([row], dtype=torch.float64), beta1).item()
    assert sum(row) / len(row) - 1e-9 <= value <= max(row) + 1e-9
    reverse = optimal_values(torch.tensor([row[::-1]], dtype=torch.float64), beta1).item()
    assert value == pytest.approx(reverse, abs=1e-12)


@given(rewards, st.floats(-3, 3), st.floats(0.05, 5))
def test_moves_with_the_rewards(row, shift, beta1):
    tensor = torch.tensor([row], dtype=torch.float64)
    moved = optimal_values(tensor + shift, beta1).item()
    assert moved == pytest.approx(optimal_values(tensor, beta1).item() + shift, abs=1e-9)


def test_is_stable_at_tiny_beta():
    assert optimal_values(torch.tensor([[1.0, 0.0]]), 1e-4).item() == pytest.approx(1.0, abs=1e-3)


def test_samples_without_signal_are_left_out():
    nan = math.nan
    values = optimal_values(torch.tensor([[1.0, nan, 0.0], [nan, nan, nan]]), 0.5)
    assert values[0].item() == pytest.approx(optimal_values(torch.tensor([[1.0, 0.0]]), 0.5).item())
    assert math.isnan(values[1].item())


@pytest.mark.parametrize("beta1", [0.0, -1.0, math.nan])
def test_a_senseless_beta_is_refused(beta1):
    with pytest.raises(ValueError, match="beta1 must be positive"):
        optimal_values(torch.zeros(1, 2), beta1)
