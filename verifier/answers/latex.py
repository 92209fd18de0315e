r"""Surface normalisation: the many ways of writing one answer become one plain LaTeX string.

Nothing here decides what an answer means. Words are kept apart from mathematics by marks (Math-Verify reads
`\text{even}` as one symbol and `even` as `e*v*e*n`).
"""

import html
import re

from .spelling import (
    ALIGNED,
    CIRCLE,
    CIRCLED,
    DATE,
    DOLLAR,
    ENTITY,
    FRACTIONS,
    FUNCTIONS,
    LEAD_IN,
    MARKS,
    NAMED,
    PLAIN,
    ROW_BREAK,
    SIMPLE,
    SIZES,
    SPACES,
    SUBSCRIPTS,
    SUPERSCRIPTS,
    SYNONYM,
    SYNONYMS,
    TAGS,
    UNICODE,
    WORD_GROUP,
    WORDS_CLOSE,
    WORDS_OPEN,
)

MAX_NESTING = 40
"""Deeper groups than this are not an answer; recursive readers rely on the limit."""


def clean(text: str) -> str:
    """Bring an answer to its plain form: ASCII and LaTeX, no sizes, no delimiters, words marked as words."""
    text = text.strip()
    if SIMPLE.fullmatch(text):
        return text
    text = _numbered(_plain_html(text))
    text = _math_delimiters(_unicode(text).replace("\\\\", ROW_BREAK))
    text = SPACES.sub(" ", SIZES.sub(" ", text))
    text = ALIGNED.sub(_rows, text)
    for pattern, replacement in PLAIN:
        text = pattern.sub(replacement, text)
    text = SYNONYM.sub(lambda match: SYNONYMS[match[1]], text)
    for _ in range(4):  # text inside text
        text, changed = WORD_GROUP.subn(_words, text)
        if not changed:
            break
    if re.search(r"[<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])", text):  # between conditions these are words
        text = re.sub(r"\\(?:land|wedge)(?![a-zA-Z])", f"{WORDS_OPEN} and {WORDS_CLOSE}", text)
        text = re.sub(r"\\(?:lor|vee)(?![a-zA-Z])", f"{WORDS_OPEN} or {WORDS_CLOSE}", text)
    text = text.strip("*_ ").replace("**", "^").replace("*", "\\cdot ")  # what is bold in Markdown is a power inside
    text = _periodic(text)
    text = re.sub(r"^\s*([\[\]])([^\[\]]+,[^\[\]]+)([\[\]])\s*$", _french_interval, text)
    text = re.sub(rf"\\mu\s*{WORDS_OPEN}", f"{WORDS_OPEN}μ", text)
    text = NAMED.sub(_command, text)
    for pattern, replacement in FRACTIONS:
        text = pattern.sub(replacement, text)
    text = _root_of_parenthesis(text)
    return LEAD_IN.sub("", strip(re.sub(r"\s+", " ", text)))


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


def _plain_html(text: str) -> str:
    if "&" in text:
        text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    if "</" in text or "<br" in text:
        for _ in range(4):  # tags inside tags
            for pattern, replacement in TAGS:
                text = pattern.sub(replacement, text)
    return text


def _numbered(text: str) -> str:
    if "circled" in text:
        text = CIRCLE.sub(lambda match: chr(0x245F + int(match[1])) if 1 <= int(match[1]) <= 20 else match[0], text)
    if CIRCLED.fullmatch(text):
        return ", ".join(str(ord(char) - 0x245F) for char in text if "①" <= char <= "⑳")
    return text


def _unicode(text: str) -> str:
    if text.isascii():
        return text.translate(UNICODE)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀-₉]+", lambda match: "_{" + match[0].translate(SUBSCRIPTS) + "}", text)
    return text.translate(UNICODE)


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


def letters(text: str) -> str:
    """A text for comparing letter by letter: without spaces, and without the difference between words and mathematics."""
    return squeeze(DATE.sub(r"\1", re.sub(MARKS, "", text)))


def close_up(text: str) -> str:
    """A text without the spaces that separate nothing: `x + 1` is `x+1`, but `4 2` is not `42`."""
    return re.sub(r"\s+", " ", re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text))
