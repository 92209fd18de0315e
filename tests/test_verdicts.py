"""PAG's verdicts, the rewards of its turns and the closed forms of their values (docs/algorithm.md, PAG)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from astarpo.rollout.engines.interface import Completion, FinishReason
from astarpo.rollout.episode import Turn
from astarpo.rollout.pag import VERIFY_PROMPT, Pag, Verdict, parse_verdict, verdict_reward
from astarpo.rollout.values import optimal_values, two_point_value
from astarpo.verifier import extract_answer

pytestmark = pytest.mark.pag


@pytest.mark.parametrize(
    ("text", "official"),
    [
        ("The answer is wrong. Hmm. The answer is correct.", "correct"),
        ("The answer is wrong. The answer is wrong.", "wrong"),
        ("The answer is correct.\n", "correct"),
        ("The answer is wrong", "none"),
        ("the answer is wrong.", "none"),
        ("The answer is not wrong.", "none"),
        ("The answer is wrong. So let us see.", "none"),
    ],
)
def test_the_official_parser_is_pags_regex_to_the_letter(text, official):
    assert parse_verdict(text, "official") == official


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("That answer is not correct.", "wrong"),
        ("The answer is not right, since 3 * 4 = 12.", "wrong"),
        ("The answer isn't correct.", "wrong"),
        ("So my answer is **not** wrong.", "correct"),
        ("The answer isn’t wrong.", "correct"),
    ],
)
def test_lenient_reads_negations_as_the_verifier_does(text, verdict):
    assert parse_verdict(text, "lenient") == verdict
    assert (extract_answer(f"#### 7\n{text}") == "7") == (
        verdict == "correct"
    )  # a rejection takes back what stands before it


def test_pags_prompt_shows_the_sentence_that_its_parsers_ask_for():
    for said in ("correct", "wrong"):
        assert f"'The answer is {said}.'" in VERIFY_PROMPT


def test_a_truncated_verification_has_a_verdict_only_for_pags_own_parser():
    turn = Turn("verify", 2, (), Completion((1,), (0.0,), FinishReason.LENGTH), "The answer is wrong.")
    assert [Pag(verdict_parser=name).verdict(turn) for name in ("official", "strict", "lenient")] == [
        "wrong",
        "none",
        "none",
    ]


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
    with pytest.raises(ValueError, match="strict, official, lenient"):
        parse_verdict("", "loose")


def test_rewards_of_the_transitions():
    """Section 3 of the paper: the gain over the attempt counts alpha more; a verdict earns 1 where it is true."""
    pag = Pag(alpha=1.0)
    got = [
        pag.reward("revise", float(b), int(a)) for a, b in ((False, True), (False, False), (True, True), (True, False))
    ]
    assert got == [2.0, 0.0, 1.0, -1.0]
    assert Pag(alpha=0.0).reward("revise", 1.0, 0) == 1.0
    assert [pag.reward(role, 1.0, label) for role in ("attempt", "verify") for label in (0, 1)] == [1.0] * 4
    assert verdict_reward(Verdict.CORRECT, 1) == verdict_reward(Verdict.WRONG, 0) == 1.0
    assert verdict_reward(Verdict.CORRECT, 0) == verdict_reward(Verdict.WRONG, 1) == 0.0
    assert verdict_reward(Verdict.NONE, 0) == verdict_reward(Verdict.NONE, 1) == 0.0
    assert verdict_reward(Verdict.CORRECT, None) is None
    for alpha in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="alpha must be 0 or more"):
            Pag(alpha=alpha)
    with pytest.raises(ValueError, match="strict, official, lenient"):
        Pag(verdict_parser="Lenient")


@given(
    st.integers(0, 50), st.integers(1, 50), st.sampled_from([0.05, 0.5, 1.0, 10.0]), st.sampled_from([0.0, 1.0, 5.0])
)
def test_closed_forms_are_v_star_of_many_samples(successes, failures, beta1, alpha):
    """V* of the samples that a success probability stands for, by the estimator of stage 1."""
    acc = torch.tensor([1.0] * successes + [0.0] * failures).double()
    p, pag = acc.mean()[None], Pag(alpha=alpha)
    for role in ("attempt", "verify"):
        torch.testing.assert_close(pag.value(role, p, torch.zeros(1), beta1), optimal_values(acc[None], beta1))
    values = []
    for z in (0.0, 1.0):
        rewards = acc + alpha * (acc - z)
        value = pag.value("revise", p, torch.tensor([z]), beta1)
        torch.testing.assert_close(value, optimal_values(rewards[None], beta1 * (1 + alpha)), rtol=1e-6, atol=1e-6)
        values.append(value)
    # V* absorbs the penalty: the advantage is that of (1 + alpha) acc2
    torch.testing.assert_close(values[0] - alpha, values[1])


def test_values_at_the_ends():
    ends = torch.tensor([0.0, 1.0])
    for beta1 in (0.5, 1e-3):
        torch.testing.assert_close(two_point_value(ends, 0.0, 1.0, beta1), ends.double())
    with pytest.raises(ValueError, match="beta1 must be positive"):
        two_point_value(ends, 0.0, 1.0, 0.0)
