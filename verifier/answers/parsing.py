r"""Reading an answer's structure: from a cleaned string to a `Form`."""

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, product
from math import prod

from .families import unqualified
from .forms import (
    ALL_REALS,
    EMPTY,
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
    Text,
    Value,
)
from .latex import clean, letters, matching, split_top, strip, tokens
from .numerals import GROUPED_LIST, fraction_latex, is_astronomical, read_numeral
from .real_sets import difference, intersection, simplified
from .relations import NAME, RELATION, intersection_of, name_of, read_relation, set_of, union_of
from .spelling import DOLLAR, ROW_BREAK, WORDS_CLOSE, WORDS_OPEN
from .units import DEGREE, Unit, is_word, split_unit
from .words import AND, OR, read_words

_LOOSE_COMMA = re.compile(r"\s*[,;]\s+|\s*;\s*|\s+,\s*")
_COMMA = re.compile(r"\s*[,;]\s*")
_FOREIGN = re.compile(
    "|".join(
        (
            r"\\(?:equiv|sim|cong|Rightarrow|implies|iff|to|rightarrow|mapsto|notin|subset|subseteq|parallel|perp|forall|exists)(?![a-zA-Z])",
            r"\\(?:d?dots|ldots|cdots|vee|wedge|lor|land|neg|lnot|oplus|otimes|circ|nabla|partial|angle|triangle|cap|mid)(?![a-zA-Z])",
            r"\\begin\s*\{(?![pv]matrix)",
            r"\.\.\.|→|\?|(?<!\\)#|!!|'|(?<![a-zA-Z\\])[a-zA-Z]\[",
            DOLLAR,
            r"\\frac\s*\{\s*(?:d|\\mathrm\{d\})\s*[a-zA-Z]?\s*\}",  # a derivative
            r"\\(?:gcd|lcm)[^,]*[a-zA-Z].*",  # sympy takes variables for coprime polynomials
            r"\\vec.*\\(?:cdot|times)[^a-zA-Z].*\\vec|\\vec.*\\(?:cdot|times)\\vec",  # products of vectors
            r"[A-Z]\s*\^\s*\{?\s*(?:-\s*1|T|\\top)\s*\}?",  # products of matrices do not commute
            r"([a-zA-Z]).*[a-zA-Z]\1\^\{?-1|([a-zA-Z])\^\{?-1\}?[a-zA-Z]\2",  # nor do those of a group
        )
    )
)
"""What math-verify's parser has no reading for, or a wrong one: compared letter by letter."""
_SET_OPERATION = re.compile(r"\\(?:cup|cap|setminus)(?![a-zA-Z])|\}\s*-\s*\\\{")
_CHOICE = re.compile(rf"{WORDS_OPEN}?\s*(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*{WORDS_CLOSE}?\s*(\S.*)", re.DOTALL)
_LETTER = re.compile(
    rf"{WORDS_OPEN}?\s*(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*{WORDS_CLOSE}?\s*)?{WORDS_OPEN}?(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[.)]?)\s*{WORDS_CLOSE}?"
)
_MATRIX = re.compile(r"\\begin\s*\{pmatrix\}((?:(?!\\begin).)*)\\end\s*\{pmatrix\}", re.DOTALL)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
_CLOCK = re.compile(
    rf"(\d{{1,2}})\s*:\s*([0-5]\d)\s*(?::\s*([0-5]\d)\s*)?(?:{WORDS_OPEN}?\s*([ap])\.?\s*m\.?\s*{WORDS_CLOSE}?)?",
    re.IGNORECASE,
)
_ORDINAL = re.compile(
    r"\s*(?:[Tt]he\s+)?(?P<number>\d+)\s*\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?"
    r"(?:\s+(?P<thing>day|place|position|year|month|week|term|row|column|floor|page|person|student|child|house|round|game|step|century))?\s*"
)
"""The 15th, 15^{th} and 15th day. Not every noun may follow: a 5th root is not 5, and the 5th prime is 11."""
_ANGLE = re.compile(r"-?\s*(\d+(?:\.\d+)?)\s*°\s*(?:(\d+(?:\.\d+)?)\s*'(?!'))?\s*(?:(\d+(?:\.\d+)?)\s*(?:''|\"))?")
_HOUR = re.compile(rf"(\d{{1,2}})\s*{WORDS_OPEN}?\s*([ap])\.?\s*m\.?\s*{WORDS_CLOSE}?", re.IGNORECASE)
_POINT = re.compile(r"^[A-Z](?=\([^()]*\d[^()]*,[^()]*\)$)")
_CONGRUENCE = re.compile(
    r"(?:(?P<name>[a-zA-Z])\s*\\equiv\s*)?(?P<rest>-?\d+)\s*\(?\s*\\?p?(?:mod|pmod|bmod)\s*\{?\s*(?P<modulus>\d+)\s*\}?\s*\)?"
)
_TO = re.compile(rf"(\d+)\s*{WORDS_OPEN}?\s*to\s*{WORDS_CLOSE}?\s*(\d+)")
_QUANTITIES = re.compile(rf"\d[\d.,]*\s*(?:{WORDS_OPEN}[^{WORDS_CLOSE}\d]*{WORDS_CLOSE}|[a-zA-Z]{{2,}})\s*")
_RATIO = re.compile(r"(?<![a-zA-Z\\]):|\s:\s")
_POWERS = {
    "hundred": 2,
    "thousand": 3,
    "lakh": 5,
    "million": 6,
    "crore": 7,
    "billion": 9,
    "bn": 9,
    "trillion": 12,
    "quadrillion": 15,
}
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
    "twelfth": 12,
}
_PARTS |= {"hundredth": 100, "thousandth": 1000, "millionth": 10**6}
_SCALE = {
    **{word: f"10^{{{power}}}" for word, power in _POWERS.items()},
    **{word: f"\\frac{{1}}{{{part}}}" for word, part in _PARTS.items()},
    **{"dozen": "12", "score": "20", "gross": "144"},
}
_SCALED = re.compile(
    rf"(\d)\s*{WORDS_OPEN}?\s*({'|'.join(sorted(_SCALE, key=len, reverse=True))})s?(?![a-zA-Z])\s*(?=({WORDS_CLOSE})?)"
)
MAX_SIGNS = 64
"""Points that a tuple full of ± may stand for."""
_APPROXIMATELY = re.compile(
    rf"^\s*(?:\\approx|{WORDS_OPEN}\s*(?:approximately|about)\s*{WORDS_CLOSE}|approximately)\s*"
)


@lru_cache(maxsize=4096)
def read_form(text: str, grouping: bool = True) -> Form | None:
    """Read an answer's structure.

    Args:
        text (`str`):
            The answer as it was written.
        grouping (`bool`, *optional*, defaults to `True`):
            Whether `1,234` is a number (else it is the list of 1 and 234).

    Returns:
        `Form` or `None`: None for a text that has no meaning (nothing in it, or brackets that do not match).
    """
    cleaned = strip(_APPROXIMATELY.sub("", clean(text)))
    return read_cleaned(re.sub(rf"^({WORDS_OPEN}?\s*)([A-J])\)(?=.)", r"\1(\2)", cleaned), grouping)  # B) 5


def read_cleaned(cleaned: str, grouping: bool = True) -> Form | None:
    """As [`read_form`], for what `clean` has been through."""
    try:
        tokens(cleaned)
        body, qualifier = unqualified(cleaned)
        if not re.search(r"\w|\\emptyset|\\\{", cleaned):
            return None
        return _read(cleaned, grouping) if qualifier is None else Qualified(_read(body, grouping), qualifier)
    except (ValueError, RecursionError):
        return None


def _read(text: str, grouping: bool = True) -> Form:
    text = strip(text)
    if not text:
        raise ValueError("an empty part")
    if read_numeral(text) is not None and (grouping or not GROUPED_LIST.fullmatch(text)):
        return Value(text)
    return (
        _read_letter(text)
        or read_words(text)
        or _read_list(text, grouping)
        or _read_union(text)
        or read_relation(text, _read)
        or _read_grouped(text)
        or _read_matrix(text)
        or _read_value(text)
    )


def _read_letter(text: str) -> Form | None:
    letter = _LETTER.fullmatch(text)
    if letter is not None:
        return Text(letter[1] or letter[2])
    choice = _CHOICE.fullmatch(text)
    named = choice is not None and re.match(rf"{WORDS_OPEN}?[A-J]\s*:\s*[A-Z]{{1,3}}\s*[:=]", text)  # A : B = 7 : 32
    if choice is not None and not named and not re.match(r"[=<>+^*/-]|\\(?:times|cdot|pm)", choice[3]):
        return Choice(choice[1] or choice[2], _read(choice[3]))
    return None


def _read_list(text: str, grouping: bool) -> Form | None:
    """Split `a, b and c`; an "or" between inequalities makes a union, an "and" an interval."""
    for pattern in (OR, AND, _LOOSE_COMMA if grouping else _COMMA, _COMMA):
        parts = split_top(text, pattern)[::2]
        if len(parts) == 1 or (pattern is _COMMA and _is_grouped(text, grouping)):
            continue
        if not all(part.strip() for part in parts):
            return Text(letters(text))
        items = [_read(part, grouping) for part in parts]
        if pattern is OR:
            spans = [set_of(item) for item in items]
            if len({name_of(item) for item in items if isinstance(item, Named)}) > 1:
                return Text(letters(text))  # x = 1 or y = 2 is neither a list nor a point
            if all(span is not None for span in spans):
                return Named(name_of(items[0]), union_of([span for span in spans if span is not None]), "in")
        if pattern is AND:
            both = intersection_of(items)
            if both is not None:
                return both
        flat: list[Form] = []
        for item in items:
            flat += item.items if isinstance(item, Listing) else [item]
        if (total := _total(flat)) is not None and pattern is not OR:
            return total
        return Listing(tuple(_share_name(flat))) if len(flat) > 1 else flat[0]
    return None


def _total(parts: Sequence[Form]) -> Value | None:
    """One quantity given in several units, large to small: 2 hours and 30 minutes."""
    sizes, total = [], Fraction(0)
    for part in parts:
        number = read_numeral(part.latex) if isinstance(part, Value) else None
        if number is None or not isinstance(part, Value) or part.unit is None:
            return None
        sizes.append(part.unit)
        total += number.value * part.unit.factor
    falling = all(one.factor > other.factor for one, other in pairwise(sizes))
    if len(parts) < 2 or len({unit.dimensions for unit in sizes}) > 1 or not falling:
        return None
    return Value(fraction_latex(total), Unit(sizes[0].dimensions))


def _is_grouped(text: str, grouping: bool) -> bool:
    return grouping and "," not in _GROUPED.sub("0", text)


def _share_name(items: list[Form]) -> list[Form]:
    """`x = 1, 2` names both values."""
    first = items[0]
    if isinstance(first, Named) and first.relation == "=" and not any(isinstance(item, Named) for item in items[1:]):
        return [first, *(Named(first.name, item) for item in items[1:])]
    return items


def _read_union(text: str) -> Form | None:
    """Operations on sets. A relation binds weaker: the union in `x \\in A \\cup B` is read with its right side."""
    if not _SET_OPERATION.search(text) or len(split_top(text, RELATION)) > 1:
        return None
    for mark in ("cup", "cap", "setminus"):
        pattern = re.compile(
            rf"\s*\\{mark}(?![a-zA-Z])\s*" + (r"|(?<=\})\s*-\s*(?=\\\{)" if mark == "setminus" else "")
        )
        pieces = split_top(text, pattern)[::2]
        if len(pieces) == 1:
            continue
        parts = [_read(piece) for piece in pieces]
        if mark == "cup":
            return simplified(union_of(parts))
        operate = intersection if mark == "cap" else difference
        result = operate(parts[0], parts[1]) if len(parts) == 2 else None
        if result is None and mark == "setminus" and parts[0] == ALL_REALS:
            points = parts[1]
            result = Excluded(points.items if isinstance(points, Collection | Listing) else (points,))
        return result or Text(letters(text))
    return None


def _read_grouped(text: str) -> Form | None:
    """What stands in brackets as a whole: a tuple, an interval, a set, or one value in superfluous parentheses."""
    point = _POINT.match(text)
    if point is not None and isinstance(inner := _read_grouped(text[1:]), Bracketed):
        return Named(point[0], inner)
    opener = next((mark for mark in ("\\{", "\\langle", "(", "[") if text.startswith(mark)), None)
    if opener is None:
        return None
    end = matching(text, 0)
    closer = None if end is None else text[end:]
    if closer not in ("\\}", "\\rangle", ")", "]"):
        return None
    inner = text[len(opener) : end].strip()
    if opener == "\\{":
        return _read_set(inner)
    if opener == "\\langle":
        opener, closer = "(", ")"
    parts = split_top(inner, _COMMA)[::2]
    if len(parts) == 1:
        return _read(inner) if (opener, closer) == ("(", ")") else Value(text)
    if any(not part.strip() for part in parts):
        raise ValueError("a tuple with an empty place")
    if "\\mp" in inner:  # the signs go together
        return Listing(tuple(_read(opener + _plus_minus(inner, sign) + closer) for sign in "+-"))
    items = [_read(part) for part in parts]
    choices = [
        item.items if isinstance(item, Listing) and "\\pm" in part else (item,)
        for item, part in zip(items, parts, strict=True)
    ]
    if prod(map(len, choices)) > MAX_SIGNS:
        raise ValueError("too many signs")
    if max(map(len, choices)) > 1:  # (\\pm 1, 0) is two points, (\\pm 1, \\pm 1) is four
        return Listing(tuple(Bracketed(opener, closer, version) for version in product(*choices)))
    return Bracketed(opener, closer, tuple(items))


def _read_set(inner: str) -> Form:
    if not inner:
        return EMPTY
    builder = split_top(inner, re.compile(r"\s*[|:]\s*"))[::2]
    name, _, domain = builder[0].partition("\\in")
    if len(builder) == 2 and NAME.fullmatch(name.strip()) and (not domain or "R" in domain):
        condition = _read(builder[1])
        return (
            condition.content if isinstance(condition, Named) and condition.relation == "in" else Text(letters(inner))
        )
    items = _read(inner, grouping=False)
    return Collection(items.items if isinstance(items, Listing) else (items,))


def _read_matrix(text: str) -> Form | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in match[1].split(ROW_BREAK) if row.strip()]
    return Grid(tuple(tuple(_read(cell) for cell in row.split("&")) for row in rows), text)


def _read_value(text: str) -> Form:
    ordinal = _ORDINAL.fullmatch(re.sub(f"[{WORDS_OPEN}{WORDS_CLOSE}]", " ", text))
    if ordinal is not None:
        thing = (ordinal["thing"] or "").lower()
        return Value(ordinal["number"], Unit(((f"{thing} by number", 1),)) if thing else None)
    angle = _ANGLE.fullmatch(text)
    if angle is not None and (angle[2] or angle[3]):
        size = sum((Fraction(part or 0) / 60**power for power, part in enumerate(angle.groups())), Fraction(0))
        return Value(fraction_latex(-size if text[0] == "-" else size), DEGREE)
    clock = _CLOCK.fullmatch(text)
    if clock is not None:
        return Ratio(tuple(part for part in clock.groups()[:3] if part), (clock[4] or "clock").lower())
    hour = _HOUR.fullmatch(text)
    if hour is not None:
        return Ratio((hour[1], "00"), hour[2].lower())
    congruence = _CONGRUENCE.fullmatch(text)
    if congruence is not None and int(congruence["modulus"]):
        modulus = int(congruence["modulus"])
        return Text(f"{int(congruence['rest']) % modulus} mod {modulus}")
    between = _TO.fullmatch(text)
    if between is not None:
        return Ratio((between[1], between[2]))
    parts = _QUANTITIES.findall(text)
    if len(parts) > 1 and "".join(parts) == text and (total := _total([_read(part) for part in parts])) is not None:
        return total
    text = _SCALED.sub(lambda match: f"{match[1]}\\cdot {_SCALE[match[2]]} {WORDS_OPEN if match[3] else ''}", text)
    text = strip(re.sub(rf"{WORDS_OPEN}\s*{WORDS_CLOSE}", "", text))
    if is_astronomical(text):
        return Text(letters(text))
    if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return Listing(tuple(_read(_plus_minus(text, sign)) for sign in "+-"))
    terms = split_top(text, _RATIO)[::2]
    if len(terms) > 1:
        return Ratio(tuple(strip(term) for term in terms))
    quantity = split_unit(text)
    if quantity is None or not _is_expression(quantity[0]):
        return Text(letters(text))
    value, unit = quantity
    if value != text and unit is None:
        return _read(value)
    if value != text and not isinstance(inner := _read(value), Value):
        return _with_unit(inner, unit) or Text(letters(text))
    return Value(strip(value), unit)


def _with_unit(form: Form, unit: Unit | None) -> Form | None:
    """A unit behind a list belongs to each of its values."""
    items = form.items if isinstance(form, Listing) else ()
    plain = [item for item in items if isinstance(item, Value) and item.unit is None]
    return Listing(tuple(Value(item.latex, unit) for item in plain)) if plain and len(plain) == len(items) else None


def _plus_minus(text: str, sign: str) -> str:
    other = "-" if sign == "+" else "+"
    text = re.sub(r"\\pm(?![a-zA-Z])\s*", sign, text)
    return re.sub(r"\\mp(?![a-zA-Z])\s*", other, text).removeprefix("+")


def _is_expression(text: str) -> bool:
    """Whether math-verify may read this as mathematics: no words in it, no digits side by side, no foreign signs."""
    if WORDS_OPEN in text or _FOREIGN.search(text) or re.search(rf"\d\s+\d|[^\x00-\x7f°{ROW_BREAK}]", text):
        return False
    bare = re.sub(r"\\(?:begin|end)\{[a-z]+\}|\\[a-zA-Z]+", " ", text)
    return not any(is_word(run) for run in re.findall(r"[a-zA-Z]{3,}", bare))
