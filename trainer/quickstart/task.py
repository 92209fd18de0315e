"""The times tables from 2 × 2 to 12 × 12: 90 problems to train on, 31 held out."""

import json
import random
from pathlib import Path

HELD_OUT = 31


def write_problems(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl`; the split is the same for every seed.

    Returns:
        `tuple[Path, Path]`: The two files.
    """
    pairs = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    random.Random(0).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, part in zip(files, (pairs[HELD_OUT:], pairs[:HELD_OUT]), strict=True):
        rows = [{"question": f"What is {a} times {b}?", "answer": str(a * b)} for a, b in part]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files
