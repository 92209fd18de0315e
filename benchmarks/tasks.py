"""What the contenders of `benchmarks/trainer.py` learn: problems from a generator, each after the same worked examples.

The examples show the form of an answer, so that nearly every sample of the untrained model states one, and what is left to learn is arithmetic.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from astarpo.trainer.division import SYSTEM_PROMPT, divisions, messages

Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        train, heldout (`Sequence[tuple[Chat, str]]`):
            Prompts with their answers. The split is the same for every seed.
        length (`int`):
            Most tokens of a completion.
        short (`int`):
            Tokens within which nearly every answer ends.
    """

    train: Sequence[tuple[Chat, str]]
    heldout: Sequence[tuple[Chat, str]]
    length: int
    short: int


def division() -> Task:
    """Exact divisions with factors from 2 to 20: 158 to train on, 200 held out."""
    problems = [(messages(a, b), str(a // b)) for a, b in divisions(20)]
    return Task(problems[200:], problems[:200], length=24, short=15)


STEPS = ((7, 8, 5), (3, 4, 8), (9, 6, 2))
"""Worked examples of [`two_steps`]."""


def two_steps() -> Task:
    """A product and a sum, in two sentences: 80 to train on, 60 held out. A wrong product makes the sum wrong, too."""
    numbers = [(a, b, c) for a in range(2, 13) for b in range(2, 13) for c in range(1, 21) if (a, b, c) not in STEPS]
    random.Random(0).shuffle(numbers)
    problems = [(_steps_chat(*one), str(one[0] * one[1] + one[2])) for one in numbers[:140]]
    return Task(problems[60:], problems[:60], length=36, short=27)


def _steps_chat(a: int, b: int, c: int) -> Chat:
    chat = [{"role": "system", "content": SYSTEM_PROMPT}]
    for x, y, z in STEPS:
        worked = f"{x} times {y} is {x * y}. {x * y} plus {z} is {x * y + z}."
        chat += [{"role": "user", "content": _steps(x, y, z)}, {"role": "assistant", "content": worked}]
    return [*chat, {"role": "user", "content": _steps(a, b, c)}]


def _steps(a: int, b: int, c: int) -> str:
    return f"What is {a} times {b}, plus {c}?"


TASKS: dict[str, Callable[[], Task]] = {"division": division, "two_steps": two_steps}
