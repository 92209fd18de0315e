"""Ctrl-C as a request: finish the update, save a checkpoint, stop. A second Ctrl-C stops at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def agreed(wish: bool) -> bool:
    """Whether any process has the wish; all get the same answer, or some would save while others go on."""
    return wish if PartialState().num_processes == 1 else any(gather_object([wish]))


def stop_and_save(control: TrainerControl) -> None:
    """Save and end training now: an evaluation that is due would only cost time."""
    control.should_save = control.should_training_stop = True
    control.should_evaluate = False


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
        if agreed(self.requested):
            self.requested = True
            stop_and_save(control)

    def __enter__(self) -> "StopOnInterrupt":
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may listen to signals
        self._earlier = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
