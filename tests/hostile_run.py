"""Judges all hostile completions in one way of running Python; a program, since some ways need a process of their own.

python tests/hostile_run.py {threads,asyncio,accelerate} REPORT.json
"""

import asyncio
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from hostile import HOSTILE

from astarpo.verifier import Grade, Verifier

TIMEOUT_S, MEMORY_MB, WORKERS = 1.0, 768, 2


def sound(index: int) -> tuple[str, str]:
    """A good answer that only a worker can judge."""
    return rf"\boxed{{\sqrt{{{index * index}}}}}", str(index)


def watch_memory(stop: threading.Event, peak: list[int]) -> None:
    """Record the largest worker."""
    while not stop.wait(0.1):
        for child in psutil.Process().children(recursive=True):
            try:
                peak[0] = max(peak[0], child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue


def one(verifier: Verifier, index: int, completion: str) -> tuple[Grade, Grade, float]:
    """A hostile item, and a good one behind it."""
    began = time.monotonic()
    grade = verifier.grade_batch([completion], ["7"])[0]
    seconds = time.monotonic() - began
    text, gold = sound(index + 2)
    return grade, verifier.grade_batch([text], [gold])[0], seconds


def run(mode: str, verifier: Verifier) -> list[tuple[Grade, Grade, float]]:
    """Judge everything."""
    items = list(enumerate(HOSTILE.values()))
    if mode == "threads":
        with ThreadPoolExecutor(4) as threads:
            return list(threads.map(lambda item: one(verifier, *item), items))
    if mode == "asyncio":

        async def many() -> list[tuple[Grade, Grade, float]]:
            grades = await verifier.grade_batch_async([text for _, text in items], ["7"] * len(items))
            good = [sound(index + 2) for index, _ in items]
            after = await asyncio.gather(*(verifier.grade_batch_async([text], [gold]) for text, gold in good))
            return [(bad, fine[0], bad.seconds) for bad, fine in zip(grades, after, strict=True)]

        return asyncio.run(many())
    from accelerate import PartialState

    state = PartialState(cpu=True)
    assert state.num_processes == 2
    results = [one(verifier, *item) for item in items]
    state.wait_for_everyone()
    state.destroy_process_group()
    return results


def main() -> None:
    """Write what was seen; under `accelerate launch` every process writes its own report."""
    mode, report = sys.argv[1], Path(sys.argv[2])
    stop, peak = threading.Event(), [0]
    with Verifier(workers=WORKERS, timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB) as verifier:
        for _ in range(WORKERS):
            verifier.grade_batch(
                [sound(1000)[0]] + [rf"\boxed{{\sqrt{{{i}}}}}" for i in range(9)], ["1000"] + ["7"] * 9
            )
        threading.Thread(target=watch_memory, args=(stop, peak), daemon=True).start()
        results = run(mode, verifier)
        stop.set()
    rows = {
        name: {"outcome": bad.outcome, "seconds": seconds, "next": fine.outcome}
        for name, (bad, fine, seconds) in zip(HOSTILE, results, strict=True)
    }
    rank = os.environ.get("RANK", "0")
    report.with_suffix(f".{rank}.json").write_text(json.dumps({"rows": rows, "peak_mb": peak[0] / 2**20}))


if __name__ == "__main__":
    main()
