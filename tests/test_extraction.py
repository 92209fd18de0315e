"""Which text is the answer."""

import time

import pytest
from hostile import HOSTILE

from astarpo.verifier import extract_answer, extract_gold


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        # verdicts about an answer are none
        ("10 * 7 = 70. The answer is correct.", "70"),
        ("10 * 7 = 70. The answer is right.", "70"),
        ("10 * 7 = 70, so the answer is **correct**.", "70"),
        ("10 * 7 = 70.\n**Yes, this answer is not wrong!**", "70"),
        ("10 * 7 = 70. The answer is correct because 7 * 10 = 70.", "70"),
        ("70. The answer is correct.", "70"),
        ("10 * 7 = 70. (The final answer is indeed correct)\n", "70"),
        ("The answer is incorrect because 3 + 4 = 7. The answer is 7.", "7"),
        ("The answer is wrong. 3 * 4 = 12.", "12"),
        # an answer that is taken back is none
        ("The answer is 5. The answer is wrong.", "wrong"),
        ("10 * 7 = 71. That answer is not correct.", "not correct"),
        ("The answer is 5. The answer is wrong. The answer is 6.", "6"),
        (r"So \boxed{5}. The answer is wrong.", "5"),
        # where there is no other answer, a verdict is one
        ("The answer is correct.", "correct"),
        ("Therefore, the answer is incorrect because the sum is 7.", "incorrect"),
        (r"\boxed{wrong}", "wrong"),
        ("The answer is right triangle.", "right triangle"),
        ("The answer is 2. The answer is correct. 5", "2"),
        # boxes
        (r"So \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}+2}", r"\boxed{3}+2"),
        (r"\boxed{2} and \boxed{3", None),
        (r"\boxed{}", None),
        (r"\boxed{42}, which I put into \boxed{}.", "42"),
        (r"\boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{1,000} or $x=\boxed{2}$", "1,000; 2"),
        (r"\boxed{5} \boxed{5}", "5"),
        (r"\boxed{1}. The second case gives \boxed{2}", "2"),
        # reasoning
        (r"<think>maybe \boxed{7}</think> \boxed{42}", "42"),
        (r"<think>\boxed{7}</think> Done.", None),
        (r"<think>I believe \boxed{7}", None),
        (r"<think>a</think>\boxed{5}<think> or \boxed{6}", "5"),
        (r"the template opened the tag \boxed{4}</think> \boxed{5}", "5"),
        # statements
        ("The answer is 5.", "5"),
        ("The answer is 3.14.", "3.14"),
        ("Final answer: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**\n\n42", "42"),
        ("Answer:\n\\[ 42 \\]", "\\[ 42 \\]"),
        ("work\n#### 1,234", "1,234"),
        ("Q\nA: 5", "5"),
        ("<answer>12</answer>", "12"),
        ("The answer is 5. Check: 2 + 4 = 6.", "5"),
        ("The answer is 5, a prime.", "5"),
        ("The answer is 5, since 2+3=5.", "5"),
        ("The answer is 1, 2, or 3.", "1, 2, or 3"),
        ("The answer is 1,234,567.", "1,234,567"),
        ("The answer is 4. Wait, the answer is 6.", "6"),
        ("The answer is not 5.", "not 5"),
        ("Is the answer 5?", None),
        ("The answer is 5?", None),
        # conclusions
        ("11 times 7 is 77.", "77"),
        ("The product of 11 and 7 is 77.", "77"),
        ("So the total is 42.", "42"),
        ("So x = 5.", "5"),
        ("42", "42"),
        ("The sum is 10.", None),
        ("We know that 2x = 10", None),
        ("So 2x = 10.", None),
        ("Let x = 5", None),
        ("7 × 8", None),
        ("$7 \\times 8$", None),
        ("Is it 5?", None),
        ("", None),
    ],
)
def test_which_text_is_the_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "gold"), [("42", "42"), ("2 + 2\n#### 4", "4"), (r"thus $x = \boxed{7}$", "7"), (r"\boxed{7", "")]
)
def test_gold_of_a_worked_solution(text, gold):
    assert extract_gold(text) == gold


@pytest.mark.parametrize("name", HOSTILE)
def test_extraction_cannot_be_held_up(name):
    began = time.perf_counter()
    extract_answer(HOSTILE[name])
    extract_answer(HOSTILE[name] + " The answer is")
    assert time.perf_counter() - began < 1.5
