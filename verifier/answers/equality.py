"""Whether two answers are the same answer: structure against structure, value against value.

The rules that need a convention (units, percent, decimals, names) are listed in docs/verifier.md.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from ..grading import Outcome
from .extraction import MAX_ANSWER_CHARS
from .forms import (
    Bracketed,
    Choice,
    Collection,
    Excluded,
    Form,
    Grid,
    Listing,
    Named,
    Ratio,
    Relation,
    Text,
    Union,
    Value,
    expressions,
)
from .latex import clean, close_up
from .numerals import Numeral, fraction_latex, read_numeral
from .parsing import read_form
from .real_sets import simplified
from .spelling import MARKS
from .units import DEGREE, PERCENT, Unit


class Undecided(Exception):
    """Exact arithmetic cannot decide; a worker with math-verify has to."""


class Comparer(Protocol):
    """Compares what is left of answers once their structure has been read."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two expressions are equal."""
        ...

    def proportional(self, gold: str, answer: str, positive: bool) -> bool:
        """Whether one expression is a constant (and positive) multiple of the other."""
        ...

    def readable(self, latex: str) -> bool:
        """Whether an expression means anything."""
        ...


class Exact:
    """The comparer without sympy: decides numerals and equal strings, and raises [`Undecided`] for the rest."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two expressions are equal."""
        if gold.replace(" ", "") == answer.replace(" ", ""):
            return True
        one, other = read_numeral(gold), read_numeral(answer)
        if one is None or other is None:
            raise Undecided
        if one.value == other.value:
            return True
        return _rounded(one.value, one.place, other) or _rounded(other.value, other.place, one)

    def proportional(self, gold: str, answer: str, positive: bool) -> bool:
        """Whether one expression is a constant (and positive) multiple of the other."""
        raise Undecided

    def readable(self, latex: str) -> bool:
        """Whether an expression means anything."""
        if read_numeral(latex) is None and not _is_infinite(Value(latex)):
            raise Undecided
        return True


def _rounded(exact: Fraction, place: int | None, decimal: Numeral) -> bool:
    """A decimal may stand for a fraction without finite decimal, never for another decimal or a finite one."""
    below = exact.denominator
    while below % 2 == 0:
        below //= 2
    while below % 5 == 0:
        below //= 5
    return place is None and below != 1 and decimal.rounds(exact)


def judge(answer: str | None, gold: str, comparer: Comparer) -> Outcome:
    """Judge an answer against the gold answer.

    Args:
        answer (`str` or `None`):
            The text that a completion gives as its answer; None when it gives none.
        gold (`str`):
            The gold answer as written.
        comparer (`Comparer`):
            Decides whether two expressions are equal.

    Returns:
        [`Outcome`]: One of correct, wrong, no_answer and unparseable_gold.

    Raises:
        Undecided: If the comparer cannot decide.
    """
    if answer is not None and gold.strip() and (answer.strip() == gold.strip() or _same_letters(answer, gold)):
        return Outcome.CORRECT
    expected = read_form(gold) if len(gold) <= MAX_ANSWER_CHARS else None
    if expected is None or not all(comparer.readable(latex) for latex in expressions(expected)):
        return Outcome.UNPARSEABLE_GOLD
    if answer is None:
        return Outcome.NO_ANSWER
    given = read_form(answer) if len(answer) <= MAX_ANSWER_CHARS else None
    if given is None:
        return Outcome.WRONG
    return Outcome.CORRECT if _same(gold, expected, answer, given, comparer) else Outcome.WRONG


def _same_letters(answer: str, gold: str) -> bool:
    """Whether two texts are the same but for spaces and spelling, so that no reading of them could differ."""
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return False
    one, other = (close_up(re.sub(MARKS, " ", clean(text))) for text in (answer, gold))
    return one == other != ""


def _same(gold: str, expected: Form, answer: str, given: Form, comparer: Comparer) -> bool:
    match = _Matcher(comparer).match
    if match(expected, given):
        return True
    # "1,234" is a number, but against a list it may be meant as one.
    if isinstance(expected, Listing) and isinstance(given, Value):
        again = read_form(answer, grouping=False)
        return isinstance(again, Listing) and match(expected, again)
    return False


class _Matcher:
    """Compares forms. The gold answer always comes first."""

    def __init__(self, comparer: Comparer):
        self.comparer = comparer

    def match(self, gold: Form, answer: Form) -> bool:
        if isinstance(answer, Choice) or isinstance(gold, Choice):
            return self._choices(gold, answer)
        if isinstance(gold, Named) or isinstance(answer, Named) or isinstance(gold, Relation):
            return self._relations(gold, answer)
        if isinstance(gold, Listing | Collection) and isinstance(answer, Listing | Collection):
            return self._several(gold, answer)
        if isinstance(gold, Bracketed) and isinstance(answer, Listing):
            return self._each(gold.items, _coordinates(answer)) and (gold.left, gold.right) == ("(", ")")
        if isinstance(gold, Listing) and isinstance(answer, Bracketed):
            return self._each(_coordinates(gold), answer.items) and (answer.left, answer.right) == ("(", ")")
        if isinstance(gold, Bracketed) and isinstance(answer, Bracketed):
            return self._bracketed(gold, answer)
        if isinstance(gold, Bracketed | Union | Excluded) and isinstance(answer, Bracketed | Union | Excluded):
            return self._subsets(gold, answer)
        match gold, answer:
            case Value(), Value():
                return self._values(gold, answer)
            case Ratio(), Ratio() | Value() | Text():
                return self._ratios(gold, answer)
            case Value(), Ratio():
                return len(answer.terms) == 2 and answer.half_of_day == "" and self._quotient(answer, gold.latex)
            case Text(), Text():
                return gold.words == answer.words
            case (Text(letter), Value(latex, None)) | (Value(latex, None), Text(letter)) if len(letter) == 1:
                return self.comparer.equal(letter, latex)  # a capital is a choice or a variable
            case Grid(), Value():
                return "matrix" in answer.latex and self.comparer.equal(gold.latex, answer.latex)
            case Value(), Grid():
                return "matrix" in gold.latex and self.comparer.equal(gold.latex, answer.latex)
            case Grid(), Bracketed("(", ")"):
                return all(len(row) == 1 for row in gold.rows) and self._each(
                    [row[0] for row in gold.rows], answer.items
                )
            case Bracketed("(", ")"), Grid():
                return all(len(row) == 1 for row in answer.rows) and self._each(
                    gold.items, [row[0] for row in answer.rows]
                )
            case Grid(), Grid():
                return len(gold.rows) == len(answer.rows) and all(
                    self._each(one, other) for one, other in zip(gold.rows, answer.rows, strict=True)
                )
        return False

    def _each(self, golds: Sequence[Form], answers: Sequence[Form]) -> bool:
        return len(golds) == len(answers) and all(map(self.match, golds, answers))

    def _choices(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Choice) and isinstance(answer, Choice):
            return gold.letter == answer.letter and self.match(gold.content, answer.content)
        choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
        assert isinstance(choice, Choice)
        if isinstance(other, Text) and len(other.words) == 1:
            return other.words == choice.letter
        return self.match(choice.content, other) if choice is gold else self.match(other, choice.content)

    def _several(self, gold: Listing | Collection, answer: Listing | Collection) -> bool:
        if isinstance(gold, Collection) or isinstance(answer, Collection):
            return all(any(self.match(g, a) for a in answer.items) for g in gold.items) and all(
                any(self.match(g, a) for g in gold.items) for a in answer.items
            )
        left = list(answer.items)
        if len(left) != len(gold.items):
            return False
        for item in gold.items:
            index = next((i for i, other in enumerate(left) if self.match(item, other)), None)
            if index is None:
                return False
            del left[index]
        return True

    def _relations(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Named) and isinstance(answer, Named):
            if gold.name == answer.name or "" in (gold.name, answer.name):
                return self.match(gold.content, answer.content)
            return gold.relation == answer.relation == "=" and self._equations(gold, answer)
        if isinstance(gold, Relation):
            return isinstance(answer, Relation | Named) and self._equations(gold, answer)
        if isinstance(gold, Named):
            if isinstance(answer, Relation):
                return self._equations(gold, answer)
            return self.match(gold.content, answer)
        assert isinstance(answer, Named)
        return not isinstance(gold, Text) and self.match(gold, answer.content)

    def _equations(self, gold: Form, answer: Form) -> bool:
        """Equations are equal when one is a multiple of the other, inequalities when by a positive number."""
        one, other = _difference(gold), _difference(answer)
        if one is None or other is None or one[0] != other[0]:
            return False
        if _is_constant(gold) != _is_constant(answer):
            return False
        return self.comparer.proportional(one[1], other[1], one[0] not in ("=", "!="))

    def _bracketed(self, gold: Bracketed, answer: Bracketed) -> bool:
        if len(gold.items) != len(answer.items):
            return False
        brackets = zip(
            (gold.left, gold.right), (answer.left, answer.right), (gold.items[0], gold.items[-1]), strict=True
        )
        if any(one != other and not _is_infinite(end) for one, other, end in brackets):
            return False
        return self._each(gold.items, answer.items)

    def _subsets(self, gold: Form, answer: Form) -> bool:
        """Sets of real numbers: unions in any order; all but some points, written either way."""
        gold, answer = simplified(gold), simplified(answer)
        points, others = self._missing_points(gold), self._missing_points(answer)
        if points is not None or others is not None:
            return points is not None and others is not None and self._several(Collection(points), Collection(others))
        pieces, found = _pieces(gold), _pieces(answer)
        return len(pieces) == len(found) and self._several(Listing(pieces), Listing(found))

    def _missing_points(self, form: Form) -> tuple[Form, ...] | None:
        """The points that an all-but-some-points set leaves out; None for other sets."""
        if isinstance(form, Excluded):
            return form.points
        pieces = _pieces(form)
        if not all(isinstance(piece, Bracketed) and (piece.left, piece.right) == ("(", ")") for piece in pieces):
            return None
        ends = [piece.items for piece in pieces if isinstance(piece, Bracketed) and len(piece.items) == 2]
        lows = [low for low, _ in ends if not _is_infinite(low)]
        highs = [high for _, high in ends if not _is_infinite(high)]
        whole = len(lows) == len(highs) == len(pieces) - 1 and len(ends) == len(pieces)
        return tuple(lows) if whole and lows and self._several(Listing(tuple(lows)), Listing(tuple(highs))) else None

    def _values(self, gold: Value, answer: Value) -> bool:
        equal = self.comparer.equal
        one, other = gold.unit, answer.unit
        if one is not None and other is not None:
            if not one.agrees(other):
                return _is_angle(one, other) and equal(_radians(gold), _radians(answer))
            if one.factor == other.factor:
                return equal(gold.latex, answer.latex)
            return equal(_scaled(gold, one.factor), _scaled(answer, other.factor))
        if equal(gold.latex, answer.latex):
            return True
        unit, value, plain = (one, gold, answer) if one is not None else (other, answer, gold)
        if unit == PERCENT:
            percent = _scaled(value, Fraction(1, 100))
            return equal(percent, plain.latex) if one is not None else equal(plain.latex, percent)
        if unit == DEGREE and "\\pi" in plain.latex:
            return equal(_radians(value), plain.latex)
        return False

    def _ratios(self, gold: Ratio, answer: Form) -> bool:
        if isinstance(answer, Value):
            return len(gold.terms) == 2 and gold.half_of_day == "" and self._quotient(gold, answer.latex)
        if not isinstance(answer, Ratio) or len(gold.terms) != len(answer.terms):
            return False
        if gold.half_of_day and answer.half_of_day:
            return bool(_times_of_day(gold) & _times_of_day(answer))
        if {gold.half_of_day, answer.half_of_day} & {"a", "p"}:
            return False
        pairs = zip(gold.terms[1:], answer.terms[1:], strict=True)
        return all(self._cross(gold.terms[0], b, answer.terms[0], a) for a, b in pairs)

    def _cross(self, a: str, b: str, c: str, d: str) -> bool:
        numbers = [read_numeral(term) for term in (a, b, c, d)]
        one, two, three, four = (number.value if number else None for number in numbers)
        if one is None or two is None or three is None or four is None:
            return self.comparer.equal(f"({a})\\cdot({b})", f"({c})\\cdot({d})")
        return one * two == three * four

    def _quotient(self, ratio: Ratio, value: str) -> bool:
        a, b = ratio.terms
        return self.comparer.equal(f"\\frac{{{a}}}{{{b}}}", value)


def _times_of_day(clock: Ratio) -> set[tuple[int, ...]]:
    """The times that a clock may show: 4:30 is in the morning or in the afternoon."""
    hour, *rest = (int(term) for term in clock.terms)
    halves = {"a": [0], "p": [12], "clock": [0, 12] if 0 < hour <= 12 else [hour - hour % 12]}[clock.half_of_day]
    return {(hour % 12 + half, *rest) for half in halves}


def _coordinates(form: Listing) -> list[Form]:
    """The point that `x = 1, y = 2` gives: its coordinates in the order of their names; empty for other lists."""
    named = [item for item in form.items if isinstance(item, Named) and item.relation == "="]
    names = [item.name for item in named]
    return [item.content for item in named] if len(named) == len(form.items) and names == sorted(set(names)) else []


def _difference(form: Form) -> tuple[str, str] | None:
    if isinstance(form, Relation):
        left, right = (form.left, form.right) if form.operator not in (">", ">=") else (form.right, form.left)
        return form.operator.replace(">", "<"), f"({left})-({right})"
    if (
        isinstance(form, Named)
        and form.relation == "="
        and isinstance(form.content, Value)
        and not re.search(r"'|frac", form.name)
    ):
        return "=", f"({form.name})-({form.content.latex})"
    return None


def _is_constant(form: Form) -> bool:
    return isinstance(form, Named) and isinstance(form.content, Value) and read_numeral(form.content.latex) is not None


def _pieces(form: Form) -> tuple[Form, ...]:
    return form.pieces if isinstance(form, Union) else (form,)


def _is_infinite(form: Form) -> bool:
    return isinstance(form, Value) and form.latex.replace(" ", "").lstrip("+") in ("\\infty", "-\\infty")


def _is_angle(one: Unit, other: Unit) -> bool:
    return {name for unit in (one, other) for name, _ in unit.dimensions} == {"degree", "radian"}


def _radians(value: Value) -> str:
    return f"({value.latex})\\cdot\\frac{{\\pi}}{{180}}" if value.unit == DEGREE else value.latex


def _scaled(value: Value, factor: Fraction) -> str:
    number = read_numeral(value.latex)
    if number is not None:
        return fraction_latex(number.value * factor)
    return f"({value.latex})\\cdot{fraction_latex(factor)}"
