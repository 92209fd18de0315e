"""The staleness score on synthetic log-probs."""

import math

import pytest
import torch

from astarpo.trainer.probe import EngineState, staleness

TOKENS = 400


def make(position: float, noise: float, step: float = 0.1, seed: int = 0, rounding: float = 0.0):
    """An engine at `position` between present (0) and anchor (1), that scatters by `noise`."""
    generator = torch.Generator().manual_seed(seed)

    def scatter(scale):
        return scale * torch.randn(TOKENS, generator=generator)

    present = -torch.rand(TOKENS, generator=generator)
    anchor = present + scatter(step)
    sampled = present + position * (anchor - present) + scatter(noise)
    return staleness(sampled, present + scatter(rounding), anchor)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.03])
def test_an_engine_on_the_present_policy_is_seen_so(noise, seed):
    assert make(0.0, noise, seed=seed).judge(floor=noise**2 + 1e-10) is EngineState.PRESENT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.03])
def test_an_engine_on_the_anchor_is_stale(noise, seed):
    finding = make(1.0, noise, seed=seed)
    assert finding.judge(floor=noise**2 + 1e-10) is EngineState.STALE
    assert finding.score == pytest.approx(1.0, abs=0.1)


def test_a_partly_stale_engine_is_found():
    """A prefix cache that outlived an update: old prompts under a new policy."""
    assert make(0.25, 1e-3).judge(floor=1e-6) is EngineState.STALE


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("position", [0.0, 1.0])
def test_below_the_noise_nothing_is_decided(position, seed):
    """Also when rounding falls on the present policy only, as it does against an adapter that is still zero."""
    finding = make(position, 0.03, step=0.001, seed=seed, rounding=0.02)
    assert finding.judge(floor=0.03**2) is EngineState.UNDECIDED


def test_a_policy_that_did_not_move_is_never_stale():
    same = torch.randn(10)
    finding = staleness(same + 0.1, same, same)
    assert finding.error == math.inf
    assert finding.gap == pytest.approx(0.1)
    assert finding.judge(floor=0.01) is EngineState.UNDECIDED


@pytest.mark.parametrize("seed", range(20))
def test_one_token_that_is_rounded_apart_is_no_evidence(seed):
    """A policy that has learnt its task is certain of nearly every token; the one it is not decides every mean square."""
    generator = torch.Generator().manual_seed(seed)
    present = -1e-4 * torch.rand(TOKENS, generator=generator)
    anchor = present + 1e-4 * torch.randn(TOKENS, generator=generator)
    sampled = present + 1e-4 * torch.randn(TOKENS, generator=generator)
    anchor[7] += 0.4
    sampled[7] += 0.28
    finding = staleness(sampled, present, anchor)
    assert finding.to_anchor < 0.5 * finding.to_present and finding.score > 0.6
    assert finding.judge(floor=1e-6, sigmas=1.0) is not EngineState.STALE
