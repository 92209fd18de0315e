"""Whether two answers are the same answer: structure against structure, value against value.

The rules that need a convention (units, percent, decimals, names) are listed in docs/verifier.md.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

from ..grading import Outcome
from .extraction import MAX_ANSWER_CHARS
from .families import Qualifier, agree, respelt, unqualified
from .forms import (
    INFINITY,
    MINUS_INFINITY,
    Approximate,
    Bracketed,
    Choice,
    Collection,
    Excluded,
    Form,
    Grid,
    Listing,
    Named,
    Qualified,
    Ratio,
    Relation,
    Text,
    Union,
    Value,
    expressions,
)
from .latex import clean, close_up
from .numerals import Numeral, decimal_latex, fraction_latex, has_finite_decimal, read_numeral
from .parsing import read_cleaned, read_form
from .real_sets import simplified
from .solutions import Solution, are_members, is_same_unknown, solutions, stem
from .spelling import MARKS
from .units import DEGREE, PERCENT, Unit

T = TypeVar("T")
MAX_PLAIN_OF_PERCENT = 10
"""A larger number without a percent sign that stands for a percentage has lost its sign: 50 is 50 %, not 5,000 %."""


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

    def rounds_to(self, gold: str, answer: str) -> bool:
        """Whether an exact value without finite decimal, rounded to the places of the gold decimal, is that decimal."""
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

    def rounds_to(self, gold: str, answer: str) -> bool:
        """Whether an exact value without finite decimal, rounded to the places of the gold decimal, is that decimal."""
        decimal, exact = read_numeral(gold), read_numeral(answer)
        if decimal is None or decimal.place is None:
            return False
        if exact is None:
            raise Undecided
        return exact.place is None and not has_finite_decimal(exact.value) and decimal.rounded_is(exact.value)

    def readable(self, latex: str) -> bool:
        """Whether an expression means anything."""
        if read_numeral(latex) is None and not _is_infinite(Value(latex)):
            raise Undecided
        return True


def _rounded(exact: Fraction, place: int | None, decimal: Numeral) -> bool:
    """A decimal may stand for a fraction without finite decimal, never for another decimal or a finite one."""
    return place is None and not has_finite_decimal(exact) and decimal.rounds(exact)


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
    said = (_qualifier(expected), _qualifier(given))
    if not agree(*said):
        return False
    expected, given = (form.content if isinstance(form, Qualified) else form for form in (expected, given))
    if match(expected, given):
        return True
    # "1,234" is a number, but against a list it may be meant as one.
    if isinstance(expected, Listing) and isinstance(given, Value):
        again = read_form(answer, grouping=False)
        return isinstance(again, Listing) and match(expected, again)
    if not (re.search("[a-zA-Z]", gold) and re.search("[a-zA-Z]", answer)):
        return False
    body, answered = (unqualified(clean(text))[0] for text in (gold, answer))
    for spelling in respelt(body, answered, said):
        again = read_cleaned(spelling)
        if again is not None and match(expected, again):
            return True
    return False


def _qualifier(form: Form) -> Qualifier | None:
    return form.qualifier if isinstance(form, Qualified) else None


class _Matcher:
    """Compares forms. The gold answer always comes first."""

    def __init__(self, comparer: Comparer):
        self.comparer = comparer

    def match(self, gold: Form, answer: Form) -> bool:
        if isinstance(answer, Choice) or isinstance(gold, Choice):
            return self._choices(gold, answer)
        if isinstance(answer, Approximate):
            return self._is_about(answer) and self.match(gold, answer.exact)
        if isinstance(gold, Approximate):
            return self.match(gold.exact, answer) or self._as_stated(gold.decimal, answer)
        golds, answers = solutions(gold), solutions(answer)
        if golds is not None and answers is not None:
            return self._same_members(golds, answers, self._solution)
        if golds is not None or answers is not None:
            return self._unnamed(golds, gold, answer, answers)
        if isinstance(gold, Named) or isinstance(answer, Named) or isinstance(gold, Relation):
            return self._relations(gold, answer)
        if isinstance(gold, Listing | Collection) and isinstance(answer, Listing | Collection):
            return self._several(gold, answer)
        if isinstance(answer, Listing):
            return _repeats(answer.items) and all(self.match(gold, item) for item in answer.items)
        if isinstance(gold, Listing):
            return _repeats(gold.items) and all(self.match(item, answer) for item in gold.items)
        if isinstance(gold, Bracketed) and isinstance(answer, Bracketed):
            return self._bracketed(gold, answer)
        if isinstance(gold, Bracketed | Union | Excluded) and isinstance(answer, Bracketed | Union | Excluded):
            return self._subsets(gold, answer)
        match gold, answer:
            case Value(), Value():
                return self._values(gold, answer)
            case Ratio(), Ratio():
                return self._ratios(gold, answer)
            case (
                Ratio(terms, "" | "clock"),
                Value() as value,
            ) | (Value() as value, Ratio(terms, "" | "clock")) if len(terms) == 2:
                return self._quotient(terms, value)
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
            return self._same_members(gold.items, answer.items, self.match)
        if _repeats(answer.items) and not self._has_repeats(gold.items):
            return self._same_members(gold.items, answer.items, self.match)
        left = list(answer.items)
        if len(left) != len(gold.items):
            return False
        for item in gold.items:
            index = next((i for i, other in enumerate(left) if self.match(item, other)), None)
            if index is None:
                return False
            del left[index]
        return True

    def _same_members(self, golds: Sequence[T], answers: Sequence[T], same: Callable[[T, T], bool]) -> bool:
        """Whether each is among the others: order and repetition do not matter."""
        return all(any(same(g, a) for a in answers) for g in golds) and all(
            any(same(g, a) for g in golds) for a in answers
        )

    def _has_repeats(self, items: tuple[Form, ...]) -> bool:
        return any(self.match(one, other) for one, other in itertools.combinations(items, 2))

    def _solution(self, gold: Solution, answer: Solution) -> bool:
        """The same unknowns with the same values."""
        return gold.keys() == answer.keys() and all(self.match(gold[name], answer[name]) for name in gold)

    def _relations(self, gold: Form, answer: Form) -> bool:
        if isinstance(gold, Named) and isinstance(answer, Named):
            if gold.name == answer.name or "" in (gold.name, answer.name):
                return self.match(gold.content, answer.content)
            if gold.name.split(":") == answer.name.split(":")[::-1] and isinstance(answer.content, Ratio | Value):
                return self.match(gold.content, _inverse(answer.content))
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
                return self._equal(gold.latex, answer.latex)
            return equal(_scaled(gold, one.factor), _scaled(answer, other.factor))
        if equal(gold.latex, answer.latex) or (
            PERCENT not in (one, other) and self.comparer.rounds_to(gold.latex, answer.latex)
        ):
            return True
        unit, value, plain = (one, gold, answer) if one is not None else (other, answer, gold)
        if unit == PERCENT:
            number = read_numeral(plain.latex)
            if number is not None and abs(number.value) > MAX_PLAIN_OF_PERCENT:
                return False
            share = _scaled(value, Fraction(1, 100))
            if one is not None:
                return equal(share, plain.latex) or self.comparer.rounds_to(gold.latex, _scaled(plain, Fraction(100)))
            return self._equal(gold.latex, share)
        if unit == DEGREE and "\\pi" in plain.latex:
            return equal(_radians(value), plain.latex)
        return False

    def _equal(self, gold: str, answer: str) -> bool:
        return self.comparer.equal(gold, answer) or self.comparer.rounds_to(gold, answer)

    def _as_stated(self, decimal: Value, answer: Form) -> bool:
        """Whether an answer is the decimal that the gold answer gives for its exact value."""
        if not isinstance(answer, Value):
            return False
        stated, given = read_numeral(decimal.latex), read_numeral(answer.latex)
        return (
            stated is not None and given is not None and stated.place == given.place and self._values(decimal, answer)
        )

    def _is_about(self, answer: Approximate) -> bool:
        """Whether the decimal that an answer gives for its exact value is right, to one in the last place."""
        number = read_numeral(answer.decimal.latex)
        assert number is not None and number.place is not None
        near = [number.value + step * Fraction(10) ** number.place for step in (0, 1, -1)]
        return any(self.comparer.rounds_to(decimal_latex(one, number.place), answer.exact.latex) for one in near)

    def _ratios(self, gold: Ratio, answer: Ratio) -> bool:
        if len(gold.terms) != len(answer.terms):
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

    def _quotient(self, terms: tuple[str, ...], value: Value) -> bool:
        if value.unit not in (None, PERCENT):
            return False
        share = _scaled(value, Fraction(1, 100)) if value.unit == PERCENT else value.latex
        return self.comparer.equal(f"\\frac{{{terms[0]}}}{{{terms[1]}}}", share)

    def _unnamed(
        self, golds: Sequence[Solution] | None, gold: Form, answer: Form, answers: Sequence[Solution] | None
    ) -> bool:
        """Solutions with named unknowns on one side against tuples, a list or one value on the other."""
        named, form, other = (golds, gold, answer) if golds is not None else (answers or [], answer, gold)

        def match(mine: Form, theirs: Form) -> bool:
            return self.match(mine, theirs) if golds is not None else self.match(theirs, mine)

        points = other.items if isinstance(other, Listing) else (other,)
        are_points = all(isinstance(value, Bracketed) for value in named[0].values())
        if not are_points and all(
            isinstance(point, Bracketed) and (point.left, point.right) == ("(", ")") for point in points
        ):
            tuples = [Bracketed("(", ")", tuple(solution.values())) for solution in named]
            return self._same_members(tuples, points, match)
        if len(named) > 1:
            return False
        values = tuple(named[0].values())
        if isinstance(other, Named):  # x_1 = x_2 = 3 is x = 3, but x = y = 3 is neither x = 3 nor z = 3
            return (
                are_members(named[0])
                and other.name == stem(next(iter(named[0])))
                and all(match(value, other.content) for value in values)
            )
        if are_points:  # points with their letters
            return match(Listing(values), other)
        if are_members(named[0]):
            return match(Listing(tuple(Named(stem(next(iter(named[0]))), value) for value in values)), other)
        if isinstance(other, Listing):
            unnamed = not any(isinstance(point, Named) for point in points)
            return unnamed and len(values) == len(points) and all(map(match, values, points))
        return isinstance(form, Named) and "=" in form.name and match(values[0], other)


def _times_of_day(clock: Ratio) -> set[tuple[int, ...]]:
    """The times that a clock may show: 4:30 is in the morning or in the afternoon."""
    hour, *rest = (int(term) for term in clock.terms)
    halves = {"a": [0], "p": [12], "clock": [0, 12] if 0 < hour <= 12 else [hour - hour % 12]}[clock.half_of_day]
    return {(hour % 12 + half, *rest) for half in halves}


def _repeats(items: tuple[Form, ...]) -> bool:
    """Whether stating a member twice says no more than once: tuples and values of one unknown, not bare numbers."""
    return all(isinstance(item, Bracketed) for item in items) or is_same_unknown(items)


def _inverse(form: Ratio | Value) -> Form:
    """A : B where B : A was given."""
    return Ratio(form.terms[::-1]) if isinstance(form, Ratio) else Value(f"\\frac{{1}}{{{form.latex}}}", form.unit)


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
    match form:
        case Named(name, Bracketed(mark, _, (Value(bound, None), end)), "in") if end == INFINITY:
            return "<=" if mark == "[" else "<", f"({bound})-({name})"
        case Named(name, Bracketed(_, mark, (end, Value(bound, None))), "in") if end == MINUS_INFINITY:
            return "<=" if mark == "]" else "<", f"({name})-({bound})"
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
