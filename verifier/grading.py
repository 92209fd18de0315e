"""What a grade is, and which text of a completion is its answer.

Equality of two answers is math-verify's business and happens in a worker (`worker.py`); this module is plain string
handling and loads no sympy.
"""

import re
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MAX_ANSWER_CHARS = 2_000
"""A longer answer is not parsed: no gold answer is near this long, and parsing cost grows with it."""


class Outcome(StrEnum):
    """What became of one completion. The values double as metric names (`verifier/<outcome>`)."""

    CORRECT = "correct"
    """The answer equals the gold answer."""
    WRONG = "wrong"
    """An answer was found and it does not equal the gold answer."""
    NO_ANSWER = "no_answer"
    """The completion states no final answer."""
    UNPARSEABLE_GOLD = "unparseable_gold"
    """The gold answer means nothing to math-verify: the sample carries no signal."""
    TIMED_OUT = "timed_out"
    """Judging took longer than the limit; the worker was killed."""
    CRASHED = "crashed"
    """The worker died while judging (out of memory, a crash in a C library)."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The judgement on one completion.

    Attributes:
        outcome (`Outcome`):
            What was found.
        answer (`str`):
            The text that was judged; empty when there was none.
        seconds (`float`):
            Time that judging took, from the moment a worker took it up.
    """

    outcome: Outcome
    answer: str = ""
    seconds: float = 0.0

    @property
    def correct(self) -> bool:
        """Whether the completion answers correctly."""
        return self.outcome is Outcome.CORRECT

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data, `correct` included."""
        return {**asdict(self), "outcome": self.outcome.value, "correct": self.correct}


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_THINK_END = re.compile(r"</think\s*>", re.IGNORECASE)
_THINK_START = re.compile(r"<think\s*>", re.IGNORECASE)
# A final statement ends its sentence or line; a decimal point or a dot inside LaTeX is not such an end.
_STATEMENT_END = r"\s*(?=[.。!]?\s*(?:$|\n)|[.!]\s|[,;]\s)"
_STATEMENTS = (
    re.compile(r"####[ \t]*(?P<answer>[^\n]+)"),
    re.compile(
        r"\b(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*\**\s*(?P<answer>\$[^$\n]+\$|[^\n]+?)\**"
        + _STATEMENT_END,
        re.IGNORECASE,
    ),
    re.compile(r"^\s*A:[ \t]*(?P<answer>[^\n]+)$", re.MULTILINE),
)

# "So the total is 42." as the last words: a number or inline math, and nothing behind it.
_LAST_SENTENCE = re.compile(
    r"(?:\bis|\bare|\bequals|\bgives|=)\s*\**\s*"
    r"(?P<answer>\$[^$\n]+\$|[-−+]?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?\s*(?:\\?%)?)\**\s*\.?\s*\Z",
    re.IGNORECASE,
)


def _matching_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the group whose content starts at `start`, or None if it never closes."""
    depth = 1
    index = start
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return index
        index += 1
    return None


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` in `text`, or None where there is none or the last one never closes.

    An unterminated box is a completion that was cut while stating its answer; an earlier box was not its last word.
    """
    starts = [match.end() for match in _BOX.finditer(text)]
    end = _matching_brace(text, starts[-1]) if starts else None
    return None if end is None else text[starts[-1] : end].strip()


def extract_answer(completion: str) -> str | None:
    r"""Find the text that a completion gives as its final answer.

    The rules, in order: reasoning inside `<think>` does not count; the last `\boxed{...}` decides, also when it is
    cut off; without any box, the last clear final statement (`#### 5`, "The answer is 5"); without one, a last sentence
    that ends in its value ("So the total is 42.").

    Args:
        completion (`str`):
            What the policy wrote, without the prompt.

    Returns:
        `str` or `None`: The answer's text, or `None` when the completion states none.
    """
    ends = list(_THINK_END.finditer(completion))
    if ends:
        completion = completion[ends[-1].end() :]
    elif _THINK_START.search(completion):
        return None
    if _BOX.search(completion):
        return last_box(completion) or None
    matches = [match for pattern in _STATEMENTS for match in pattern.finditer(completion)]
    if matches:
        answer = max(matches, key=lambda match: match.start())["answer"].strip()
    else:
        sentence = _LAST_SENTENCE.search(completion)
        answer = sentence["answer"].strip() if sentence else ""
    return answer or None


def extract_gold(text: str) -> str:
    r"""The gold answer in a data set's answer or worked solution.

    Args:
        text (`str`):
            An answer ("42"), or a worked solution that gives it after `####` (GSM8K) or in its last `\boxed{}` (MATH).

    Returns:
        `str`: The answer; empty when a worked solution's box never closes.
    """
    _, marker, after = text.rpartition("####")
    if marker:
        return after.strip()
    if _BOX.search(text):
        return last_box(text) or ""
    return text.strip()
