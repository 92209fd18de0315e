"""What a grade is."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

RULES_VERSION = 4
"""Raised whenever a verdict may change; stored with every grade that is kept."""


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
