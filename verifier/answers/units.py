"""Units of measure: what may follow a number without changing which number it is.

A unit is a product of powers of dimensions and a factor. Words that are no known unit ("apples") are dimensions of
their own, so 5 apples are not 5 oranges.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from .latex import FUNCTIONS, WORDS_CLOSE, WORDS_OPEN


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of measure.

    Attributes:
        dimensions (`tuple[tuple[str, int], ...]`):
            Dimension and exponent, sorted: (("length", 1), ("time", -1)) for m/s.
        factor (`Fraction`):
            How many base units it is.
    """

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction = Fraction(1)


PERCENT = Unit((("percent", 1),))
DEGREE = Unit((("degree", 1),))

_TABLE = """
length 1: m meter metre meters metres
length 1/1000: mm millimeter millimetre millimeters millimetres
length 1/100: cm centimeter centimetre centimeters centimetres
length 1/10: dm decimeter decimetre decimeters decimetres
length 1000: km kilometer kilometre kilometers kilometres
length 254/10000: in. inch inches
length 3048/10000: ft foot feet
length 9144/10000: yd yard yards
length 1609344/1000: mi mile miles
mass 1: g gram grams
mass 1/1000: mg milligram milligrams
mass 1000: kg kilogram kilograms
mass 1000000: ton tons tonne tonnes
mass 45359237/100000: lb lbs pound pounds
mass 45359237/1600000: oz ounce ounces
time 1: s sec secs second seconds
time 1/1000: ms millisecond milliseconds
time 60: min mins minute minutes
time 3600: h hr hrs hour hours
time 86400: day days
time 604800: week weeks
month 1: month months
month 12: year years yr yrs
volume 1: l liter litre liters litres
volume 1/1000: ml milliliter millilitre milliliters millilitres
volume 1/100: cl
gallon 1: gallon gallons gal
gallon 1/4: quart quarts
gallon 1/8: pint pints
gallon 1/16: cup cups
degree 1: ° degree degrees deg
radian 1: rad rads radian radians
percent 1: % percent percents pct
dollar 1: dollar dollars usd bucks
dollar 1/100: cent cents ¢
euro 1: euro euros eur €
sterling 1: £ gbp
yen 1: ¥ yen jpy
rupee 1: rs rupee rupees ₹
energy 1: j joule joules
energy 1000: kj kilojoule kilojoules
power 1: w watt watts
power 1000: kw kilowatt kilowatts
voltage 1: volt volts
current 1: amp amps ampere amperes
force 1: newton newtons
frequency 1: hz hertz
dozen 1: dozen
square 1: units^2
"""
_ATOMS: dict[str, tuple[str, Fraction]] = {}
for _line in _TABLE.strip().splitlines():
    _head, _, _names = _line.partition(":")
    _dimension, _, _factor = _head.partition(" ")
    _ATOMS |= dict.fromkeys(_names.split(), (_dimension, Fraction(_factor)))
_COMPOUND = {"mph": "miles per hour", "kmph": "km per hour", "kph": "km per hour", "mps": "m per s", "sq": "square"}
_PLAIN_SYMBOLS = frozenset(
    "mm cm dm km kg mg ml cl ms ft yd mi lb lbs oz hr hrs min mins sec mph kmph kph kw hz rad".split()
)
"""Unit symbols that are recognised without a space or `\\text`; a single letter would be a variable there."""
CURRENCIES = {"\ue002": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}

# Words that make a phrase a statement about a number instead of a unit of it.
_NO_UNIT = frozenset(
    "and or not more less than most least over under above about approximately nearly almost around between plus minus "
    "times divided by squared cubed factorial mod modulo base if when where is are was be for each either neither from to "
    "with without only unless except but no none half thirds third fourths quarters hundred thousand million billion "
    "trillion th st nd rd pi even odd positive negative undefined infinite infinity greater smaller equal equals of on at in".split()
)
_NEUTRAL = frozenset("unit units u the a an total whole number numbers digits".split())
_FUNCTION = re.compile(rf"\\(?:{FUNCTIONS})(?![a-zA-Z])")
_WORD = re.compile(r"[a-zA-Z°%¢€£¥₹]+\.?")
_TAIL = re.compile(
    rf"(?:\s*(?:{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE}|°|%|[€£¥₹¢]|(?<![a-zA-Z\\])[a-zA-Z]{{2,}}\.?(?![a-zA-Z(])"
    rf"|(?<=\s)per(?=\s)|(?<=[a-zA-Z{WORDS_CLOSE}])\s*(?:\^\s*\{{?\s*-?[1-9]\s*\}}?|/(?=\s*[a-zA-Z{WORDS_OPEN}])|\\cdot)"
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
        rest = sign + bare[1:].strip()
        inner = split_unit(rest)
        currency = Unit(((CURRENCIES[bare[0]], 1),))
        return (inner[0], currency) if inner and inner[1] in (None, currency) else None
    if text.endswith("\ue002"):
        return text[:-1].strip(), Unit((("dollar", 1),))
    match = _TAIL.search(text)
    if match is None or not _is_worded(match[0], spaced=match[0][:1] == " "):
        return text, None
    if "°" in match[0] and _FUNCTION.search(text):  # \\sin 30° is no angle
        return text, None
    value = text[: match.start()].rstrip().removesuffix("\\cdot").rstrip("~- ")
    if not re.search(r"\d|\\|[a-zA-Z]", value):
        return None
    unit = read_unit(match[0])
    return None if unit is None else (value, unit if unit.dimensions else None)


def is_word(run: str) -> bool:
    """Whether a run of letters is a word (cm, apples, even) and not a product of variables (ab, xyz)."""
    run = run.lower()
    return (
        len(run) > 3 or (len(run) > 1 and run in _ATOMS) or (len(run) == 3 and re.search(r"[eiou]", run) is not None)
    )


def _is_worded(tail: str, spaced: bool) -> bool:
    if re.search(rf"[{WORDS_OPEN}°%€£¥₹¢]", tail):
        return True
    if not spaced and (first := re.match(r"[a-zA-Z]{2,3}(?![a-zA-Z])", tail)):
        return first[0].lower() in _PLAIN_SYMBOLS
    runs = re.findall(r"[a-zA-Z]{2,}", tail.replace("m/s", "meter"))
    return bool(runs) and all(is_word(run) or run == "per" for run in runs)


def read_unit(text: str) -> Unit | None:
    """Read the words behind a number as a unit, or return None where they are no unit."""
    text = text.replace(WORDS_OPEN, " ").replace(WORDS_CLOSE, " ").replace("\\cdot", " ").strip()
    words = text.lower()
    for name, meaning in _COMPOUND.items():
        words = re.sub(rf"(?<![a-z]){name}\.?(?![a-z])", meaning, words)
    powers: dict[str, int] = {}
    factor = Fraction(1)
    side, pending = 1, 1
    for match in re.finditer(rf"({_WORD.pattern})(?:\s*\^\s*\{{?\s*(-?[1-9])\s*\}}?)?|(/)|(\S)", words):
        word, power, slash, other = match.groups()
        if other and other not in "().,'-":
            return None
        if slash or word == "per":
            side = -1
        elif word in ("square", "sq."):
            pending = 2
        elif word == "cubic":
            pending = 3
        elif word is not None:
            name, size = _atom(word)
            if name is None:
                return None
            if name:
                exponent = side * pending * int(power or 1)
                powers[name] = powers.get(name, 0) + exponent
                factor *= size**exponent
            pending = 1
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), factor)


def _atom(word: str) -> tuple[str | None, Fraction]:
    """Dimension and factor of one word; an empty dimension for words that mean nothing, None for words that forbid."""
    known = _ATOMS.get(word) or _ATOMS.get(word.rstrip("."))
    word = word.rstrip(".")
    if known is not None:
        return known
    if word in _NO_UNIT:
        return None, Fraction(1)
    if word in _NEUTRAL:
        return "", Fraction(1)
    singular = word[:-3] + "y" if word.endswith("ies") else word[:-1] if word.endswith("s") and len(word) > 3 else word
    return singular, Fraction(1)
