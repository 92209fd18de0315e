"""`Verifier`: a pool of grading workers that no input can hang.

What exact arithmetic decides is decided in the calling thread; what is left goes to worker processes, each different
(answer, gold) pair once.
"""

import asyncio
import atexit
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from .answers.equality import Exact, Undecided, judge
from .answers.extraction import extract_answer, extract_gold
from .grading import Grade, Outcome
from .worker_client import Worker

BATCH = 32
"""Pairs that a worker gets at once."""
MEMO = 4096
"""Verdicts that a [`Verifier`] remembers."""
EXACT_CHARS = 300
"""Longer answers go to a worker, so that nothing a policy writes can hold up the caller."""

Pair = tuple[str | None, str]


class Verifier:
    """Grades completions in worker processes. Safe from any thread, from asyncio and beside CUDA.

    Workers start when first needed and stay warm. Use it as a context manager, or call [`Verifier.close`].

    Args:
        workers (`int`, *optional*, defaults to `1`):
            Number of worker processes.
        timeout_s (`float`, *optional*, defaults to `5.0`):
            Seconds that one item may take, counted from when a worker takes it up.
        memory_mb (`int`, *optional*, defaults to `2048`):
            Address space of one worker in MiB.
    """

    def __init__(self, workers: int = 1, timeout_s: float = 5.0, memory_mb: int = 2048):
        if workers < 1 or timeout_s <= 0 or memory_mb < 256:
            raise ValueError(
                f"Verifier needs workers >= 1, timeout_s > 0 and memory_mb >= 256, "
                f"got {workers}, {timeout_s} and {memory_mb}."
            )
        self._workers = [Worker(timeout_s, memory_mb) for _ in range(workers)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="astarpo-verifier")
        self._memo: OrderedDict[Pair, Outcome] = OrderedDict()
        self._memo_lock = threading.Lock()
        self._process = os.getpid()
        self._closed = False

    def grade_batch(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """Grade completions against their gold answers.

        Args:
            completions (`Sequence[str]`):
                What the policy wrote, one per item.
            golds (`Sequence[str]`):
                The gold answers (or worked solutions that end in one), one per item.

        Returns:
            `list[Grade]`: One grade per item, in order.

        Raises:
            RuntimeError: If the verifier is closed, or was made before this process forked.
        """
        if self._closed:
            raise RuntimeError("This Verifier is closed; make a new one.")
        if self._process != os.getpid():
            raise RuntimeError("This Verifier belongs to the process that forked this one; make a new one here.")
        grades: list[Grade | None] = []
        waiting: dict[Pair, list[int]] = {}
        for completion, gold in zip(completions, golds, strict=True):
            began = time.perf_counter()
            pair = (extract_answer(completion), extract_gold(gold))
            outcome = self._at_once(pair)
            if outcome is None:
                waiting.setdefault(pair, []).append(len(grades))
                grades.append(None)
            else:
                grades.append(Grade(outcome, pair[0] or "", time.perf_counter() - began))
        for pair, grade in self._by_workers(list(waiting)):
            for index in waiting[pair]:
                grades[index] = grade
        return [grade for grade in grades if grade is not None]

    async def grade_batch_async(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """The same as [`Verifier.grade_batch`], without blocking the event loop."""
        return await asyncio.to_thread(self.grade_batch, completions, golds)

    def _at_once(self, pair: Pair) -> Outcome | None:
        """The verdict from memory or by exact arithmetic, or None."""
        outcome = self._memo.get(pair)
        if outcome is not None:
            return outcome
        answer, gold = pair
        if len(gold) + len(answer or "") > EXACT_CHARS:
            return None
        try:
            outcome = judge(answer, gold, Exact())
        except Undecided:
            return None
        self._remember(pair, outcome)
        return outcome

    def _remember(self, pair: Pair, outcome: Outcome) -> None:
        if outcome in (Outcome.TIMED_OUT, Outcome.CRASHED):
            return
        with self._memo_lock:
            self._memo[pair] = outcome
            if len(self._memo) > MEMO:
                self._memo.popitem(last=False)

    def _by_workers(self, pairs: list[Pair]) -> list[tuple[Pair, Grade]]:
        if not pairs:
            return []
        size = min(BATCH, -(-len(pairs) // len(self._workers)))
        batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        judged = [item for batch in self._threads.map(self._judge, batches) for item in batch]
        for pair, grade in judged:
            self._remember(pair, grade.outcome)
        return judged

    def _judge(self, batch: list[Pair]) -> list[tuple[Pair, Grade]]:
        worker = self._idle.get()
        try:
            return list(zip(batch, worker.judge(batch), strict=True))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Stop the workers."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_shared: Verifier | None = None
_shared_lock = threading.Lock()


def shared_verifier() -> Verifier:
    """The process-wide verifier behind [`grade`] and [`math_reward`], started on first use, stopped at exit."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Verifier()
            atexit.register(_shared.close)
        return _shared


def _forget_shared() -> None:
    """A forked child must not share the pipes of its parent's workers; its own start when it needs them."""
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_shared)


def grade(completion: str, gold: str) -> Grade:
    r"""Grade one completion against a gold answer.

    Args:
        completion (`str`):
            What the policy wrote.
        gold (`str`):
            The gold answer, or a worked solution that ends in one.

    Returns:
        [`Grade`]: The outcome and the text that was judged.

    Example:
    ```python
    >>> from astarpo.verifier import grade
    >>> grade(r"So it is \boxed{\frac{1}{2}}.", "0.5").outcome
    <Outcome.CORRECT: 'correct'>
    ```
    """
    return shared_verifier().grade_batch([completion], [gold])[0]
