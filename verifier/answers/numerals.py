r"""Numbers that are written out: integers, decimals, fractions, mixed numbers, powers of ten, other bases.

Everything is exact (`fractions.Fraction`): whether two numerals are equal never depends on floating point.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_EXPONENT = 400
"""Powers of ten beyond this are not multiplied out: such a number equals only what is written the same way."""

SIGNIFICANT_DIGITS = 6
"""A decimal stands for a number that has no finite decimal only when it gives at least this many digits, rightly rounded."""


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number that was written out.

    Attributes:
        value (`Fraction`):
            Its exact value.
        place (`int`, *optional*):
            For a decimal, the power of ten of its last digit (-2 for 0.25); None for integers and fractions.
    """

    value: Fraction
    place: int | None = None

    def rounds(self, exact: Fraction, tolerance: Fraction = Fraction(0)) -> bool:
        """Whether this decimal is `exact`, rounded, and gives enough digits of it.

        Enough means six significant digits, and a last digit of at most one millionth of the number (or of 1 for
        numbers below 1): 0.333333 stands for 1/3, 0.3333 and 3.1416 stand only for themselves.

        Args:
            exact (`Fraction`):
                The number to compare with; itself known up to `tolerance`.
            tolerance (`Fraction`, *optional*, defaults to `0`):
                How far `exact` may be off.
        """
        if self.place is None or self.value == 0:
            return False
        unit = Fraction(10) ** self.place
        fine = unit * 10**SIGNIFICANT_DIGITS <= max(abs(exact), 1)
        digits = len(str(abs(self.value / unit).numerator))
        return fine and digits >= SIGNIFICANT_DIGITS and abs(self.value - exact) <= unit / 2 + tolerance

    def rounded_is(self, exact: Fraction) -> bool:
        """Whether this decimal is `exact`, rounded (half up) to the decimal's own places.

        One digit is too little to say so: 0.3 stands for 3/10 and not for 1/3.
        """
        if self.place is None or abs(self.value) < Fraction(10) ** (self.place + 1):
            return False
        unit = Fraction(10) ** self.place
        if (self.value / unit) % 10 == 0:  # 2.0 is 2
            return False
        return (abs(exact) / unit + Fraction(1, 2)) // 1 * unit == abs(self.value) and (exact < 0) == (self.value < 0)


def has_finite_decimal(value: Fraction) -> bool:
    """Whether a number can be written out as a decimal."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


_GROUPED = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_DECIMAL = rf"(?:{_GROUPED})(?:\.\d*)?|\.\d+"
_FRACTION = r"\\frac\s*\{\s*([-+]?)\s*(\d+|\d{1,3}(?:,\d{3})+)\s*\}\s*\{\s*([-+]?)\s*(\d+|\d{1,3}(?:,\d{3})+)\s*\}"
_SIGN = r"\s*([-+]?)\s*"
_PLAIN = re.compile(rf"{_SIGN}({_DECIMAL})\s*")
_SLASH = re.compile(rf"{_SIGN}(\d+)\s*/\s*([-+]?)\s*(\d+)\s*")
_LATEX_FRACTION = re.compile(rf"{_SIGN}{_FRACTION}\s*")
_MIXED = re.compile(r"\s*([-+]?)\s*(\d+)\s*(?:\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|\s(\d+)\s*/\s*(\d+))\s*")
_POWER = r"10\s*\^\s*(?:\{\s*([-+]?)\s*(\d+)\s*\}|(\d))"
_SCIENTIFIC = re.compile(rf"{_SIGN}(?:({_DECIMAL})\s*\\(?:times|cdot)\s*)?{_POWER}\s*")
_E_NOTATION = re.compile(rf"{_SIGN}({_DECIMAL})[eE]([-+]?)(\d+)\s*")
_REPEATING = re.compile(rf"{_SIGN}(\d+)\.(\d*)\s*\\overline\s*\{{\s*(\d+)\s*\}}\s*(?:\\dots)?")
_BASED = re.compile(
    r"\s*([-+]?)\s*\(?[\s\ue000]*([0-9A-Fa-f]+)[\s\ue001]*\)?\s*_\s*\{[\s\ue000]*(\d{1,2}|[a-z]+)[\s\ue001]*\}\s*"
)
_BASE_NAMES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE_NAMES |= {"twelve": 12, "sixteen": 16}

GROUPED_LIST = re.compile(r"\s*\d{1,3}(?:,\d{3})+\s*")
"""A grouped integer that could also be meant as a list: 1,234."""


def read_numeral(text: str) -> Numeral | None:
    """Read a cleaned string that is one number, or return None.

    Args:
        text (`str`):
            Output of `clean`.

    Returns:
        [`Numeral`] or `None`: None also for powers of ten beyond `MAX_EXPONENT`.
    """
    if not any(char.isdigit() for char in text):
        return None
    for pattern, convert in _READERS:
        match = pattern.fullmatch(text)
        if match is not None:
            return convert(match)
    return None


def fraction_latex(value: Fraction) -> str:
    """A fraction as LaTeX."""
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def decimal_latex(value: Fraction, place: int) -> str:
    """A finite decimal with its last digit at a place, a power of ten of at most 0."""
    digits = f"{abs(value.numerator) * 10**-place // value.denominator:0{1 - place}d}"
    return f"{'-' if value < 0 else ''}{digits[:place] if place else digits}.{digits[place:] if place else ''}"


def is_astronomical(text: str) -> bool:
    """Whether a cleaned string is a power of ten that is too large (or too small) to multiply out."""
    return any(pattern.fullmatch(text) for pattern in (_SCIENTIFIC, _E_NOTATION)) and read_numeral(text) is None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _decimal(sign: str, digits: str) -> Numeral:
    digits = digits.replace(",", "").replace(" ", "")
    whole, dot, part = digits.partition(".")
    value = Fraction(int(whole + part or "0"), 10 ** len(part))
    return Numeral(_signed(sign, value), -len(part) if dot and part else None)


def _quotient(sign: str, top: int, below: int) -> Numeral | None:
    return Numeral(_signed(sign, Fraction(top, below))) if below else None


def _plain(match: re.Match[str]) -> Numeral:
    return _decimal(match[1], match[2])


def _slash(match: re.Match[str]) -> Numeral | None:
    return _quotient(_times(match[1], match[3]), int(match[2]), int(match[4]))


def _latex_fraction(match: re.Match[str]) -> Numeral | None:
    sign = _times(_times(match[1], match[2]), match[4])
    return _quotient(sign, int(match[3].replace(",", "")), int(match[5].replace(",", "")))


def _times(one: str, other: str) -> str:
    return "-" if (one == "-") != (other == "-") else "+"


def _mixed(match: re.Match[str]) -> Numeral | None:
    top, below = int(match[3] or match[5]), int(match[4] or match[6])
    if below == 0 or top >= below:  # 2 7/3 is not a mixed number
        return None
    return Numeral(_signed(match[1], int(match[2]) + Fraction(top, below)))


def _scientific(match: re.Match[str]) -> Numeral | None:
    digits = (match[4] or match[5])[:6]
    exponent = -int(digits) if match[3] == "-" else int(digits)
    return _shifted(_decimal(match[1], match[2] or "1"), exponent)


def _e_notation(match: re.Match[str]) -> Numeral | None:
    exponent = int(match[4][:6])
    return _shifted(_decimal(match[1], match[2]), -exponent if match[3] == "-" else exponent)


def _shifted(mantissa: Numeral, exponent: int) -> Numeral | None:
    if abs(exponent) > MAX_EXPONENT:
        return None
    place = None if mantissa.place is None else mantissa.place + exponent
    return Numeral(mantissa.value * Fraction(10) ** exponent, place)


def _repeating(match: re.Match[str]) -> Numeral:
    _, whole, start, period = match.groups()
    shift = 10 ** len(start)
    value = int(whole) + Fraction(int(start or "0"), shift) + Fraction(int(period), (10 ** len(period) - 1) * shift)
    return Numeral(_signed(match[1], value))


def _based(match: re.Match[str]) -> Numeral | None:
    base_text = match[3]
    base = int(base_text) if base_text.isdigit() else _BASE_NAMES.get(base_text, 0)
    digits = [int(digit, 16) for digit in match[2]]
    if not 2 <= base <= 16 or max(digits) >= base:
        return None
    value = 0
    for digit in digits:
        value = value * base + digit
    return Numeral(_signed(match[1], Fraction(value)))


_READERS = (
    (_PLAIN, _plain),
    (_LATEX_FRACTION, _latex_fraction),
    (_SLASH, _slash),
    (_MIXED, _mixed),
    (_SCIENTIFIC, _scientific),
    (_E_NOTATION, _e_notation),
    (_REPEATING, _repeating),
    (_BASED, _based),
)
