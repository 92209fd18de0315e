"""What the verifier turn said of the attempt."""

import math
import re
from collections.abc import Callable, Sequence
from enum import StrEnum

from ..engines.interface import Completion

_STRICT = re.compile(r"The answer is (correct|wrong)\.$")
_SENTENCE = re.compile(r"The answer is (?:correct|wrong)")
_LENIENT = re.compile(r"\banswer is\W{0,4}(correct|right|wrong|incorrect)\b", re.IGNORECASE)
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

    `strict` is PAG's rule (arXiv 2506.10406): the text ends with "The answer is correct." or "The answer is wrong.", period
    included, and says so once. `lenient` takes any "answer is correct" (or right, wrong, incorrect) anywhere, in any case, as long as all
    of them agree.

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
    said = {word.lower() in _SAYS_CORRECT for word in _LENIENT.findall(text)}
    if len(said) != 1:
        return Verdict.NONE
    return Verdict.CORRECT if said.pop() else Verdict.WRONG


def chance_of_correct(completion: Completion, verdict: Verdict, decode: Callable[[Sequence[int]], str]) -> float:
    """The model's probability of the verdict "correct", from the tokens of the last word that says it; 0 without a verdict.

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
    lengths = [len(decode(ids[:count])) for count in range(len(ids) + 1)]
    said = list(_LENIENT.finditer(decode(ids)))[-1]
    first = max(count for count, length in enumerate(lengths) if length <= said.start(1))
    last = next(count for count, length in enumerate(lengths) if length >= said.end(1))
    chance = math.exp(sum(completion.logprobs[first:last]))
    return chance if verdict is Verdict.CORRECT else 1.0 - chance
