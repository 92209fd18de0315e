"""What the verifier turn said of the attempt."""

import bisect
import math
import re
from collections.abc import Callable, Sequence
from enum import StrEnum

from ..engines.interface import Completion

_STRICT = re.compile(r"The answer is (correct|wrong)\.$")
_SENTENCE = re.compile(r"The answer is (?:correct|wrong)")
_LENIENT = re.compile(
    r"\banswer is\W{0,4}(?:(?:therefore|thus|hence|indeed|actually|still|also) )?(correct|right|wrong|incorrect)\b(?!\s*[-?])",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|whether|unless)\b[^.!?\n]*$", re.IGNORECASE)
_SAYS_CORRECT = ("correct", "right")

PARSERS = ("strict", "lenient")


class Verdict(StrEnum):
    """A verdict. The values double as metric names."""

    CORRECT = "correct"
    WRONG = "wrong"
    NONE = "none"
    """No verdict, or more than one."""


def parse_verdict(text: str, parser: str = "strict") -> Verdict:
    """Read the verdict of a verifier turn.

    `strict`: the text ends with "The answer is correct." or "The answer is wrong.", period included, as PAG's code asks
    (arXiv 2506.10406), and says such a thing only once. `lenient` takes any "answer is correct" (or right, wrong, incorrect)
    anywhere, in any case, as long as all of them agree; what is only supposed ("if the answer is ...") or asked does not count.

    Args:
        text (`str`):
            The turn's text, without special tokens.
        parser (`str`, *optional*, defaults to `"strict"`):
            `strict` or `lenient`.

    Raises:
        ValueError: If there is no such parser.
    """
    if parser == "strict":
        found = _STRICT.search(text)
        return Verdict(found.group(1)) if found and len(_SENTENCE.findall(text)) == 1 else Verdict.NONE
    if parser != "lenient":
        raise ValueError(f"There is no verdict parser `{parser}`. Choose {' or '.join(PARSERS)}.")
    said = {found.group(1).lower() in _SAYS_CORRECT for found in _statements(text)}
    if len(said) != 1:
        return Verdict.NONE
    return Verdict.CORRECT if said.pop() else Verdict.WRONG


def _statements(text: str) -> list[re.Match[str]]:
    """Where a text states that the answer is correct or wrong."""
    return [found for found in _LENIENT.finditer(text) if not _SUPPOSED.search(text[: found.start()])]


def chance_of_correct(completion: Completion, verdict: Verdict, decode: Callable[[Sequence[int]], str]) -> float:
    """How sure the model is that the attempt is correct: the probability of the word with which it said so, or what that of
    "wrong" leaves; 0 without a verdict.

    Args:
        completion ([`Completion`]):
            The verifier turn, with log-probs.
        verdict ([`Verdict`]):
            What it says.
        decode (`Callable[[Sequence[int]], str]`):
            Token ids to text.
    """
    if verdict is Verdict.NONE or not completion.logprobs:
        return 0.0
    ids = completion.token_ids
    text = decode(ids)
    said = (_statements(text) or list(_LENIENT.finditer(text)))[-1]

    def decoded(count: int) -> int:
        return len(decode(ids[:count]))

    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, said.start(1), key=decoded) - 1
    last = bisect.bisect_left(counts, said.end(1), key=decoded)
    chance = math.exp(sum(completion.logprobs[first:last]))
    return chance if verdict is Verdict.CORRECT else 1.0 - chance
