"""The parent's side of a grading worker: start it, feed it, hold the clock, have it killed.

Why no pool from a library: `multiprocessing.Pool` loses the item and waits for ever when a worker is killed,
`concurrent.futures` breaks for good, and neither can stop a worker that hangs in C code. `pebble` can, but its workers
are `multiprocessing` children (which import the user's main module again) and take a second to replace.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from .grading import Grade, Outcome

START_TIMEOUT_S = 120.0
"""A worker imports sympy before it is ready; on a loaded machine that has taken half a minute."""
RECYCLE_AFTER = 2_000
"""Items after which a judge is replaced: sympy's and antlr's caches only grow."""


class Worker:
    """One worker: a keeper process, its present judge (see `worker.py`), and the pipes to them."""

    def __init__(self, timeout_s: float, memory_mb: int):
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.process: subprocess.Popen[bytes] | None = None
        self._control = -1
        self._judge = ""
        self._judged = 0
        self._batch = 0
        self._buffer = b""

    def judge(self, pairs: Sequence[tuple[str | None, str]]) -> list[Grade]:
        """Judge `(answer, gold)` pairs; one that hangs or kills its judge costs itself only."""
        grades: list[Grade] = []
        while len(grades) < len(pairs):
            self._start()
            self._judge_until_failure(pairs[len(grades) :], grades)
        if self._judged > RECYCLE_AFTER:
            self._replace_judge()
        return grades

    def _judge_until_failure(self, pairs: Sequence[tuple[str | None, str]], grades: list[Grade]) -> None:
        assert self.process is not None and self.process.stdin is not None
        self._batch += 1
        with suppress(BrokenPipeError):  # the keeper is gone: reading says so
            self.process.stdin.write(json.dumps([self._batch, pairs]).encode() + b"\n")
            self.process.stdin.flush()
        for answer, _ in pairs:
            began = time.perf_counter()
            outcome = self._next_outcome()
            grades.append(Grade(outcome, answer or "", time.perf_counter() - began))
            self._judged += 1
            if outcome is Outcome.TIMED_OUT:
                self._replace_judge()
            if outcome in (Outcome.TIMED_OUT, Outcome.CRASHED):
                return

    def _next_outcome(self) -> Outcome:
        deadline = time.monotonic() + self.timeout_s
        while True:
            line = self._read_line(deadline)
            if line is None:
                return Outcome.TIMED_OUT
            head, _, word = line.partition(" ")
            if head == "ready":
                self._judge, self._judged = word, 0
                return Outcome.CRASHED
            if line == "":
                self.stop()
                return Outcome.CRASHED
            if head == str(self._batch):
                return Outcome(word)

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None and self._take_note():
            return
        self.stop()
        control, self._control = os.pipe()
        # -P keeps the current folder off sys.path: a user's own `sympy.py` or `astarpo/` must not be picked up.
        command = [sys.executable, "-P", "-m", f"{__package__}.worker", str(self.memory_mb), str(control)]
        # Without gmpy2: a big-integer loop inside it can only be killed, and it aborts where Python raises MemoryError.
        plain = {
            "SYMPY_GROUND_TYPES": "python",
            "MPMATH_NOGMPY": "1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **plain}, pass_fds=[control]
        )
        os.close(control)
        self._buffer = b""
        self._await_judge(" ".join(command))

    def _take_note(self) -> bool:
        """Read what arrived while nothing was asked: a judge that died idle was replaced. False when all is over."""
        while (line := self._read_line(time.monotonic())) is not None:
            head, _, word = line.partition(" ")
            if head == "ready":
                self._judge, self._judged = word, 0
            if line == "":
                return False
        return True

    def _replace_judge(self) -> None:
        """Have the judge killed and wait for the next one."""
        with suppress(BrokenPipeError):
            os.write(self._control, f"{self._judge}\n".encode())
        self._await_judge("the grading worker")

    def _await_judge(self, command: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            line = self._read_line(deadline)
            if line:
                head, _, number = line.partition(" ")
                if head == "ready" and number != self._judge:
                    self._judge, self._judged = number, 0
                    return
                continue
            code = self.process.poll() if self.process is not None else None
            self.stop()
            raise RuntimeError(
                f"A grading worker did not start (exit code {code}): `{command}`. "
                f"A `memory_mb` ({self.memory_mb}) too small for sympy is the usual reason; the lines above may say more."
            )

    def _read_line(self, deadline: float) -> str | None:
        """The next line, "" when the process has ended, None when `deadline` has passed."""
        assert self.process is not None and self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            poller = select.poll()  # select.select fails on descriptors above 1023, which vLLM and loaders can reach
            poller.register(descriptor, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return ""
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def stop(self) -> None:
        """End the worker."""
        if self.process is None:
            return
        os.close(self._control)  # the keeper kills its judge and ends
        self._control, self._judge = -1, ""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self.process = None
