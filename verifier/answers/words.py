"""Answers in words: numbers by name, names for sets, and text that is compared as text."""

import re

from .forms import ALL_REALS, EMPTY, Bracketed, Form, Text, Value
from .spelling import WORDS_CLOSE, WORDS_OPEN
from .units import is_word

AND = re.compile(rf"\s*[,;]?\s*(?:{WORDS_OPEN}\s*[,;]?\s*and\s*{WORDS_CLOSE}|(?<![a-zA-Z\\])and(?![a-zA-Z]))\s*")
OR = re.compile(rf"\s*[,;]?\s*(?:{WORDS_OPEN}\s*[,;]?\s*or\s*{WORDS_CLOSE}|(?<![a-zA-Z\\])or(?![a-zA-Z]))\s*")
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_NUMBER_WORDS = {word: number for number, word in enumerate(_ONES.split())}
_TENS = {
    word: 10 * ten for ten, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_NUMBER_WORDS |= _TENS
_NUMBER_WORDS |= {f"{ten}-{one}": a + b for ten, a in _TENS.items() for one, b in list(_NUMBER_WORDS.items())[1:10]}
REALS = re.compile(r"(?:(?:the )?set of )?(?:all )?(?:the )?real(?: number)?s?|all reals|ℝ|\\mathbb\s*\{?\s*R\s*\}?")
_HALF_REALS = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*[\^_]\s*\{?\s*([+-])\s*\}?")
_PHRASES: dict[str, Form] = {
    **dict.fromkeys(("infinity", "inf"), Value("\\infty")),
    **dict.fromkeys(("dne", "does not exist", "limit does not exist"), Text("does not exist")),
    **{
        f"{lead}no {real}{what}{s}": EMPTY
        for lead in ("", "there are ", "there is ")
        for real in ("", "real ")
        for what in ("solution", "root")
        for s in ("", "s")
    },
    **{"one half": Value("\\frac{1}{2}"), "a half": Value("\\frac{1}{2}"), "one third": Value("\\frac{1}{3}")},
    **{"two thirds": Value("\\frac{2}{3}"), "one quarter": Value("\\frac{1}{4}"), "one fourth": Value("\\frac{1}{4}")},
    **dict.fromkeys(("three quarters", "three fourths"), Value("\\frac{3}{4}")),
}


def read_words(text: str) -> Form | None:
    """Text that consists of words only."""
    bare = re.sub(f"[{WORDS_OPEN}{WORDS_CLOSE}]", " ", text)
    letters = re.sub(r"\s+", " ", bare).strip(" .,;:!'\"").casefold()
    letters = re.sub(r"^(?:an?|the) (?=[a-z])", "", letters)
    if letters in _NUMBER_WORDS:
        return Value(str(_NUMBER_WORDS[letters]))
    if letters in _PHRASES:
        return _PHRASES[letters]
    if REALS.fullmatch(letters) or REALS.fullmatch(text):
        return ALL_REALS
    if half := _HALF_REALS.fullmatch(text):
        zero = Value("0")
        return Bracketed("(", ")", (zero, Value("\\infty")) if half[1] == "+" else (Value("-\\infty"), zero))
    if re.fullmatch(r"\\emptyset|\{\s*\}|\\\{\s*\\\}|(?:the )?empty set", letters):
        return EMPTY
    if re.search(r"[\d=<>^_\\+*/|{}()\[\]%°]", text.replace("(", " ").replace(")", " ")):
        return None
    runs = re.findall(r"[^\W\d_]+", bare)
    if AND.search(text) or OR.search(text) or "," in text:
        return None
    if (
        runs
        and (WORDS_OPEN in text or len(runs) == 1 or all(is_word(run) or len(run) < 3 for run in runs))
        and any(is_word(run) or WORDS_OPEN in text or re.fullmatch(r"[A-Z]{2,}", run) for run in runs)
    ):
        return Text(letters if not re.fullmatch(r"[A-Z]{2,}", bare.strip()) else bare.strip())
    return None
