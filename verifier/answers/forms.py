r"""What kind of thing an answer is: a value, a list, a tuple, an interval, a relation, a word.

Math-verify compares whatever two strings parse to. Here the *structure* of an answer is read first, so that a list never
passes for one of its members, a relation never for a number in it, and a word never for a product of letters. What is
left inside the structure are values; those are what math-verify (or exact arithmetic) compares.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .families import Qualifier
from .units import Unit


@dataclass(frozen=True, slots=True)
class Value:
    """A mathematical expression, with the unit it was given in."""

    latex: str
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Words, or anything else that is compared letter by letter."""

    words: str


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice's letter together with what it says: (C) 42."""

    letter: str
    content: "Form"


@dataclass(frozen=True, slots=True)
class Listing:
    """Several answers: `1, 2`, `1 or 2`, `\\pm 3`. Their order does not matter, how often each occurs does."""

    items: tuple["Form", ...]


@dataclass(frozen=True, slots=True)
class Collection:
    """A set: neither order nor repetition matters."""

    items: tuple["Form", ...]


@dataclass(frozen=True, slots=True)
class Bracketed:
    """An ordered tuple, or an interval: which one is decided by what it is compared with."""

    left: str
    right: str
    items: tuple["Form", ...]


@dataclass(frozen=True, slots=True)
class Union:
    """A union of intervals and sets."""

    pieces: tuple["Form", ...]


@dataclass(frozen=True, slots=True)
class Excluded:
    """All real numbers but these."""

    points: tuple["Form", ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A value and what it is the value of: `x = 5`, `f(x) = 2x`, `y \\in [0, 1]`."""

    name: str
    content: "Form"
    relation: str = field(default="=")


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality between two expressions that is not solved for anything."""

    operator: str
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """`3:4`, or a time of day: `4:30 p.m.`"""

    terms: tuple[str, ...]
    half_of_day: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix or column vector."""

    rows: tuple[tuple["Form", ...], ...]
    latex: str


@dataclass(frozen=True, slots=True)
class Approximate:
    """An exact value and the decimal that was given for it: `\\sqrt{13} \\approx 3.6`."""

    exact: Value
    decimal: Value


@dataclass(frozen=True, slots=True)
class Qualified:
    """An answer that says what its letters are: `k\\pi, k \\in \\mathbb{Z}`. Only ever the outermost form."""

    content: "Form"
    qualifier: Qualifier


Form = (
    Value
    | Text
    | Choice
    | Listing
    | Collection
    | Bracketed
    | Union
    | Excluded
    | Named
    | Relation
    | Ratio
    | Grid
    | Approximate
    | Qualified
)

INFINITY, MINUS_INFINITY = Value("\\infty"), Value("-\\infty")
ALL_REALS = Bracketed("(", ")", (MINUS_INFINITY, INFINITY))
EMPTY = Collection(())


def expressions(form: Form) -> Iterator[str]:
    """All expressions in a form: what a parser has to be able to read for the form to mean anything."""
    match form:
        case Value():
            yield form.latex
        case Relation():
            yield from (form.left, form.right)
        case Ratio():
            yield from form.terms
        case Approximate():
            yield form.exact.latex
        case Choice() | Named() | Qualified():
            yield from expressions(form.content)
        case Listing() | Collection() | Bracketed():
            yield from (latex for item in form.items for latex in expressions(item))
        case Union():
            yield from (latex for piece in form.pieces for latex in expressions(piece))
        case Excluded():
            yield from (latex for point in form.points for latex in expressions(point))
        case Grid():
            yield from (latex for row in form.rows for cell in row for latex in expressions(cell))
        case Text():
            pass
