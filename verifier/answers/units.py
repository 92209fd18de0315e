"""Units of measure: what may follow a number without changing which number it is.

A unit is a product of powers of dimensions and a factor. Countable things ("apples") are dimensions of their own, so
5 apples are not 5 oranges. Whatever else follows a number ("5 tenths", "5 at most", "5 x") is not a unit, and the
answer is not that number.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from .spelling import DOLLAR, FUNCTIONS, WORDS_CLOSE, WORDS_OPEN


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measure.

    Attributes:
        dimensions (`tuple[tuple[str, int], ...]`):
            Dimension and exponent, sorted: (("length", 1), ("time", -1)) for m/s.
        factor (`Fraction`):
            How many base units it is.
        details (`frozenset[str]`):
            Words that describe the unit further: "red" in "red apples".
    """

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)
    details: frozenset[str] = frozenset()

    def agrees(self, other: "Unit") -> bool:
        """Whether a quantity in one unit can be converted to the other."""
        related = self.details <= other.details or other.details <= self.details
        return self.dimensions == other.dimensions and related


# Dimensions, factor, names in any case. Symbols of SI units are below.
_NAMES = """
length | 1 | meter metre
length | 254/10000 | inch inches in.
length | 3048/10000 | foot feet ft
length | 9144/10000 | yard yd
length | 1609344/1000 | mile mi
mass | 1/1000 | gram gm
mass | 1000 | ton tonne
mass | 45359237/100000000 | pound lb lbs
mass | 45359237/1600000000 | ounce oz
time | 1 | second sec
time | 60 | minute min
time | 3600 | hour hr h
time | 86400 | day
time | 604800 | week
month | 1 | month
month | 12 | year yr
length 3 | 1/1000 | liter litre
length 3 | 3785411784/1000000000000 | gallon gal
length 3 | 3785411784/4000000000000 | quart qt
length 3 | 3785411784/8000000000000 | pint pt
length 3 | 3785411784/16000000000000 | cup
degree | 1 | ° degree deg
radian | 1 | radian rad
percent | 1 | % percent pct
dollar | 1 | dollar usd buck
dollar | 1/100 | cent ¢
euro | 1 | euro eur €
sterling | 1 | £ gbp
yen | 1 | ¥ yen jpy
rupee | 1 | ₹ rs rupee
unit | 1 | unit
mass length 2 time -2 | 1 | joule
mass length time -2 | 1 | newton
mass length 2 time -3 | 1 | watt
mass length -1 time -2 | 1 | pascal
time -1 | 1 | hertz
current | 1 | ampere amp
current time | 1 | coulomb
mass length 2 time -3 current -1 | 1 | volt
mass length 2 time -3 current -2 | 1 | ohm
temperature | 1 | kelvin
amount | 1 | mole
"""
_SYMBOLS = """
length | 1 | m
mass | 1/1000 | g
time | 1 | s
current | 1 | A
temperature | 1 | K
amount | 1 | mol
length 3 | 1/1000 | L l
time -1 | 1 | Hz
mass length time -2 | 1 | N
mass length -1 time -2 | 1 | Pa
mass length 2 time -2 | 1 | J
mass length 2 time -3 | 1 | W
current time | 1 | C
mass length 2 time -3 current -1 | 1 | V
mass -1 length -2 time 4 current 2 | 1 | F
mass time -2 current -1 | 1 | T
mass length 2 time -3 current -2 | 1 | Ω
energy | 1 | eV
"""
_PREFIXES = {"p": -12, "n": -9, "u": -6, "μ": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
_PREFIX_NAMES = {"nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9}
_COMPOUND = {"mph": "miles per hour", "kmph": "km per hour", "kph": "km per hour", "mps": "m per s"}
_LOOSE_CASE = frozenset("cm km kg ft mi yd lb lbs oz hr hrs min mins sec secs mph kmph kph".split())
"""Symbols that people write in any case, and attach to a number without a space."""
_ATTACHED = _LOOSE_CASE | frozenset("mm dm mg ml mL ms kW MW Hz kHz MHz rad".split())
CURRENCIES = {DOLLAR: "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}

Dimensions = dict[str, int]


def _rows(table: str) -> list[tuple[Dimensions, Fraction, list[str]]]:
    rows = []
    for line in table.strip().splitlines():
        head, factor, words = (part.strip() for part in line.split("|"))
        powers = re.findall(r"([a-z]+)(?: (-?\d))?", head)
        rows.append(({name: int(power or 1) for name, power in powers}, Fraction(factor), words.split()))
    return rows


def _names() -> dict[str, tuple[Dimensions, Fraction]]:
    known = {}
    for dimensions, factor, words in _rows(_NAMES):
        for word in words:
            for name in (word, f"{word}s"):
                known[name] = (dimensions, factor)
                if len(word) > 4:
                    known |= {p + name: (dimensions, factor * Fraction(10) ** n) for p, n in _PREFIX_NAMES.items()}
    return known


def _symbols() -> dict[str, tuple[Dimensions, Fraction]]:
    known = {}
    for dimensions, factor, words in _rows(_SYMBOLS):
        for word in words:
            known |= {prefix + word: (dimensions, factor * Fraction(10) ** n) for prefix, n in _PREFIXES.items()}
    # After the prefixed ones: `m` is a metre, and no prefix without a unit.
    return known | {word: (dimensions, factor) for dimensions, factor, words in _rows(_SYMBOLS) for word in words}


NAMES, SYMBOLS = _names(), _symbols()
PERCENT = Unit((("percent", 1),))
DEGREE = Unit((("degree", 1),))

# Words that make a phrase a statement about a number instead of a unit of it.
_NO_UNIT = frozenset(
    "and or not more less than most least over under above about approximately nearly almost around between plus minus "
    "times divided by squared cubed factorial mod modulo base if when where is are was be for either neither from to with "
    "without only unless except but no none thus always perhaps possibly halves thirds fourths quarters fifths sixths sevenths "
    "eighths ninths tenths elevenths twelfths twentieths hundredths thousandths millionths billionths couples dozens scores tens "
    "hundreds thousands millions billions trillions lakhs crores others th st nd rd pi greater smaller equals otherwise versus vs "
    "remainders radix inverses reciprocals roots factors powers primes bases cases wrong incorrect false true".split()
)
_IRREGULAR = frozenset("people men women children mice fish sheep geese teeth dice players money coins class".split())
_TRAILING = frozenset(
    "old tall long wide high deep apart later ago away left remaining total altogether north south east west each overall".split()
)
_WORD = re.compile(r"(?:[a-zA-ZμΩ]|[°%¢€£¥₹])+\.?")
_FUNCTION = re.compile(rf"\\(?:{FUNCTIONS})(?![a-zA-Z])")
_TAIL = re.compile(
    rf"(?:\s*(?:{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE}|°|%|[€£¥₹¢]|(?<![a-zA-Z\\])[a-zA-Z]{{2,}}\.?(?![a-zA-Z(])"
    rf"|(?<=\s)per(?=\s)|(?<=[a-zA-Z{WORDS_CLOSE}])\s*(?:\^\s*\{{?\s*-?[1-9]\s*\}}?|/(?=\s*[a-zA-Z{WORDS_OPEN}])|\\cdot|\\times)"
    rf"|(?<=/)\s*[a-zA-Z](?![a-zA-Z])|(?<![a-zA-Z\\])m(?=\s*/\s*s(?![a-zA-Z]))))+\s*$"
)


def split_unit(text: str) -> tuple[str, Unit | None] | None:
    r"""Separate a cleaned quantity into its number and its unit.

    Args:
        text (`str`):
            Output of `clean`: `5 \text{cm}`, `$5`, `30°`, `12 apples`.

    Returns:
        `tuple[str, Unit | None]` or `None`: What is left of the text, and its unit (None without one);
        `None` when words are left that are not a unit.
    """
    text = text.strip()
    sign = text[:1] if text[:1] in "+-" else ""
    bare = text[len(sign) :].lstrip()
    if bare[:1] in CURRENCIES and len(bare) > 1:
        inner = split_unit(sign + bare[1:].strip())
        currency = Unit(((CURRENCIES[bare[0]], 1),))
        return (inner[0], currency) if inner and inner[1] in (None, currency) else None
    if text.endswith(DOLLAR):
        return text[:-1].strip(), Unit((("dollar", 1),))
    match = _TAIL.search(text)
    if match is None or not _is_worded(match[0], spaced=match[0][:1] == " "):
        return text, None
    if "°" in match[0] and _FUNCTION.search(text):  # \sin 30° is no angle
        return text, None
    value = text[: match.start()].rstrip("~- ")
    if not re.search(r"\d|\\|[a-zA-Z]", value) or value.endswith(("\\cdot", "\\times", "/", "+", "=", "^")):
        return None
    unit = read_unit(match[0], singular=value.strip() == "1")
    return None if unit is None else (value, unit if unit.dimensions else None)


def is_word(run: str) -> bool:
    """Whether a run of letters is a word (cm, apples, even) and not a product of variables (ab, xyz)."""
    if len(run) < 2:
        return False
    known = run in SYMBOLS or run.lower() in NAMES or run.lower() in _LOOSE_CASE
    return known or len(run) > 3 or (len(run) == 3 and re.search(r"[eiou]", run.lower()) is not None)


def _is_worded(tail: str, spaced: bool) -> bool:
    if re.search(rf"[{WORDS_OPEN}°%€£¥₹¢]", tail):
        return True
    if not spaced and (first := re.match(r"[a-zA-Z]{2,3}(?![a-zA-Z])", tail)):
        return first[0] in _ATTACHED or first[0].lower() in _LOOSE_CASE
    runs = re.findall(r"[a-zA-Z]{2,}", tail.replace("m/s", "meter"))
    return bool(runs) and all(is_word(run) or run == "per" for run in runs)


def read_unit(text: str, singular: bool = False) -> Unit | None:
    """Read the words behind a number as a unit, or return None where they are no unit.

    Args:
        text (`str`):
            The words, with powers and slashes.
        singular (`bool`, *optional*, defaults to `False`):
            Whether the number is 1, so that a thing may be named in the singular.
    """
    text = text.replace(WORDS_OPEN, " ").replace(WORDS_CLOSE, " ")
    text = re.sub(r"\\cdot|\\times|·|\bin (?:total|all)\b", " ", text).strip()
    for name, meaning in _COMPOUND.items():
        text = re.sub(rf"(?i)(?<![a-z]){name}\.?(?![a-z])", meaning, text)
    powers: dict[str, int] = {}
    factor, details = Fraction(1), []
    side, exponent, unknown = 1, 1, ""
    for match in re.finditer(rf"({_WORD.pattern})(?:\s*\^\s*\{{?\s*(-?[1-9])\s*\}}?)?|(/)|(\S)", text):
        word, power, slash, other = match.groups()
        if other and other not in "().,'-~":
            return None
        lower = (word or "").lower().rstrip(".")
        if slash or lower == "per":
            side = -1
        elif lower in ("square", "sq", "cubic", "cu"):
            exponent = 2 if lower in ("square", "sq") else 3
        elif word is not None:
            known = _atom(word)
            if known is None and (lower in _NO_UNIT or len(lower) < 2):
                return None
            if known is None:
                details.append(lower)
                unknown = "" if lower in _TRAILING else lower
                continue
            unknown = ""
            for name, size in known[0].items():
                powers[name] = powers.get(name, 0) + size * side * exponent * int(power or 1)
            factor *= known[1] ** (side * exponent * int(power or 1))
            exponent = 1
    if unknown:  # the phrase ends in a thing that is counted
        if not singular and not (unknown in _IRREGULAR or re.search(r"[^su]s$", unknown)):
            return None
        powers[_one_of(unknown)] = side
        details.remove(unknown)
    elif details and not powers:
        return None
    kept = tuple(sorted((name, power) for name, power in powers.items() if power))
    return Unit(kept, factor, frozenset(details) - _TRAILING - {"the", "a", "an", "different", "distinct", "possible"})


def _atom(word: str) -> tuple[Dimensions, Fraction] | None:
    for spelling in (word, word.rstrip(".")):
        if spelling in SYMBOLS and not (spelling.lower() in NAMES and len(spelling) > 2):
            return SYMBOLS[spelling]
        if spelling.lower() in NAMES and (len(spelling) > 2 or not spelling.isupper()):
            return NAMES[spelling.lower()]
        if spelling.lower() in _LOOSE_CASE and spelling.lower() in SYMBOLS:
            return SYMBOLS[spelling.lower()]
    return ({"length": 1}, Fraction(254, 10000)) if word == "in" else None


def _one_of(things: str) -> str:
    if things.endswith("ies"):
        return things[:-3] + "y"
    return things[:-1] if things.endswith("s") and len(things) > 3 else things
