r"""Surface normalisation: the many ways of writing one answer become one plain LaTeX string.

Nothing here decides what an answer means. Words are kept apart from mathematics by the markers `WORDS_OPEN` and
`WORDS_CLOSE`, so that no later step can read "even" as the product of four variables (Math-Verify reads `\text{even}`
as one symbol and `even` as `e*v*e*n`).
"""

import re

WORDS_OPEN, WORDS_CLOSE = "\ue000", "\ue001"
MARKS = f"[{WORDS_OPEN}{WORDS_CLOSE}]"
DOLLAR = "\ue002"
"""A currency sign, as opposed to the `$` that delimits mathematics."""
ROW_BREAK = "\ue003"
"""The `\\\\` of a matrix."""
MAX_NESTING = 40
"""Deeper groups than this are not an answer; recursive readers rely on the limit."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_GREEK = (
    (
        "α alpha β beta γ gamma δ delta ε epsilon θ theta λ lambda μ mu π pi ρ rho σ sigma τ tau φ phi ϕ phi χ chi ψ psi ω omega Γ "
    )
    + ("Gamma Δ Delta Θ Theta Λ Lambda Σ Sigma Φ Phi Ψ Psi Ω Omega")
).split()
_UNICODE = {
    **{symbol: f"\\{name} " for symbol, name in zip(_GREEK[::2], _GREEK[1::2], strict=True)},
    **{char: "-" for char in "−–—‐‑﹣－"},
    **{
        char: " "
        for char in "\u00a0\u2009\u200a\u202f\u2002\u2003\u3000\t\r\n\x00"
        + WORDS_OPEN
        + WORDS_CLOSE
        + DOLLAR
        + ROW_BREAK
    },
    **{char: "" for char in "\u200b\u200c\u200d\ufeff\u2061\u2062\u2063"},
    **{char: "\\cdot " for char in "·⋅∙•"},
    **{
        "×": "\\times ",
        "÷": "/",
        "⁄": "/",
        "∕": "/",
        "≤": "\\le ",
        "⩽": "\\le ",
        "≥": "\\ge ",
        "⩾": "\\ge ",
        "≠": "\\ne ",
    },
    **{
        "≈": "\\approx ",
        "∞": "\\infty ",
        "√": "\\sqrt ",
        "°": "°",
        "º": "°",
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∅": "\\emptyset ",
    },
    **{
        "∈": "\\in ",
        "±": "\\pm ",
        "∓": "\\mp ",
        "′": "'",
        "’": "'",
        "ℝ": "\\mathbb{R}",
        "ℤ": "\\mathbb{Z}",
        "∖": "\\setminus ",
    },
    **{
        "⟨": "\\langle ",
        "⟩": "\\rangle ",
        "∠": "\\angle ",
        "，": ",",
        "。": ".",
        "：": ":",
        "；": ";",
        "（": "(",
        "）": ")",
    },
    **{"½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}"},
    **{
        "⅕": "\\frac{1}{5}",
        "⅖": "\\frac{2}{5}",
        "⅗": "\\frac{3}{5}",
        "⅘": "\\frac{4}{5}",
        "⅙": "\\frac{1}{6}",
        "⅛": "\\frac{1}{8}",
    },
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF10, 0xFF1A)},
}
_TABLE = str.maketrans(_UNICODE)

FUNCTIONS = "arcsin|arccos|arctan|arccot|arcsec|arccsc|sinh|cosh|tanh|coth|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min|gcd|lcm|det|deg"
_NAMED = re.compile(
    rf"{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE}|(?<![\\a-zA-Z])(?:({FUNCTIONS}|sqrt|pi|infty|theta)|(infinity|inf|oo))(?![a-zA-Z])"
)
_WORD_GROUP = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|math(?:rm|bf|sf|it|tt|normal)|operatorname|boldsymbol|bm|emph|underline)\*?\s*"
    r"\{([^{}]*)\}"
)
_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]ig+[lrm]?|displaystyle|textstyle|limits|nolimits|rm|bf|tiny|small|normalsize|large|Large|LARGE|huge|Huge|boldmath)(?![a-zA-Z])\s*\.?"
)
_SPACES = re.compile(
    r"\\(?:[,;:>\s]|q?quad(?![a-zA-Z])|enspace(?![a-zA-Z])|thinspace(?![a-zA-Z])|hspace\*?\{[^{}]*\})|~"
)
_SYNONYMS = {
    **dict.fromkeys(("leq", "leqslant", "leqq"), "\\le "),
    **dict.fromkeys(("geq", "geqslant", "geqq"), "\\ge "),
    **dict.fromkeys(("neq", "not="), "\\ne "),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "sfrac", "nicefrac"), "\\frac"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("ldots", "cdots", "dotsc", "dotsb"), "\\dots "),
    **dict.fromkeys(("lt",), "<"),
    **dict.fromkeys(("gt",), ">"),
    **dict.fromkeys(("lbrace",), "\\{"),
    **dict.fromkeys(("rbrace",), "\\}"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("cdotp", "ast", "bullet"), "\\cdot "),
    **dict.fromkeys(("div",), "/"),
    **dict.fromkeys(("colon",), ":"),
    **dict.fromkeys(("varnothing",), "\\emptyset "),
    **dict.fromkeys(("smallsetminus",), "\\setminus "),
    **dict.fromkeys(("degree", "degrees"), "°"),
    **dict.fromkeys(("simeq",), "\\approx "),
    **dict.fromkeys(("R", "Reals", "reals"), "\\mathbb{R}"),
    **dict.fromkeys(("lg",), "\\log_{10}"),
    **dict.fromkeys(("varphi",), "\\phi"),
    **dict.fromkeys(("varepsilon",), "\\epsilon"),
    **dict.fromkeys(("imaginary", "imath"), "i"),
}
_SYNONYM = re.compile(r"\\(not=|" + "|".join(name for name in _SYNONYMS if name != "not=") + r")(?![a-zA-Z])\s*")
_ENTITIES = {
    "&lt;": "<",
    "&gt;": ">",
    "&le;": "\\le ",
    "&ge;": "\\ge ",
    "&nbsp;": " ",
    "&amp;": "&",
    "&times;": "\\times ",
}
_ACCENT = r"\\(bar|dot|ddot|hat|vec|tilde|overline)"
_ALIGNED = re.compile(r"\\begin\{(aligned|align\*?|gathered|split)\}(.*?)\\end\{\1\}", re.DOTALL)
_PLAIN = (
    (re.compile(r"\\(?:boxed|fbox)\s*(?=\{)"), " "),
    (re.compile(r"\\(?:therefore|blacksquare|square|Box|qed|checkmark|hfill|newline|centering)(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}"), " "),
    (
        re.compile(r"\\begin\{(aligned|align\*?|array|gathered|split)\}(?:\{[lcr| ]*\})?([^&\ue003]*?)\\end\{\1\}"),
        r" \2 ",
    ),
    (re.compile(rf"{_ACCENT}(?:\s+(?=[a-zA-Z])|\s*(?=\d))([a-zA-Z\d])(?![a-zA-Z])"), r"\\\1{\2}"),
    (re.compile(r"\\hat\{([ijk])\}"), r"\\vec{\1}"),
    (re.compile(r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}"), r"\\overline{\1\2\3}"),
    (re.compile(r"(?<=[.\d])\\dot\{(\d)\}"), r"\\overline{\1}"),
    (re.compile(r"\{\s*:\s*\}"), ":"),
    (re.compile(r"(?:\{\s*\})?[_^]\s*\{?(\d+)\}?\s*C\s*_\s*\{?(\d+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"\\!|\\[hv]?phantom\s*(?:\{[^{}]*\}|[-+\w])"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-zA-Z])|\^\s*°|\^\s*\{\s*°\s*\}"), "°"),
    (re.compile(r"\\%|\\text\{\s*%\s*\}"), "%"),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\\hline"), " "),
    (re.compile(r"\{?\s*(\{[^{}]*\}|\w+)\s*\\choose\s*(\{[^{}]*\}|\w+)\s*\}?"), r"\\binom{\1}{\2}"),
    (
        re.compile(r"[(\[]\s*\\begin\{array\}\s*\{[lcr| ]*\}(.*?)\\end\{array\}\s*[)\]]", re.DOTALL),
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (re.compile(r"\\(begin|end)\{[bB]matrix\}"), r"\\\1{pmatrix}"),
)
_ATOM = r"[\da-zA-Z]|\\(?:pi|alpha|beta|gamma|theta|phi|infty)(?![a-zA-Z])"
_FRACTIONS = (
    (re.compile(rf"\\frac\s*({_ATOM})"), r"\\frac{\1}"),
    (re.compile(rf"(\\frac\s*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*({_ATOM})"), r"\1{\2}"),
    (re.compile(r"\\frac\s+\{"), r"\\frac{"),
    (re.compile(r"(\\frac\{[^{}]*\})\s+\{"), r"\1{"),
    (re.compile(r"\\binom\s*(\d)\s*(\d)"), r"\\binom{\1}{\2}"),
    (re.compile(r"_\s*([\da-zA-Z])(?![a-zA-Z])"), r"_{\1}"),
    (re.compile(r"\\sqrt\s*([\da-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s+\{"), r"\\sqrt{"),
    (re.compile(r"\\sqrt\s*(\\(?:pi|alpha|beta|theta))(?![a-zA-Z])"), r"\\sqrt{\1}"),
)
_LEAD_IN = re.compile(
    rf"^[\s{WORDS_OPEN}]*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\b|:|=)\s*:?[\s{WORDS_CLOSE}]*(?=\S)",
    re.IGNORECASE,
)
_SIMPLE = re.compile(r"-?\d+(?:\.\d+)?")


def clean(text: str) -> str:
    """Bring an answer to its plain form: ASCII and LaTeX, no sizes, no delimiters, words marked as words."""
    text = text.strip()
    if _SIMPLE.fullmatch(text):
        return text
    for entity, char in _ENTITIES.items() if "&" in text else ():
        text = text.replace(entity, char)
    text = _math_delimiters(_unicode(text).replace("\\\\", ROW_BREAK))
    text = _SPACES.sub(" ", _SIZES.sub(" ", text))
    text = _ALIGNED.sub(_rows, text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    text = _SYNONYM.sub(lambda match: _SYNONYMS[match[1]], text)
    for _ in range(4):  # text inside text
        text, changed = _WORD_GROUP.subn(_words, text)
        if not changed:
            break
    if re.search(r"[<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])", text):  # between conditions these are words
        text = re.sub(r"\\(?:land|wedge)(?![a-zA-Z])", f"{WORDS_OPEN} and {WORDS_CLOSE}", text)
        text = re.sub(r"\\(?:lor|vee)(?![a-zA-Z])", f"{WORDS_OPEN} or {WORDS_CLOSE}", text)
    text = text.strip("*_ ").replace("**", "^").replace("*", "\\cdot ")  # what is bold in Markdown is a power inside
    text = _periodic(text)
    text = re.sub(r"^\s*([\[\]])([^\[\]]+,[^\[\]]+)([\[\]])\s*$", _french_interval, text)
    text = re.sub(rf"\\mu\s*{WORDS_OPEN}", f"{WORDS_OPEN}μ", text)
    text = _NAMED.sub(_command, text)
    for pattern, replacement in _FRACTIONS:
        text = pattern.sub(replacement, text)
    text = _root_of_parenthesis(text)
    return _LEAD_IN.sub("", strip(re.sub(r"\s+", " ", text)))


def strip(text: str) -> str:
    """Drop surrounding space, closing punctuation and braces that enclose everything."""
    while True:
        bare = text.strip(" ").rstrip(",;:").lstrip(",;:")
        if not bare.endswith(".."):
            bare = bare.rstrip(".")
        if bare.startswith("{") and matching(bare, 0) == len(bare) - 1:
            bare = bare[1:-1]
        if bare == text:
            return bare
        text = bare


def _unicode(text: str) -> str:
    if text.isascii():
        return text.translate(_TABLE)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀-₉]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
    return text.translate(_TABLE)


def _math_delimiters(text: str) -> str:
    """Remove `$...$`, but keep a `$` that means dollars: an escaped one, or a single one before a number."""
    text = text.replace("\\$", DOLLAR).replace("$$", " ")
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*\d|\s*\.\d)", DOLLAR, text, count=1)
    return text.replace("$", " ")


def _words(match: re.Match[str]) -> str:
    content = match[1]
    bare = content.strip()
    after_number = re.search(r"[\d})]\s*$", match.string[: match.start()]) is not None
    if re.fullmatch(FUNCTIONS, bare) and not (after_number and bare in ("min", "sec", "deg")):
        return f"\\{bare} "
    if re.search(r"\d|[=<>+/\\°%]", bare):
        return re.sub(
            r"(?<![\\a-zA-Z])[a-zA-Z][a-zA-Z .]*", lambda words: WORDS_OPEN + words[0] + WORDS_CLOSE, f" {content} "
        )
    if len(bare) == 1 and re.match(r"\\(?:mathbf|boldsymbol|bm)", match[0]) and bare not in "ABCDE":
        return f"\\vec{{{bare}}}"
    if bare in ("e", "i", "d") or not re.search(r"\w", bare):
        return f" {content} "
    if len(bare) == 1 and re.match(r"\\(?:math(?:bf|it|tt|normal)|textit|emph)", match[0]):
        return bare
    return WORDS_OPEN + content + WORDS_CLOSE


def _command(match: re.Match[str]) -> str:
    """A function's name without its backslash; words stay words."""
    return f"\\{match[1]} " if match[1] else "\\infty " if match[2] else match[0]


def _root_of_parenthesis(text: str) -> str:
    r"""`\sqrt(x)` is read by people as the root of x, by math-verify as an empty root times x (Math-Verify #41).

    The same goes for the exponent in `2^(1/3)`.
    """
    for _ in range(10):
        match = re.search(r"(\\sqrt|\^)\s*\(", text)
        end = matching(text, match.end() - 1) if match else None
        if match is None or end is None:
            return text
        text = f"{text[: match.start()]}{match[1]}{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text


def _periodic(text: str) -> str:
    """`0.333...` repeats for ever; dots behind six other digits say no more than the digits."""
    if "dots" not in text and "..." not in text:
        return text
    text = re.sub(r"(\d\.\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3+)\s*(?:\\dots|\.{3})", r"\1\\overline{\2\3}", text)
    return re.sub(r"(\.\d{6,})\s*(?:\\dots|\.{3})\s*$", r"\1", text)


def _french_interval(match: re.Match[str]) -> str:
    """`]0, 1[` is the open interval."""
    return f"{'[' if match[1] == '[' else '('}{match[2]}{']' if match[3] == ']' else ')'}"


def _rows(match: re.Match[str]) -> str:
    """Aligned equations, one under the other, are a list of equations."""
    rows = [row.replace("&", " ").strip() for row in match[2].split(ROW_BREAK) if row.strip()]
    return " , ".join(rows) if all(re.match(r"[^=<>]+[=<>]", row) for row in rows) else match[0]


_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENERS = {"(", "[", "{", "\\{", "\\langle", "\\lfloor", "\\lceil", WORDS_OPEN}
_CLOSERS = {")", "]", "}", "\\}", "\\rangle", "\\rfloor", "\\rceil", WORDS_CLOSE}


def tokens(text: str) -> list[tuple[str, int, int]]:
    """Tokens of a cleaned string, as `(token, position, depth)`: a bracket carries the depth outside it.

    Brackets of different kinds match each other, since `(0, 1]` is an interval.

    Raises:
        ValueError: If brackets do not match, or nest deeper than `MAX_NESTING`.
    """
    found: list[tuple[str, int, int]] = []
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _CLOSERS:
            depth -= 1
        if not 0 <= depth < MAX_NESTING:
            raise ValueError("brackets do not match or nest too deep")
        found.append((token, match.start(), depth))
        if token in _OPENERS:
            depth += 1
    if depth:
        raise ValueError("brackets do not match")
    return found


def matching(text: str, start: int) -> int | None:
    """Position of the bracket that closes the one at `start`, or None."""
    depth = 0
    for match in _TOKEN.finditer(text, start):
        depth += (match[0] in _OPENERS) - (match[0] in _CLOSERS)
        if depth <= 0:
            return match.start()
    return None


def split_top(text: str, separators: re.Pattern[str]) -> list[str]:
    """Split at separators that stand outside all brackets. Parts and separators alternate in the result."""
    inner = {at for _, at, depth in tokens(text) if depth}
    parts, last = [], 0
    for match in separators.finditer(text):
        if match.start() in inner or match.start() < last:
            continue
        parts += [text[last : match.start()], match[0]]
        last = match.end()
    return [*parts, text[last:]]


def squeeze(text: str) -> str:
    """A text without its spaces, for comparing letter by letter."""
    return re.sub(r"\s+", "", text)


def close_up(text: str) -> str:
    """A text without the spaces that separate nothing: `x + 1` is `x+1`, but `4 2` is not `42`."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)
