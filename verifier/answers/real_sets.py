"""Sets of real numbers with written-out ends, as intervals: so that [0, 1) ∪ [1, 2] is [0, 2].

Exact arithmetic on fractions. Sets with other ends (roots, variables) stay as they are written.
"""

from fractions import Fraction

from .forms import ALL_REALS, Bracketed, Collection, Excluded, Form, Union, Value
from .numerals import fraction_latex, read_numeral

Cut = tuple[Fraction | float, int]
"""A place on the real line: just before (-1), or just behind (+1) a number; ±inf at the ends."""
Intervals = list[tuple[Cut, Cut]]
_INFINITY = float("inf")


def simplified(form: Form) -> Form:
    """The same set in one spelling, where its ends are written out; else the form itself."""
    intervals = _intervals(form)
    return form if intervals is None else _form(intervals)


def intersection(one: Form, other: Form) -> Form | None:
    """What two sets share, or None when their ends are not written out."""
    left, right = _intervals(one), _intervals(other)
    if left is None or right is None:
        return None
    shared = [(max(a[0], b[0]), min(a[1], b[1])) for a in left for b in right]
    return _form([part for part in shared if part[0] < part[1]])


def difference(one: Form, other: Form) -> Form | None:
    """What is in the first set and not in the second, or None when their ends are not written out."""
    taken = _intervals(other)
    if taken is None:
        return None
    left: Form | None = one
    for low, high in taken:
        rest = [((-_INFINITY, 1), low), (high, (_INFINITY, -1))]
        left = intersection(left, _form([part for part in rest if part[0] < part[1]])) if left is not None else None
    return left


def _intervals(form: Form) -> Intervals | None:
    """Disjoint intervals in order, or None."""
    found: Intervals = []
    match form:
        case Bracketed(left, right, (low, high)):
            start, end = _cut(low, 1 if left == "(" else -1), _cut(high, -1 if right == ")" else 1)
            if start is None or end is None:
                return None
            found = [(start, end)]
        case Collection(items):
            for item in items:
                before, behind = _cut(item, -1), _cut(item, 1)
                if before is None or behind is None:
                    return None
                found.append((before, behind))
        case Union(pieces):
            for piece in pieces:
                part = _intervals(piece)
                if part is None:
                    return None
                found += part
        case Excluded(points):
            rest = difference(ALL_REALS, Collection(points))
            return None if rest is None else _intervals(rest)
        case _:
            return None
    return _merged([part for part in found if part[0] < part[1]])


def _merged(parts: Intervals) -> Intervals:
    merged: Intervals = []
    for low, high in sorted(parts):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return merged


def _cut(end: Form, side: int) -> Cut | None:
    if not isinstance(end, Value) or end.unit is not None:
        return None
    bare = end.latex.replace(" ", "").lstrip("+")
    if bare in ("\\infty", "-\\infty"):
        return (-_INFINITY, 1) if bare[0] == "-" else (_INFINITY, -1)
    number = read_numeral(end.latex)
    return None if number is None else (number.value, side)


def _form(intervals: Intervals) -> Form:
    pieces: list[Form] = []
    points: list[Form] = []
    for (low, before), (high, behind) in _merged(intervals):
        if low == high:
            points.append(_end(low))
        else:
            left, right = "(" if before > 0 else "[", ")" if behind < 0 else "]"
            pieces.append(Bracketed(left, right, (_end(low), _end(high))))
    if points or not pieces:
        pieces.append(Collection(tuple(points)))
    return pieces[0] if len(pieces) == 1 else Union(tuple(pieces))


def _end(number: Fraction | float) -> Value:
    if isinstance(number, Fraction):
        return Value(str(number.numerator) if number.denominator == 1 else fraction_latex(number))
    return Value("\\infty" if number > 0 else "-\\infty")
