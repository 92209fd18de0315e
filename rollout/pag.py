"""PAG (arXiv 2506.10406): the policy verifies its own attempt, and revises it where it says that it is wrong.

The only file that knows what "verify" and "revise" mean.
"""

import bisect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from .engines.interface import Completion
from .episode import ATTEMPT, EpisodeKind, Turn, TurnGrade

VERIFY, REVISE = "verify", "revise"
VERIFY_PROMPT = (
    "Check the math solution step-by-step. If you find a mistake: state the wrong step, explain why it's wrong, and end your "
    "response with 'The answer is wrong'. If all steps are correct, end your response with 'The answer is correct'."
)
REVISE_PROMPT = (
    "You indicated that your previous answer was wrong. Please provide the correct solution to the math problem."
)
PARSERS = ("strict", "lenient")
VERDICT = "verdict_"
"""How the outcome of a verification begins in a pool; its verdict follows."""

_STRICT = re.compile(r"The answer is (correct|wrong)\.$")
_SENTENCE = re.compile(r"The answer is (?:correct|wrong)")
_LENIENT = re.compile(
    r"\banswer is\W{0,4}(?:(?:therefore|thus|hence|indeed|actually|still|also) )?(correct|right|wrong|incorrect)\b(?!\s*[-?])",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(r"\b(?:if|whether|unless)\b[^.!?\n]*$", re.IGNORECASE)
_SAYS_CORRECT = ("correct", "right")


class Verdict(StrEnum):
    """What a verification says of the attempt. The values double as metric names."""

    CORRECT = "correct"
    WRONG = "wrong"
    NONE = "none"
    """No verdict, or more than one."""


@dataclass(frozen=True)
class Pag(EpisodeKind):
    """An attempt, its verification by the same model, and a revision where the verdict was "wrong".

    Rewards (section 3 of the paper), with z = acc(attempt): R₁ = z, R_v = 1 where the verdict is true of the attempt (no verdict
    never is), R₂ = acc(revision) + α (acc(revision) − z).

    Args:
        verify_prompt (`str`, *optional*):
            Asks to check the attempt; PAG's own when not given.
        revise_prompt (`str`, *optional*):
            Asks for another solution; PAG's own when not given.
        verdict_parser (`str`, *optional*, defaults to `"strict"`):
            `strict` or `lenient`, see [`parse_verdict`].
        alpha (`float`, *optional*, defaults to `1.0`):
            α, at least 0.
        revise_on (`tuple[Verdict, ...]`, *optional*):
            Verdicts after which the model revises: "wrong" in training, and no verdict too in PAG's own evaluation.
    """

    verify_prompt: str = VERIFY_PROMPT
    revise_prompt: str = REVISE_PROMPT
    verdict_parser: str = "strict"
    alpha: float = 1.0
    revise_on: tuple[Verdict, ...] = (Verdict.WRONG,)

    name = "pag"
    roles = (ATTEMPT, VERIFY, REVISE)

    def __post_init__(self):
        if self.verdict_parser not in PARSERS:
            raise ValueError(f"There is no verdict_parser `{self.verdict_parser}`. Choose {' or '.join(PARSERS)}.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(
                f"alpha must be 0 or more, got {self.alpha}: it weighs acc2 − acc1 in the revision's reward."
            )

    @property
    def follow_ups(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The two follow-up prompts."""
        return {VERIFY: self.verify_prompt, REVISE: self.revise_prompt}

    @property
    def answers(self) -> tuple[str, ...]:
        """Attempt and revision; the verification answers another question."""
        return ATTEMPT, REVISE

    def next_role(self, turns: Sequence[Turn]) -> str | None:
        """A revision only where the verification called for it."""
        if len(turns) < 2:
            return (ATTEMPT, VERIFY)[len(turns)]
        return REVISE if len(turns) == 2 and self.verdict(turns[1]) in self.revise_on else None

    def verdict(self, verification: Turn) -> Verdict:
        """What a verification says; nothing where it was truncated."""
        return Verdict.NONE if verification.is_truncated else parse_verdict(verification.text, self.verdict_parser)

    def judge(self, turn: Turn, label: int | None) -> TurnGrade:
        """Whether the verdict is true of the attempt."""
        verdict = self.verdict(turn)
        return TurnGrade(f"{VERDICT}{verdict}", verdict_reward(verdict, label))

    def reward(self, role: str, success: float, label: int) -> float:
        """acc, or whether the verdict is true; the revision's gain over the attempt counts α more."""
        return success + self.alpha * (success - label) if role == REVISE else success

    def for_evaluation(self) -> "Pag":
        """PAG's own evaluation also revises where there is no verdict."""
        return replace(self, revise_on=(Verdict.WRONG, Verdict.NONE))

    def fingerprint(self) -> dict[str, Any]:
        """What decides episodes besides what decides completions. α does not: it changes rewards, not samples."""
        return {
            "episode": self.name,
            "verify_prompt": self.verify_prompt,
            "revise_prompt": self.revise_prompt,
            "verdict_parser": self.verdict_parser,
        }


def verdict_reward(verdict: Verdict, label: int | None) -> float | None:
    """1 for a true verdict, 0 for a false one or none at all; None where nobody knows whether the attempt is right."""
    if label is None:
        return None
    return float(verdict is not Verdict.NONE and (verdict is Verdict.CORRECT) == bool(label))


def parse_verdict(text: str, parser: str = "strict") -> Verdict:
    """Read the verdict of a verification.

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
            The verification, with log-probs.
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

    # The word may be several tokens: the first and last token whose text overlaps it.
    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, said.start(1), key=decoded) - 1
    last = bisect.bisect_left(counts, said.end(1), key=decoded)
    chance = math.exp(sum(completion.logprobs[first:last]))
    return chance if verdict is Verdict.CORRECT else 1.0 - chance
