"""Faults of math-verify 0.9.0 and latex2sympy2_extended 1.11 that the verifier works around.

Each test shows the fault in the library and that the verifier does not have it. When a library mends one, its test
fails and names the code that may go. Issue numbers are of huggingface/Math-Verify; "unreported" ones were found here.
"""

import logging
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import parse, verify

from astarpo.verifier import grade


@dataclass(frozen=True)
class Fault:
    """A pair on which math-verify and the verifier differ."""

    name: str
    issue: str
    gold: str
    completion: str
    workaround: str
    math_verify_says: bool = True


FAULTS = [
    Fault("tiny values", "#14", "2^{-99}", r"\boxed{2^{-98}}", "symbolic._agree"),
    Fault("tiny values with roots", "#14", r"10^{-20}\sqrt{2}", r"\boxed{10^{-20}\sqrt{3}}", "symbolic._agree"),
    Fault("decimals near each other", "#14", "0.1234567", r"\boxed{0.1234568}", "equality._rounded"),
    Fault("root of a parenthesis", "#41", r"4\sqrt{2}", r"\boxed{4\sqrt(2)}", "latex._root_of_parenthesis", False),
    Fault("identity of roots", "#64", r"\sqrt{\frac{1}{n}}", r"\boxed{\frac{1}{\sqrt{n}}}", "symbolic._agree", False),
    Fault("number base", "unreported", "2516", r"\boxed{2516_8}", "numerals._based"),
    Fault("last side of a chain", "#25", "42", r"\boxed{7 = 42}", "reading._equation"),
    Fault("sum of a chain", "#25", "5", r"\boxed{x = 3 = 5}", "reading._equation"),
    Fault("anagram", "unreported", "even", r"\boxed{neve}", "words.read_words"),
    Fault("case of a variable", "unreported", "S", r"\boxed{s}", "symbolic._CONVERSION"),
    Fault("factor taken for a unit", "unreported", r"\frac{a}{b}", r"\boxed{\frac{a}{b}c}", "units.split_unit"),
    Fault("number times parenthesis", "unreported", "5", r"\boxed{2(3)}", "symbolic._explicit"),
    Fault("numbers side by side", "unreported", "235", r"\boxed{1 234}", "numerals._GROUPED"),
    Fault("unterminated box", "unreported", "2", r"\boxed{2} then \boxed{3", "extraction.last_box"),
    Fault("corrected box", "unreported", "2", r"\boxed{7} no: \boxed{2}", "extraction.last_box", False),
    Fault(
        "box while thinking", "unreported", "42", r"<think>\boxed{7}</think> \boxed{42}", "extraction.visible", False
    ),
    Fault("unit of the wrong size", "unreported", r"5\text{ cm}", r"\boxed{5\text{ m}}", "units.split_unit"),
    Fault("percent that is no integer", "unreported", "35", r"\boxed{35.0\%}", "equality._values", False),
]


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_there_and_worked_around(fault):
    says = verify(parse(f"\\boxed{{{fault.gold}}}"), parse(fault.completion))
    assert says == fault.math_verify_says, f"mended upstream ({fault.issue}): {fault.workaround} may be simplified"
    assert grade(fault.completion, fault.gold).correct is not fault.math_verify_says


def test_equations_without_dollars_lose_their_terms():  # 60
    says = verify(parse("3x-y+13=0"), parse("3x+4y+14=0"))
    assert says, "mended upstream (#60): answers may be given to it as they stand"
    assert not grade("The answer is 3x+4y+14=0", "3x-y+13=0").correct


def test_threads_are_refused():  # 50 and 55
    errors = []

    def attempt() -> None:
        try:
            parse("$1$")
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert errors, "mended upstream (#50): threads need no worker any more"


@pytest.mark.slow
def test_a_hang_that_no_alarm_ends():  # 59, 63 and 65
    code = r"from math_verify import parse; parse(r'\boxed{1E999999999}', parsing_timeout=2)"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code], timeout=15, check=False)


def test_a_product_is_read_as_a_mixed_number_whatever_the_options():
    options = ConversionConfig(interpret_as_mixed_fractions=False)
    assert latex2sympy("2(3)", conversion_config=options) == 5, "mended: symbolic._explicit may be simplified"
