"""How fast the verifier is, and where its verdicts differ from plain math-verify's.

    python benchmarks/verifier.py --input graded.jsonl

Prints one JSON line. Both sides see the same items in the same run, in turns of `CHUNK` items, so that a busy machine
slows both: `raw` is `math_verify.parse` + `verify` in this process, `ours` is a `Verifier` with one worker. Memo and gold
cache are empty when the clock starts; the warm-up uses other items.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from math_verify import parse, verify

from astarpo.verifier import Verifier

CHUNK = 100
WARM_UP = ((r"So it is \boxed{\frac{3}{17}}.", r"\frac{3}{17}"), (r"\boxed{x^2+\sqrt{19}}", r"\sqrt{19}+x^2"))


def raw_verdicts(items: Sequence[dict[str, Any]]) -> list[bool]:
    """What math-verify says with its defaults."""
    return [bool(verify(parse(f"\\boxed{{{item['gold']}}}"), parse(item["completion"]))) for item in items]


def compare(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Run both sides over all items."""
    raw_seconds = ours_seconds = 0.0
    changes, latencies, agreed = [], [], 0
    with Verifier(workers=1) as verifier:
        verifier.grade_batch([text for text, _ in WARM_UP], [gold for _, gold in WARM_UP])
        raw_verdicts([{"completion": text, "gold": gold} for text, gold in WARM_UP])
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            began = time.perf_counter()
            raw = raw_verdicts(chunk)
            middle = time.perf_counter()
            grades = verifier.grade_batch([item["completion"] for item in chunk], [item["gold"] for item in chunk])
            ended = time.perf_counter()
            raw_seconds += middle - began
            ours_seconds += ended - middle
            latencies += [grade.seconds * 1000 for grade in grades]
            changes += [
                item["id"] for item, one, grade in zip(chunk, raw, grades, strict=True) if one != grade.correct
            ]
            agreed += sum(grade.correct == item.get("verdict") for item, grade in zip(chunk, grades, strict=True))
    report: dict[str, Any] = {
        "items": len(items),
        "raw_per_s": round(len(items) / raw_seconds, 1),
        "ours_per_s": round(len(items) / ours_seconds, 1),
        "ratio": round(raw_seconds / ours_seconds, 2),
        "p50_ms": round(statistics.median(latencies), 4),
        "p99_ms": round(statistics.quantiles(latencies, n=100)[98], 4),
        "verdict_changes": len(changes),
        "changed_ids": changes,
    }
    if items and "verdict" in items[0]:
        report["label_agreement"] = round(agreed / len(items), 4)
    return report


def main() -> None:
    """Read the file, print the report."""
    parser = argparse.ArgumentParser(
        description="Speed of the verifier against plain math-verify, on graded completions."
    )
    parser.add_argument("--input", type=Path, required=True, help="JSONL file with id, completion and gold")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    items = [json.loads(line) for line in options.input.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(items) < 2:
        parser.error(f"{options.input} holds fewer than two items")
    print(json.dumps(compare(items)))


if __name__ == "__main__":
    main()
