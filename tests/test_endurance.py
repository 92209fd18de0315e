"""Ten thousand items of which one in a hundred is hostile: no ordinary item is lost, and memory stays flat."""

import random
import time

import psutil
import pytest

from astarpo.verifier import Outcome, Verifier

ITEMS, WORKERS, TIMEOUT_S, BATCH = 10_000, 2, 1.0, 250
HANGS = [
    r"\boxed{\sum_{k=1}^{1000000000} \sin(k+%d)}",
    r"\boxed{\prod_{k=1}^{100000000} (k+\sqrt{%d})}",
    r"\boxed{\binom{1000000%03d}{500000000}}",
]


def items(hostile: bool) -> list[tuple[str, str, bool | None]]:
    """Completion, gold, and what the verdict is; None for a hostile item. Four in ten need a worker."""
    chance = random.Random(0)
    made: list[tuple[str, str, bool | None]] = []
    for index in range(ITEMS):
        number, right = chance.randrange(10**6), chance.random() < 0.5
        answer = number if right else number + 1
        if hostile and index % 100 == 50:
            made.append((HANGS[index // 100 % len(HANGS)] % (index % 997), "7", None))
        elif index % 5 < 2:
            made.append((rf"So it is \boxed{{\sqrt{{{answer**2}}}}}.", str(number), right))
        elif index % 5 == 2:
            made.append((rf"\boxed{{\frac{{{3 * answer}}}{{3}}}}", f"{number:,}", right))
        else:
            made.append((f"We add everything up. The answer is {answer}.", str(number), right))
    return made


def run(verifier: Verifier, hostile: bool) -> tuple[float, list[int]]:
    """Seconds, and after each batch the bytes held by the workers and by what this process has grown since."""
    me = psutil.Process()
    rows, memory, before = items(hostile), [], me.memory_info().rss
    began = time.perf_counter()
    for start in range(0, ITEMS, BATCH):
        batch = rows[start : start + BATCH]
        grades = verifier.grade_batch([row[0] for row in batch], [row[1] for row in batch])
        for (completion, _, right), grade in zip(batch, grades, strict=True):
            if right is None:
                assert grade.outcome in (Outcome.TIMED_OUT, Outcome.CRASHED), completion
            else:
                assert grade.outcome is (Outcome.CORRECT if right else Outcome.WRONG), completion
        workers = sum(child.memory_info().rss for child in me.children(recursive=True))
        memory.append(workers + me.memory_info().rss - before)
    return time.perf_counter() - began, memory


@pytest.mark.slow
def test_ten_thousand_items_with_one_hostile_in_a_hundred():
    seconds = {}
    for hostile in (False, True):
        with Verifier(workers=WORKERS, timeout_s=TIMEOUT_S) as verifier:
            warm_up = [rf"\boxed{{\sqrt{{{i}}}+x}}" for i in range(64)]
            verifier.grade_batch(warm_up, ["7"] * 64)
            seconds[hostile], memory = run(verifier, hostile)
        half = memory[len(memory) // 2 :]
        growth = sum(half[-5:]) / sum(half[:5]) - 1
        print(
            f"hostile={hostile}: {seconds[hostile]:.1f} s, memory {max(memory) / 2**20:.0f} MB, growth {growth:+.1%}"
        )
        assert growth < 0.05
    bound = seconds[False] + ITEMS / 100 * (TIMEOUT_S + 0.5) / WORKERS
    print(f"bound {bound:.1f} s")
    assert seconds[True] <= bound
