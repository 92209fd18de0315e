"""`math_reward`: the verifier as a TRL reward function."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .grading import Outcome
from .verifier import shared_verifier

Message = dict[str, Any]


def completion_text(completion: str | list[Message]) -> str:
    """The text of a completion in TRL's plain or chat form."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion if message["role"] == "assistant"]
    return "".join(content if isinstance(content, str) else _text_parts(content) for content in contents)


def _text_parts(parts: list[dict[str, Any]]) -> str:
    return "".join(part.get("text", "") for part in parts)


def math_reward(
    prompts: list[str] | list[list[Message]],
    completions: list[str] | list[list[Message]],
    solution: Sequence[str | int | float | None],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Reward 1 for a completion whose final answer equals the gold answer, 0 for any other.

    Has TRL's reward signature: pass it as `reward_funcs=math_reward` to `GRPOTrainer` or `AStarPOTrainer`.

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            The prompts; not used.
        completions (`list[str]` or `list[list[dict]]`):
            Plain or chat completions.
        solution (`Sequence[str | int | float | None]`):
            The data set's `solution` column: gold answers, or worked solutions that end in one. `None` has no meaning.
        log_metric (`Callable[[str, float], None]`, *optional*):
            TRL's hook; receives the share of every outcome as `verifier/<outcome>`.
        **kwargs:
            The other columns and hooks that TRL passes; not used.

    Returns:
        `list[float | None]`: One reward per completion, `None` (no signal) where the gold answer cannot be parsed
        or judging failed.
    """
    texts = [completion_text(completion) for completion in completions]
    grades = shared_verifier().grade_batch(texts, ["" if text is None else str(text) for text in solution])
    if log_metric is not None:
        counts = Counter(grade.outcome for grade in grades)
        for outcome in Outcome:
            log_metric(f"verifier/{outcome}", counts[outcome] / max(1, len(grades)))
    return [reward_of(grade.outcome) for grade in grades]


def reward_of(outcome: Outcome) -> float | None:
    """The reward of an outcome: an infrastructure failure is no signal, never a wrong answer."""
    match outcome:
        case Outcome.CORRECT:
            return 1.0
        case Outcome.WRONG | Outcome.NO_ANSWER:
            return 0.0
        case Outcome.UNPARSEABLE_GOLD | Outcome.TIMED_OUT | Outcome.CRASHED:
            return None
