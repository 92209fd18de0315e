r"""Equations and inequalities: what names a value, what describes a set, and what stays a relation."""

import re
from collections.abc import Callable

from .forms import (
    INFINITY,
    MINUS_INFINITY,
    Approximate,
    Bracketed,
    Excluded,
    Form,
    Listing,
    Named,
    Ratio,
    Relation,
    Text,
    Union,
    Value,
)
from .latex import letters, split_top, squeeze, strip
from .numerals import fraction_latex, has_finite_decimal, read_numeral
from .spelling import GREEK, MARKS, WORDS_CLOSE, WORDS_OPEN

Read = Callable[[str], Form]
"""Reads a part of an answer (`parsing.py` passes its own reader in)."""

_RELATIONS = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\approx": "="}
RELATION = re.compile(r"\\(?:le|ge|ne|in|approx)(?![a-zA-Z])|[=<>]")
_FLIP = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_SUBSCRIPT = r"(?:_(?:\{[^{}]*\}|\w))?"
_ARGUMENT = r"(?:\^\{?-1\}?)?'*(?:\([^()=<>]*\))?"
_SYMBOL = "|".join(
    (
        r"(?![ei](?![a-zA-Z]))[a-zA-Z]",  # a variable or function, but neither e nor i
        rf"\\(?:{GREEK})",
        r"[A-Z]{2,4}",  # a segment or a triangle
        r"m?\s*\\(?:angle|triangle|overline|vec|hat|widehat|bar)\s*\{?\s*[A-Za-z]{1,4}\s*\}?",
        rf"{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE}",
    )
)
NAME = re.compile(
    rf"(?:{_SYMBOL}){_SUBSCRIPT}{_ARGUMENT}(?:\s*{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE})?"
    r"|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)"  # (x, y)
    r"|\|\s*[A-Za-z]{1,3}\s*\|"  # |AB|
    r"|[a-z]{4,}|\\(?:max|min)"
    r"|\\frac\s*\{d[a-z]?\}\{d[a-z]\}"
)
"""What a value can be the value of."""
_CLAIM = re.compile(r"\b(?:not|wrong|false|incorrect|no|never|or|if)\b", re.IGNORECASE)
_QUOTIENT = re.compile(
    r"\\frac\s*\{([^{}]*(?:\{[^{}]*\})?)\}\s*\{([^{}]*(?:\{[^{}]*\})?)\}|([^:/]+)[:/]([^:/]+)((?::[^:/]+)*)"
)
_APPROXIMATELY = re.compile(r"\\approx(?![a-zA-Z])")
_LINEAR = re.compile(
    rf"([-+]?\s*(?:\d+(?:\.\d+)?|\\frac\s*\{{\d+\}}\s*\{{\d+\}})?)\s*([a-zA-Z]{_SUBSCRIPT})\s*([-+]\s*(?:\d+(?:\.\d+)?|\\frac\s*\{{\d+\}}\s*\{{\d+\}}))?"
)
_DISTANCE = re.compile(r"\|\s*([a-zA-Z])\s*(?:([+-])\s*([^|]+))?\|")


def read_relation(text: str, read: Read) -> Form | None:
    """Read what stands around `=`, `<`, `\\in` and their like; None where there is no relation."""
    approximate = _approximate(text, read)
    if approximate is not None:
        return approximate
    parts = split_top(text, RELATION)
    if "\\approx" in parts and all(read_numeral(strip(side)) is None for side in parts[::2]):
        return Text(letters(text))
    sides, operators = [strip(side) for side in parts[::2]], [_RELATIONS[mark] for mark in parts[1::2]]
    if not operators:
        return None
    if sides[0] == "" and len(sides) == 2 and operators == ["="]:
        return read(sides[1])
    if any(side == "" for side in sides):
        raise ValueError("a relation with an empty side")
    if operators == ["in"]:
        return Named(sides[0], read(sides[1]), "in") if NAME.fullmatch(sides[0]) else Text(text)
    if all(operator == "=" for operator in operators):
        return _equation(text, sides, read)
    return _inequality(text, sides, operators, read)


def _approximate(text: str, read: Read) -> Form | None:
    """`x = \\sqrt{13} \\approx 3.6`: the decimal only shows what the exact value is about."""
    head, *rest = split_top(text, _APPROXIMATELY)
    if len(rest) != 2 or not head.strip():
        return None
    exact, decimal = read(head), read(rest[1])
    value = exact.content if isinstance(exact, Named) and exact.relation == "=" else exact
    number = read_numeral(decimal.latex) if isinstance(decimal, Value) else None
    if not isinstance(value, Value) or not isinstance(decimal, Value) or number is None or NAME.fullmatch(strip(head)):
        return None
    stated = read_numeral(value.latex)
    if stated is not None and has_finite_decimal(stated.value):
        return exact if stated.value == number.value and stated.place is None else None
    if number.place is None or number.place > 0:
        return None
    both = Approximate(value if value.unit is not None else Value(value.latex, decimal.unit), decimal)
    return Named(exact.name, both) if isinstance(exact, Named) else both


def _quotient_name(text: str) -> str | None:
    """What `A : B`, `\\frac{AB}{CD}` and `AB/CD` are called; None for other expressions."""
    match = _QUOTIENT.fullmatch(text)
    if match is None or text.startswith("\\frac{d"):
        return None
    names = [strip(part) for part in (match[1] or match[3], match[2] or match[4], *(match[5] or "").split(":")[1:])]
    return ":".join(squeeze(re.sub(MARKS, "", name)) for name in names) if all(map(NAME.fullmatch, names)) else None


def _equation(text: str, sides: list[str], read: Read) -> Form:
    if len(sides) > 2:
        names, content = sides[:-1], read(sides[-1])
        plain = all(NAME.fullmatch(name) and WORDS_OPEN not in name for name in names)
        if plain and len(set(names)) == len(names) and isinstance(content, Value) and _is_number(content.latex):
            return Named("=".join(map(squeeze, names)), content)
        return Text(letters(text))
    left, right = sides
    for quotient, value in ((left, right), (right, left)):
        name = _quotient_name(quotient)
        if name is not None:
            content = read(value)
            terms = (
                content.terms if isinstance(content, Ratio) else (content.latex,) if isinstance(content, Value) else ()
            )
            if terms and all(map(_is_number, terms)):
                return Named(name, content)
    for name, value in ((left, right), (right, left)):
        if WORDS_OPEN in name and (name == right or _CLAIM.search(name)):
            continue
        if NAME.fullmatch(name) and not _mentions(value, name):
            content = read(value)
            if not isinstance(content, Text | Named | Relation) or WORDS_OPEN in value:
                return Named(squeeze(re.sub(MARKS, "", name)), content)
    numeric = _is_number(text)
    opaque = any(isinstance(read(side), Text) for side in sides if not re.fullmatch("[a-zA-Z]", side))
    return Text(letters(text)) if numeric or opaque else Relation("=", left, right)


def _is_number(text: str) -> bool:
    """Whether there are no letters in an expression that could be variables."""
    return not re.search(rf"[a-zA-Z]|\\(?:{GREEK})", re.sub(rf"\\(?!(?:{GREEK})(?![a-zA-Z]))[a-zA-Z]+", "", text))


def _mentions(value: str, name: str) -> bool:
    plain = re.sub(r"\\[a-zA-Z]+", lambda match: match[0] if match[0] == name else "", re.sub(MARKS, "", value))
    return (
        len(name) == 1
        and re.search(rf"(?<![a-zA-Z]){re.escape(name)}(?![a-zA-Z])|(?<=[\d)]){re.escape(name)}", plain) is not None
    )


def _inequality(text: str, sides: list[str], operators: list[str], read: Read) -> Form:
    """Solved inequalities become the set they describe: `x > 5`, `5 < x`, `0 \\le x < 1`, `x \\ne 2`."""
    sides, operators = _solved(sides, operators)
    if len(sides) == 2:
        (left, right), (operator,) = sides, operators
        if (NAME.fullmatch(right) or _DISTANCE.fullmatch(right)) and not NAME.fullmatch(left):
            left, right, operator = right, left, _FLIP.get(operator, operator)
        distance = _distance(left, right, operator)
        if distance is not None:
            return distance
        if NAME.fullmatch(left) and not _mentions(right, left):
            bound = read(right)
            content = {
                "<": Bracketed("(", ")", (MINUS_INFINITY, bound)),
                "<=": Bracketed("(", "]", (MINUS_INFINITY, bound)),
                ">": Bracketed("(", ")", (bound, INFINITY)),
                ">=": Bracketed("[", ")", (bound, INFINITY)),
                "!=": Excluded(bound.items if isinstance(bound, Listing) else (bound,)),
            }[operator]
            return Named(squeeze(left), content, "in")
        return Relation(operator, left, right)
    if len(sides) == 3 and NAME.fullmatch(sides[1]):
        if set(operators) <= {">", ">="}:
            sides, operators = sides[::-1], [_FLIP[operator] for operator in operators[::-1]]
        if set(operators) <= {"<", "<="}:
            left, right = "(" if operators[0] == "<" else "[", ")" if operators[1] == "<" else "]"
            return Named(squeeze(sides[1]), Bracketed(left, right, (read(sides[0]), read(sides[2]))), "in")
    return Text(letters(text))


def _solved(sides: list[str], operators: list[str]) -> tuple[list[str], list[str]]:
    """`-6 < 2x + 1 < 4` solved for x, where everything else is a number."""
    middle = next((side for side in sides if _LINEAR.fullmatch(side)), "")
    match = _LINEAR.fullmatch(middle)
    numbers = [None if side == middle else read_numeral(side) for side in sides]
    if match is None or NAME.fullmatch(middle) or sum(number is None for number in numbers) != 1:
        return sides, operators
    factor = read_numeral(match[1] + "1" if match[1] in ("", "+", "-") else match[1])
    offset = read_numeral(match[3].replace(" ", "")) if match[3] else None
    if factor is None or factor.value == 0 or (match[3] and offset is None):
        return sides, operators
    shift = offset.value if offset is not None else 0
    solved = [
        match[2] if number is None else fraction_latex((number.value - shift) / factor.value) for number in numbers
    ]
    return solved, operators if factor.value > 0 else [_FLIP.get(operator, operator) for operator in operators]


def _distance(left: str, right: str, operator: str) -> Form | None:
    """`|x - c| < a` is the interval around c, `|x - c| > a` what is left of and right of it."""
    match = _DISTANCE.fullmatch(left)
    if match is None or operator == "!=" or read_numeral(right) is None or _mentions(right, match[1]):
        return None
    centre = f"{'-' if match[2] == '+' else ''}({match[3]})" if match[3] else "0"
    low, high = Value(f"{centre}-({right})"), Value(f"{centre}+({right})")
    if operator in ("<", "<="):
        left_mark, right_mark = ("(", ")") if operator == "<" else ("[", "]")
        return Named(match[1], Bracketed(left_mark, right_mark, (low, high)), "in")
    left_mark, right_mark = ("(", ")") if operator == ">" else ("[", "]")
    below = Bracketed("(", right_mark, (Value("-\\infty"), low))
    return Named(match[1], Union((below, Bracketed(left_mark, ")", (high, Value("\\infty"))))), "in")


def name_of(form: Form) -> str:
    """What a form says it is the value of; empty when it does not."""
    return form.name if isinstance(form, Named) else ""


def set_of(form: Form) -> Form | None:
    """The set that an inequality describes, or None."""
    if isinstance(form, Named) and form.relation == "in" and isinstance(form.content, Bracketed | Union | Excluded):
        return form.content
    return None


def union_of(pieces: list[Form]) -> Form:
    """The union of sets, itself no union of unions."""
    flat: list[Form] = []
    for piece in pieces:
        flat += piece.pieces if isinstance(piece, Union) else [piece]
    return Union(tuple(flat)) if len(flat) > 1 else flat[0]


def intersection_of(items: list[Form]) -> Form | None:
    """`x > 1 and x < 3` is one interval."""
    spans = [set_of(item) for item in items]
    if len(items) != 2 or len({name_of(item) for item in items}) != 1:
        return None
    bounds = [span for span in spans if isinstance(span, Bracketed)]
    if len(bounds) != 2:
        return None
    lower = [span for span in bounds if span.items[1] == Value("\\infty")]
    upper = [span for span in bounds if span.items[0] == Value("-\\infty")]
    if len(lower) != 1 or len(upper) != 1:
        return None
    content = Bracketed(lower[0].left, upper[0].right, (lower[0].items[0], upper[0].items[1]))
    return Named(name_of(items[0]), content, "in")
