"""Ctrl-C as a request: finish the update, save a checkpoint, stop. A second Ctrl-C stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnInterrupt(TrainerCallback):
    """Ends training after the present update when SIGINT or SIGTERM arrives inside its `with` block."""

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this update and saving a checkpoint; press Ctrl-C again to stop at once", flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end of training once a signal has arrived."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def __enter__(self) -> "StopOnInterrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may listen to signals
        self._earlier = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
