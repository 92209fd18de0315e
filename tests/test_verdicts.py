"""PAG's verdicts, the rewards of its turns and the closed forms of their values (docs/algorithm.md, PAG)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astarpo.rollout.episodes import Verdict, binary_value, check_alpha, parse_verdict, revision_value, turn_rewards
from astarpo.rollout.values import optimal_values

pytestmark = pytest.mark.pag


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("Step 2 adds wrongly. The answer is wrong.", "wrong", "wrong"),
        ("All steps hold. The answer is correct.", "correct", "correct"),
        ("The answer is wrong", "none", "wrong"),
        ("The answer is wrong. So let us see.", "none", "wrong"),
        ("The answer is wrong. The answer is wrong.", "none", "wrong"),
        ("The answer is correct. No: The answer is wrong.", "none", "none"),
        ("the answer is **Correct**", "none", "correct"),
        ("The answer is incorrect.", "none", "wrong"),
        ("The answer is right!", "none", "correct"),
        ("The answer is 12.", "none", "none"),
        ("", "none", "none"),
        ("The answer is wrongly stated.", "none", "none"),
        ("Let me see whether the answer is correct. Step 2 is false.", "none", "none"),
        ("If the answer is correct, 2x = 4. It is not. The answer is wrong.", "wrong", "wrong"),
        ("The triangle in the answer is right-angled.", "none", "none"),
        ("The final answer is therefore wrong. The answer is correct?", "none", "wrong"),
        ("The answer is correct.\n", "correct", "correct"),
    ],
)
def test_verdicts(text, strict, lenient):
    assert parse_verdict(text, "strict") == strict
    assert parse_verdict(text, "lenient") == lenient


def test_an_unknown_parser_is_refused():
    with pytest.raises(ValueError, match="strict or lenient"):
        parse_verdict("", "official")


def test_rewards_of_the_transitions():
    got = [
        turn_rewards(a, Verdict.WRONG, b, 1.0)[2]
        for a, b in ((False, True), (False, False), (True, True), (True, False))
    ]
    assert got == [2.0, 0.0, 1.0, -1.0]
    assert turn_rewards(True, Verdict.CORRECT, None, 1.0) == (1.0, 1.0, None)
    assert turn_rewards(False, Verdict.WRONG, True, 0.0) == (0.0, 1.0, 1.0)
    assert turn_rewards(False, Verdict.CORRECT, None, 1.0) == (0.0, 0.0, None)
    for right in (True, False):
        assert turn_rewards(right, Verdict.NONE, None, 1.0)[1] == 0.0
    for alpha in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha must be 0 or more"):
            check_alpha(alpha)


@given(
    st.integers(0, 50), st.integers(1, 50), st.sampled_from([0.05, 0.5, 1.0, 10.0]), st.sampled_from([0.0, 1.0, 5.0])
)
def test_closed_forms_are_v_star_of_many_samples(successes, failures, beta1, alpha):
    """V* of the samples that a success probability stands for, by the estimator of stage 1."""
    acc = torch.tensor([1.0] * successes + [0.0] * failures).double()
    p = acc.mean()
    torch.testing.assert_close(binary_value(p, beta1), optimal_values(acc[None], beta1)[0])
    for z in (0.0, 1.0):
        rewards = acc + alpha * (acc - z)
        expected = optimal_values(rewards[None], beta1)[0]
        torch.testing.assert_close(revision_value(p, torch.tensor(z), alpha, beta1), expected, rtol=1e-6, atol=1e-6)
        # the advantage is that of (1 + alpha) acc2: the penalty is absorbed by V*
        torch.testing.assert_close(
            1 + alpha * (1 - z) - revision_value(p, torch.tensor(z), alpha, beta1),
            (1 + alpha) - revision_value(p, torch.tensor(0.0), alpha, beta1),
        )


def test_values_at_the_ends():
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(binary_value(ends, 0.5), ends.double())
    torch.testing.assert_close(binary_value(ends, 1e-3), ends.double())
    with pytest.raises(ValueError, match="beta1 must be positive"):
        binary_value(ends, 0.0)
