r"""Values compared by math-verify: its parser, its verdict, and guards around both. Runs in a worker; loads sympy.

Every guard names the fault it works around; `tests/test_workarounds.py` fails when one is no longer needed.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify

from .equality import Exact, Undecided
from .numerals import Numeral, fraction_latex, has_finite_decimal, read_numeral
from .spelling import ROW_BREAK

DIGITS = 40
"""Values are compared to this many significant digits."""
_AGREE = sympy.Float("1e-30")
_POINTS = tuple(
    tuple(sympy.Rational(number, 1009) for number in numbers)
    for numbers in (
        (737, 1453, 2411, 389, 3067, 1787),
        (-1381, 601, -547, -2003, 971, -263),
        (2713, -859, 1301, -1607, -331, 4159),
        (-431, -2221, -3163, 2749, -1931, 677),
        (5227, 3319, 809, 1117, 2131, -2879),
        (173, 239, -1999, 3001, -97, 1511),
        (1723, 877, 3511, 1259, 449, 2969),
    )
)
"""Values for the variables, of both signs and in no simple relation: expressions that agree at all of them are equal."""
_CONSTANTS = {"C", "c", "K", "k", "C_{1}", "c_{1}"}
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.factorial, sympy.binomial)
_KINKS = (sympy.Abs, sympy.Max, sympy.Min, sympy.sign, sympy.Piecewise, *_STEPS)
MAX_MAGNITUDE = 50_000
"""Numbers with more digits than this are not evaluated."""

_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_MISREAD = re.compile(r"\d\s*_|\d\s+\d|\^[^{}\\]\s*\^|\\frac\{[^{}]*\}\{0\}|/\s*0(?![.\d])")


class MathVerify:
    """The comparer of the workers."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two expressions are equal."""
        try:
            return Exact().equal(gold, answer)
        except Undecided:
            pass
        one, other = expression(gold), expression(answer)
        if one is None or other is None:
            return False
        for decimal, exact in ((read_numeral(answer), one), (read_numeral(gold), other)):
            if decimal is not None and decimal.place is not None:
                return _stands_for(decimal, exact)
        verdict = _agree(one, other)
        return _verified(one, other) if verdict is None else verdict

    def proportional(self, gold: str, answer: str, positive: bool) -> bool:
        """Whether one expression is a constant (and positive) multiple of the other."""
        one, other = expression(gold), expression(answer)
        if one is None or other is None:
            return False
        ratios = [a / b for a, b in _values(one, other) if b != 0]
        return (
            len(ratios) >= 4
            and all(_close(ratio, ratios[0]) for ratio in ratios)
            and (ratios[0] != 0 if not positive else bool(ratios[0].is_real and ratios[0] > 0))
        )

    def rounds_to(self, gold: str, answer: str) -> bool:
        """Whether an exact value without finite decimal, rounded to the places of the gold decimal, is that decimal."""
        try:
            return Exact().rounds_to(gold, answer)
        except Undecided:
            pass
        decimal, exact = read_numeral(gold), expression(answer)
        # 3.14 for \pi itself is a custom, not a result.
        inexact = exact is None or isinstance(exact, sympy.NumberSymbol) or re.search(r"\.\d", answer)
        value = None if inexact else _evaluate(exact)
        if decimal is None or value is None or not value.is_real:
            return False
        number = _as_fraction(value)
        return not (value.is_Rational and has_finite_decimal(number)) and decimal.rounded_is(number)

    def readable(self, latex: str) -> bool:
        """Whether an expression means anything."""
        return read_numeral(latex) is not None or expression(latex) is not None


@lru_cache(maxsize=2048)
def expression(latex: str) -> Any:
    """Parse a value with math-verify's parser; None for what it cannot read or would misread."""
    if _MISREAD.search(latex):
        return None
    try:
        parsed = latex2sympy(_explicit(latex), normalization_config=None, conversion_config=_CONVERSION)
    except MemoryError:
        raise
    except Exception:  # its parser raises bare `Exception` for whatever is no LaTeX
        return None
    if isinstance(parsed, sympy.Basic):
        parsed = parsed.subs(sympy.Symbol("i"), sympy.I).replace(_is_odd_root, _real_root)
        if isinstance(parsed, sympy.Expr) and magnitude(parsed) > MAX_MAGNITUDE:
            return sympy.Symbol(f"beyond {latex}")  # equals only itself
    return parsed


def _explicit(latex: str) -> str:
    r"""Write out what the parser would misread: decimals become fractions, products get their dot.

    `2(3)` is read as the mixed number 2 + 3 whatever the options say (latex2sympy2_extended 1.11).
    """
    latex = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", latex.replace(ROW_BREAK, "\\\\"))
    latex = re.sub(r"(\d+(?:\.\d+)?|\.\d+)°", r"(\1\\cdot\\frac{\\pi}{180})", latex)
    latex = latex.replace("%", "\\cdot\\frac{1}{100}").replace("°", "\\cdot\\frac{\\pi}{180}")
    latex = re.sub(r"(?<![\d.\\])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", _mixed_or_product, latex)
    latex = re.sub(r"(?<![_\w])(\d*)\.(\d+)", _fraction, latex)
    return re.sub(r"(?<![\d_^.])(\d+)\s*\(", r"\1\\cdot (", latex)


def _is_odd_root(expr: Any) -> bool:
    """The cube root of -8 and its like: school's roots are real, sympy's are complex."""
    is_root = isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Rational) and expr.exp.q % 2 == 1 < expr.exp.q
    return bool(
        is_root and not expr.base.free_symbols and magnitude(expr.base) < 1000 and expr.base.evalf(20).is_negative
    )


def _real_root(expr: Any) -> Any:
    return (-1) ** expr.exp.p * (-expr.base) ** expr.exp


def _verified(gold: Any, answer: Any) -> bool:
    """Math-verify's own verdict, without its SIGALRM limits: the parent holds the clock."""
    try:
        return bool(verify(gold, answer, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # math-verify itself takes every error of sympy for "not equal"
        return False


def _mixed_or_product(match: re.Match[str]) -> str:
    whole, top, below = match.groups()
    if int(top) < int(below):
        return f"({whole}+\\frac{{{top}}}{{{below}}})"
    return f"{whole}\\cdot\\frac{{{top}}}{{{below}}}"


def _fraction(match: re.Match[str]) -> str:
    return fraction_latex(Fraction(match[0] if match[1] else "0" + match[0]))


def magnitude(expr: Any) -> float:
    """An upper bound for the number of digits of a value, found without evaluating it."""
    if isinstance(expr, sympy.Rational):
        return float(max(abs(int(expr.p)).bit_length(), int(expr.q).bit_length()) * 0.302)
    inner = [magnitude(arg) for arg in expr.args if isinstance(arg, sympy.Basic)]
    if isinstance(expr, sympy.Pow):
        return _power(inner[0], expr.exp, inner[1])
    if isinstance(expr, sympy.factorial) and isinstance(expr.args[0], sympy.Integer):
        number = int(expr.args[0])
        return number * len(str(number))
    if isinstance(expr, sympy.factorial | sympy.exp | sympy.binomial | sympy.gamma):
        return _power(10.0, expr.args[0], inner[0])
    if isinstance(expr, sympy.Mul):
        return sum(inner)
    return max(inner, default=1.0) + 1


def _power(base: float, exponent: Any, digits: float) -> float:
    if exponent.free_symbols:
        return base + digits
    if digits > 7:
        return float("inf")
    value = exponent.evalf(5)
    return max(base, 1.0) * float(abs(value)) if value.is_number else base + digits


def _stands_for(decimal: Numeral, exact: Any) -> bool:
    value = _evaluate(exact)
    if value is None or not value.is_real:
        return False
    number = _as_fraction(value)
    return abs(decimal.value - number) <= abs(number) / 10**30 or decimal.rounds(number, abs(number) / 10**30)


def _as_fraction(value: Any) -> Fraction:
    return Fraction(int(value.p), int(value.q)) if value.is_Rational else Fraction(str(value))


def _evaluate(expr: Any) -> Any:
    """The value of an expression without variables, or None where that cannot be found to `DIGITS` digits."""
    if not isinstance(expr, sympy.Expr) or expr.free_symbols:
        return None
    try:
        value = expr.doit()
        value = value if value.is_Rational else value.evalf(DIGITS)
        parts = value.as_real_imag()
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return None  # sympy's ways of saying that it cannot
    if not all(isinstance(part, sympy.Float | sympy.Integer | sympy.Rational) for part in parts):
        return None
    precise = all(not isinstance(part, sympy.Float) or part._prec > 60 or part == 0 for part in parts)
    return value if precise else None


def _agree(one: Any, other: Any) -> bool | None:
    """Whether two expressions have equal values wherever both are real; None where evaluation cannot tell.

    Numbers are compared relatively: math-verify rounds to absolute digits, so that 2^-99 = 2^-98 (Math-Verify #14).
    It also misses identities that hold for all values where both sides exist (Math-Verify #64).
    """
    if not isinstance(one, sympy.Expr) or not isinstance(other, sympy.Expr):
        return None
    if one == other:
        return True
    if not one.free_symbols and not other.free_symbols:
        a, b = _evaluate(one), _evaluate(other)
        return None if a is None or b is None else _close(a, b)
    one, other = _same_constant(one, other)
    pairs = _values(one, other)
    complex_valued = one.has(sympy.I) or other.has(sympy.I)
    checked = 0
    for a, b in pairs:
        if not complex_valued and not _is_real(a) and not _is_real(b):
            continue
        if not _close(a, b):
            return False
        checked += 1
    return True if checked >= 3 else None


def _same_constant(one: Any, other: Any) -> tuple[Any, Any]:
    """The constant of integration may have any of its usual names."""
    mine, theirs = one.free_symbols - other.free_symbols, other.free_symbols - one.free_symbols
    if len(mine) == len(theirs) == 1 and {str(symbol) for symbol in mine | theirs} <= _CONSTANTS:
        here, there = mine.pop(), theirs.pop()
        if one.free_symbols & other.free_symbols and one.diff(here) == other.diff(there) == 1:
            return one, other.subs(there, here)
    return one, other


def _values(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    """Values of both expressions at the sample points, where both can be evaluated."""
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if one.has(sympy.Sum, sympy.Product) or other.has(sympy.Sum, sympy.Product):
        one, other = one.doit(), other.doit()
    for values in _samples(one, other, symbols):
        a, b = (_evaluate(expr.subs(values)) for expr in (one, other))
        if a is not None and b is not None:
            yield a, b


def _samples(one: Any, other: Any, symbols: list[Any]) -> Iterator[dict[Any, Any]]:
    """Values for the variables: anywhere, and where expressions like these tend to change their course."""
    for point in _POINTS:
        yield {symbol: point[i % len(point)] + i // len(point) for i, symbol in enumerate(symbols)}
    either = sympy.Tuple(one, other)
    offsets = _POINTS[5]
    if either.has(*_STEPS):  # steps stand on the integers
        for start in (2, 5, -4, 12, -7):
            yield {symbol: sympy.Integer(start + 2 * i) for i, symbol in enumerate(symbols)}
    if either.has(*_KINKS) or any(
        isinstance(power.exp, sympy.Rational) and power.exp.q > 1 for power in either.atoms(sympy.Pow)
    ):
        constants = sorted({abs(number) for number in either.atoms(sympy.Rational)}, reverse=True)[:8]
        beyond = sum(constants) + 2
        for centre in [*constants, beyond, 10 * beyond]:
            for sign in (1, -1):
                yield {s: sign * centre + offsets[i % len(offsets)] for i, s in enumerate(symbols)}
    if either.has(sympy.Abs) and any(str(symbol) in ("z", "w") for symbol in symbols):
        yield {symbol: _POINTS[0][i % 6] + sympy.I * offsets[i % 6] for i, symbol in enumerate(symbols)}


def _is_real(value: Any) -> bool:
    real, imaginary = value.as_real_imag()
    return bool(abs(imaginary) <= abs(real) * _AGREE)


def _close(a: Any, b: Any) -> bool:
    if a == b:
        return True
    if a.is_Rational and b.is_Rational:
        return False
    return bool(abs(a - b) <= _AGREE * max(abs(a), abs(b)))
