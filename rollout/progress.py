"""One progress line for sampling jobs: a rich bar in a terminal, a plain line now and then in a log."""

import sys
import time
from typing import Any

LOG_SECONDS = 15.0


class JobProgress:
    """Shows samples/s, tokens/s, the solve rate so far and the time left.

    Args:
        name (`str`):
            What is being done.
        total (`int`):
            Samples to make.
        done (`int`, *optional*, defaults to `0`):
            Samples that an earlier run made; only mentioned.
    """

    def __init__(self, name: str, total: int, done: int = 0):
        self._name, self._total, self._earlier = name, total, done
        self._samples = self._tokens = self._failed = 0
        self._solved: float | None = None
        self._began = self._logged = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "JobProgress":
        if self._earlier:
            print(f"{self._name}: {self._earlier} samples are there already, {self._total} to make", flush=True)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, rates="")
        return self

    def add(self, samples: int, tokens: int, solved: float | None = None, failed: int = 0) -> None:
        """Count finished samples, their tokens and, where they are graded already, their rewards; and those that failed."""
        self._samples += samples
        self._failed += failed
        self._tokens += tokens
        if solved is not None:
            self._solved = (self._solved or 0.0) + solved
        if self._bar is not None:
            self._bar.update(self._task, completed=self._samples + self._failed, rates=self._rates())
        elif time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            print(self._line(), flush=True)

    def _rates(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._began)
        rates = f"{self._samples / seconds:.1f} samples/s, {self._tokens / seconds:.0f} tokens/s"
        if self._solved is not None:
            rates += f", solved {self._solved / max(1, self._samples):.1%}"
        return f"{rates}, {self._failed} FAILED" if self._failed else rates

    def _line(self) -> str:
        to_make = max(0, self._total - self._samples - self._failed)
        left = to_make * (time.monotonic() - self._began) / max(1, self._samples)
        return f"{self._name}: {self._samples}/{self._total}, {self._rates()}, {left:.0f} s left"

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        print(self._line(), flush=True)
