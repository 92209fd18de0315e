"""Grading of math completions: which text is the answer, and is it right.

`grade` judges one completion, `Verifier` many of them in worker processes, `math_reward` is the same as a TRL reward
function. Nothing here imports torch, and sympy is loaded only inside the workers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers.extraction import extract_answer, extract_gold
    from .grading import Grade, Outcome
    from .reward import math_reward
    from .verifier import Verifier, grade

_EXPORTS = {
    "Grade": "grading",
    "Outcome": "grading",
    "Verifier": "verifier",
    "extract_answer": "answers.extraction",
    "extract_gold": "answers.extraction",
    "grade": "verifier",
    "math_reward": "reward",
}

__all__ = ["Grade", "Outcome", "Verifier", "extract_answer", "extract_gold", "grade", "math_reward"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
