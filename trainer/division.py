"""The quickstart's task: exact divisions, each after three worked examples.

The examples show the form of an answer, so that nearly every sample of the untrained model states one; what is left to learn is
arithmetic. An answer can be checked by a multiplication, which a small model does better than a division: a verifier has something to
know that the attempt did not.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

SYSTEM_PROMPT = "Answer in one short sentence."
EXAMPLES = ((132, 12), (45, 9), (56, 7))
LARGEST, HELD_OUT = 15, 100


def question(dividend: int, divisor: int) -> str:
    """A division as it is put to the model."""
    return f"What is {dividend} divided by {divisor}?"


def answer(dividend: int, divisor: int, quotient: int) -> str:
    """An answer in the form of the examples."""
    return f"{dividend} divided by {divisor} is {quotient}."


def checked(dividend: int, divisor: int, quotient: int, product: int, is_right: bool) -> str:
    """A check in the form that the warm-up teaches. "which is" or "not" is where product and dividend are compared: there the untrained
    model tells the two cases apart, at a bare "The answer is" it hardly does (docs/results.md)."""
    if is_right:
        return f"{quotient} times {divisor} is {product}, which is {dividend}. The answer is correct."
    return f"{quotient} times {divisor} is {product}, not {dividend}. The answer is wrong."


def asked(text: str) -> tuple[int, int]:
    """Dividend and divisor of a question."""
    dividend, divisor = map(int, re.findall(r"\d+", text))
    return dividend, divisor


def agrees(question: str, verification: str) -> bool | None:
    """Whether the product that a verification states is the dividend; None where it states none."""
    said = re.search(r"\d+ times \d+ is (\d+)", verification)
    return None if said is None else int(said[1]) == asked(question)[0]


def divisions(largest: int = LARGEST) -> list[tuple[int, int]]:
    """All (dividend, divisor) with divisor and quotient from 2 to `largest`, but for the examples, in an order that follows from a
    hash."""
    pairs = [(a * b, b) for a in range(2, largest + 1) for b in range(2, largest + 1)]
    return sorted((pair for pair in pairs if pair not in EXAMPLES), key=_hash)


def _hash(pair: tuple[int, int]) -> str:
    return hashlib.blake2b(f"{pair[0]} / {pair[1]}".encode(), digest_size=8).hexdigest()


def messages(dividend: int, divisor: int) -> list[dict[str, str]]:
    """The prompt of a division: the worked examples as a conversation, then the question."""
    chat = [{"role": "system", "content": SYSTEM_PROMPT}]
    for a, b in EXAMPLES:
        chat += [
            {"role": "user", "content": question(a, b)},
            {"role": "assistant", "content": answer(a, b, a // b)},
        ]
    return [*chat, {"role": "user", "content": question(dividend, divisor)}]


def write_problems(folder: Path, largest: int = LARGEST, held_out: int = HELD_OUT) -> tuple[Path, Path]:
    """Write the problems as `train.jsonl` and `heldout.jsonl`. The split is the same for every seed.

    Args:
        folder (`Path`):
            Where the files go.
        largest (`int`, *optional*, defaults to `15`):
            Largest divisor and quotient: 193 problems, 358 for 20.
        held_out (`int`, *optional*, defaults to `100`):
            How many problems to hold out.
    """
    pairs = divisions(largest)
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(files, (pairs[held_out:], pairs[:held_out]), strict=True):
        rows: list[dict[str, Any]] = [{"prompt": messages(a, b), "answer": str(a // b)} for a, b in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
