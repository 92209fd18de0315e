"""Progress of a sampling job: a bar in a terminal, a plain line now and then in a log."""

import os
import sys
import time
from typing import Any

LOG_SECONDS = 15.0
LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}, {remaining} left"
BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}, {remaining} left"


class JobProgress:
    """Shows samples/s, tokens/s, the solve rate so far, failures and the time left.

    Args:
        name (`str`):
            What is being done.
        total (`int`):
            How many units there are to do.
        unit (`str`, *optional*, defaults to `"samples"`):
            What is counted.
        done (`int`, *optional*, defaults to `0`):
            How many units an earlier run did; only mentioned.
    """

    def __init__(self, name: str, total: int, unit: str = "samples", done: int = 0):
        from tqdm import tqdm

        self._is_log = not sys.stdout.isatty()
        if done:
            _say(f"{name}: {done} {unit} are there already, {total} to make")
        # In a log tqdm only counts: its lines end without a line break, so they are printed here.
        file = open(os.devnull, "w") if self._is_log else sys.stdout  # noqa: SIM115
        self._bar: Any = tqdm(
            desc=name,
            total=total,
            unit=f" {unit}",
            file=file,
            bar_format=LINE if self._is_log else BAR,
            ncols=120 if self._is_log else None,
            mininterval=0.5,
        )
        self._tokens = self._graded = self._failed = 0
        self._solved = 0.0
        self._printed = time.monotonic()

    def __enter__(self) -> "JobProgress":
        return self

    def add(self, units: int = 0, tokens: int = 0, failed: int = 0) -> None:
        """Count finished units, their tokens, and the samples that failed."""
        self._tokens += tokens
        self._failed += failed
        self._bar.update(units)
        self._show()

    def add_grades(self, count: int, solved: float) -> None:
        """Count graded samples and the sum of their rewards."""
        self._graded += count
        self._solved += solved
        self._show()

    def _show(self) -> None:
        seconds = max(1e-9, self._bar.format_dict["elapsed"])
        words = [f"{self._tokens / seconds:.0f} tokens/s"] if self._tokens else []
        if self._graded:
            words.append(f"solved {self._solved / self._graded:.1%}")
        if self._failed:
            words.append(f"{self._failed} FAILED")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        if self._is_log and time.monotonic() - self._printed > LOG_SECONDS:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        _say(str(self._bar))

    def __exit__(self, *error: Any) -> None:
        if self._is_log:
            self._print()
        self._bar.close()
        if self._is_log:
            self._bar.fp.close()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
