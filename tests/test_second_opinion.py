"""The audit's second grader, which shares no code with the verifier."""

import ast
from pathlib import Path

import pytest

from astarpo.verifier import second_opinion as module
from astarpo.verifier.second_opinion import second_opinion


@pytest.mark.parametrize(
    ("completion", "gold", "equal"),
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
        (r"\boxed{1/2}", r"\frac{1}{2}", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{5 \text{ cm}}", "5", True),
        (r"\boxed{1,234.50}", "1234.5", True),
        (r"\boxed{\left(1, 2\right)}", "(1,2)", True),
        (r"\boxed{\text{Even}}", "even", True),
        ("The answer is 42.", "42", True),
        ("It must be 42 then", "42", True),
        (r"<think>\boxed{5}</think> \boxed{6}", "5", False),
        (r"\boxed{7", "7", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", False),  # no algebra
        (r"\boxed{5}", "6", False),
        ("", "", False),
    ],
)
def test_normalised_exact_match(completion, gold, equal):
    assert second_opinion(completion, gold)[0] is equal


def test_it_is_independent_of_the_verifier():
    tree = ast.parse(Path(module.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
