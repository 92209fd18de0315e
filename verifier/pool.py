"""`Verifier`: a pool of grading workers that no input can hang.

Why an own pool: `multiprocessing.Pool` loses the item and waits for ever when a worker is killed,
`concurrent.futures` breaks for good, and neither can stop a worker that hangs in C code. Here a worker is a
subprocess with one pipe; the clock starts when it takes an item up, and a worker that exceeds it, or dies, is
replaced at the cost of that one item.
"""

import asyncio
import atexit
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from .grading import Grade, Outcome, extract_answer

_START_TIMEOUT_S = 120.0
"""A worker imports sympy before it is ready; on a loaded machine that has taken half a minute."""


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, timeout_s: float, memory_mb: int):
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def start(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        # -P keeps the current folder off sys.path: a user's own `sympy.py` or `astarpo/` must not be picked up.
        command = [sys.executable, "-P", "-m", f"{__package__}.worker", str(self.memory_mb)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        self.buffer = b""
        if self._read_line(_START_TIMEOUT_S) != "ready":
            code = self.process.poll()
            self.stop()
            raise RuntimeError(
                f"A grading worker did not start (exit code {code}). Run `{' '.join(command)} </dev/null` to see why; "
                f"a `memory_mb` ({self.memory_mb}) too small to import sympy is the usual reason."
            )
        return self.process

    def judge(self, answer: str, gold: str) -> Grade:
        process = self.start()
        assert process.stdin is not None
        began = time.perf_counter()
        try:
            process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            process.stdin.flush()
            verdict = self._read_line(self.timeout_s)
        except BrokenPipeError:
            verdict = ""
        seconds = time.perf_counter() - began
        if verdict:
            return Grade(Outcome(verdict), answer, seconds)
        self.stop()
        return Grade(Outcome.TIMED_OUT if verdict is None else Outcome.CRASHED, answer, seconds)

    def _read_line(self, timeout_s: float) -> str | None:
        """The next line, "" when the process has ended, None when `timeout_s` has passed."""
        assert self.process is not None and self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self.buffer:
            poller = select.poll()  # select.select fails on descriptors above 1023, which vLLM and loaders can reach
            poller.register(descriptor, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return ""
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode()

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self.process = None


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
        self._workers = [_Worker(timeout_s, memory_mb) for _ in range(workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="astarpo-verifier")
        self._closed = False

    def grade_batch(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """Grade completions against their gold answers.

        Args:
            completions (`Sequence[str]`):
                What the policy wrote, one per item.
            golds (`Sequence[str]`):
                The gold answers, one per item.

        Returns:
            `list[Grade]`: One grade per item, in order.
        """
        if self._closed:
            raise RuntimeError("This Verifier is closed; make a new one.")
        pairs = list(zip(completions, golds, strict=True))
        answers = [extract_answer(completion) for completion in completions]
        unique = {(answer, gold) for answer, (_, gold) in zip(answers, pairs, strict=True) if answer is not None}
        order = sorted(unique)
        judged = dict(zip(order, self._threads.map(self._judge, order), strict=True))
        return [
            Grade(Outcome.NO_ANSWER) if answer is None else judged[answer, gold]
            for answer, (_, gold) in zip(answers, pairs, strict=True)
        ]

    async def grade_batch_async(self, completions: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """The same as [`Verifier.grade_batch`], without blocking the event loop."""
        return await asyncio.to_thread(self.grade_batch, completions, golds)

    def _judge(self, pair: tuple[str, str]) -> Grade:
        worker = self._idle.get()
        try:
            return worker.judge(*pair)
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


def grade(completion: str, gold: str) -> Grade:
    r"""Grade one completion against a gold answer.

    Args:
        completion (`str`):
            What the policy wrote.
        gold (`str`):
            The gold answer, without a box around it.

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
