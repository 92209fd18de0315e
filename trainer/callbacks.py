"""What watches over a run: Ctrl-C, deadlines, a hanging engine, broken gradients, checkpoints that are whole."""

import faulthandler
import logging
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean, stdev
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

WATCHED_UPDATES = 6
"""Updates whose mean reward is compared with the reference's."""
BROKEN_STREAK = 5
"""Updates in a row with a gradient that is not finite after which training stops."""
SCALER_STREAK = 20
"""The same under loss scaling, whose scale falls by half at each of them: from 65536 to below 1 it takes 17."""


def any_rank(flag: bool) -> bool:
    """True on every rank if `flag` is true on any rank. Without this some ranks would save while others go on."""
    return flag if PartialState().num_processes == 1 else any(gather_object([flag]))


def stop_and_save(control: TrainerControl) -> None:
    """Save and end training now; an evaluation that is due would only cost time."""
    control.should_save = control.should_training_stop = True
    control.should_evaluate = False


class StopOnInterrupt(TrainerCallback):
    """Ends training after the present update when SIGINT or SIGTERM arrives inside its `with` block.

    A second signal stops at once.
    """

    def __init__(self) -> None:
        self.requested = self._is_at_once = False
        self._earlier: dict[int, Any] = {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self._is_at_once:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("Stopping after this update and saving a checkpoint. Press Ctrl-C again to stop at once.")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, where no update is under way, the first signal raises `KeyboardInterrupt`."""
        if self.requested:
            raise KeyboardInterrupt
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end of training once a signal has arrived."""
        if any_rank(self.requested):
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


class ReferenceWatch:
    """Says so while it happens when a run earns less than its reference.

    Args:
        speaks (`bool`):
            Whether this process does; one is enough.
    """

    def __init__(self, speaks: bool):
        self._speaks = speaks
        self._recent: deque[float] = deque(maxlen=WATCHED_UPDATES)
        self._quiet_until = 0

    def add(self, update: int, over_reference: float, kl: float) -> None:
        """Take in an update.

        Args:
            update (`int`):
                Its number.
            over_reference (`float`):
                Mean reward minus that of the reference's samples of the same prompts.
            kl (`float`):
                ln π/π_ref in nats per token.
        """
        self._recent.append(over_reference)
        if len(self._recent) < WATCHED_UPDATES or update < self._quiet_until:
            return
        mean, error = fmean(self._recent), stdev(self._recent) / len(self._recent) ** 0.5
        if mean + 2 * error >= 0:
            return
        self._quiet_until = update + 2 * WATCHED_UPDATES
        if self._speaks:
            logger.warning(
                "The policy earns less than the reference: %+.3f a completion over the last %d updates, at a KL of %.3f nats per "
                "token. If it stays so, resume from an earlier checkpoint, or start anew with a "
                "lower --learning_rate (a third), a higher --beta2 (ten times), or more prompts an update.",
                *(mean, WATCHED_UPDATES, kl),
            )


class NumericGuard(TrainerCallback):
    """Leaves out updates whose gradient is not finite, counts them, and stops when they keep coming.

    Adam would carry a single NaN in its moments for ever. Under fp16 the loss scaler leaves such updates out by itself.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Has the loss scaler.
        metrics (`dict[str, list[float]]`):
            Gets `skipped_updates`.
    """

    def __init__(self, accelerator: Any, metrics: dict[str, list[float]]):
        self._accelerator, self._metrics = accelerator, metrics
        self._streak = 0
        self._skipped = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradient; where it is sharded, a process sees only its part."""
        self._skipped = False
        parameters = [parameter for parameter in kwargs["model"].parameters() if parameter.grad is not None]
        if self._accelerator.scaler is None and any_rank(not is_finite(parameters)):
            self._skipped = True
            for parameter in parameters:
                parameter.grad = None  # the optimizer passes over it

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count, and stop when it is hopeless."""
        scaler = self._accelerator.scaler
        skipped = self._skipped or (scaler is not None and self._accelerator.optimizer_step_was_skipped)
        self._metrics["skipped_updates"].append(float(skipped))
        self._streak = self._streak + 1 if skipped else 0
        if self._streak == (BROKEN_STREAK if scaler is None else SCALER_STREAK):
            raise FloatingPointError(
                f"The gradient was not finite in {self._streak} updates in a row (now update {state.global_step})"
                f"{f', with the loss scale down to {scaler.get_scale():g}' if scaler is not None else ''}. "
                "The weights are still those from before. Usual reasons: a learning rate that is too high (lower "
                "--learning_rate), activations beyond float16 (use bf16 or float32), or a reward function that returns inf."
            )


def is_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether all gradients (of sharded parameters, this process's part) are finite; one number crosses from the device."""
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    parts: list[Any] = [getattr(gradient, "to_local", lambda g=gradient: g)() for gradient in gradients]
    norms = [part.float().norm() for part in parts]
    return not norms or bool(torch.stack(norms).isfinite().all())


class DeadlineGuard(TrainerCallback):
    """Saves and ends training while there is still time for that.

    Args:
        save_by (`str`):
            A time that [`parse_deadline`] reads.
    """

    def __init__(self, save_by: str):
        self.deadline = parse_deadline(save_by, datetime.now(), may_be_past=True)  # loading may have taken longer
        self.reached = False
        self._longest = 0.0
        self._last = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._last, self._longest = time.monotonic(), 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End training when another update and a checkpoint might not fit any more.

        The time since the last update ended counts sampling, evaluation and saving too.
        """
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now
        left = (self.deadline - datetime.now()).total_seconds()
        if any_rank(left < 2 * self._longest):
            self.reached = True
            stop_and_save(control)
            if state.is_world_process_zero:
                logger.warning(
                    "%.0f s left before save_by: saving after update %d and stopping.", left, state.global_step
                )


class TimeIsUp(KeyboardInterrupt):
    """`save_by` was reached where there are no updates to stop after; what is committed is kept."""


@contextmanager
def until(moment: str | None) -> Iterator[None]:
    """Raise [`TimeIsUp`] in the block when the moment comes; only the main thread can be told."""
    if moment is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    left = (parse_deadline(moment, datetime.now(), may_be_past=True) - datetime.now()).total_seconds()
    earlier = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, left))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def parse_deadline(text: str, now: datetime, may_be_past: bool = False) -> datetime:
    """The moment that `save_by` names: a duration (`3h50m`, `45m`, `90s`) from `now`, a time of day, or an ISO date and time.

    Raises:
        ValueError: If it is none of these, or not in the future and `may_be_past` is not set.
    """
    duration = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    if text.strip() and duration:
        hours, minutes, seconds = (int(part or 0) for part in duration.groups())
        deadline = now + timedelta(hours=hours, minutes=minutes, seconds=seconds)
    else:
        try:
            if re.fullmatch(r"\d{1,2}:\d{2}", text.strip()):
                hour, minute = map(int, text.split(":"))
                deadline = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
                deadline += timedelta(days=1) if deadline <= now else timedelta()
            else:
                deadline = datetime.fromisoformat(text.strip()).replace(tzinfo=None)
        except ValueError as error:
            raise ValueError(
                f"`save_by={text!r}` is neither a duration (3h50m), a time of day (18:30) nor a date and time "
                "(2026-11-22T18:30)."
            ) from error
    if deadline <= now and not may_be_past:
        raise ValueError(f"`save_by={text!r}` is not in the future (it is {now:%Y-%m-%d %H:%M}).")
    return deadline


class FinishCheckpoints(TrainerCallback):
    """Adds what transformers does not save to each checkpoint, and only then lets it count and older ones go.

    Args:
        finish (`Callable[[Path], None]`):
            Called on every rank with a checkpoint's folder once transformers has written its part.
    """

    def __init__(self, finish: Callable[[Path], None]):
        self._finish = finish
        self._saved = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new run may save the step at which an earlier one ended."""
        self._saved = -1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finish the checkpoint."""
        self._finish(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        self._saved = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do not write the same step twice: a stop and the end of an epoch may both ask for it."""
        if state.global_step == self._saved:
            control.should_save = False


@contextmanager
def hang_watch(timeout_s: float) -> Iterator[Callable[[], None]]:
    """End the process with a dump of all stacks after `timeout_s` without a call of what is yielded; 0 is never.

    The thread of `faulthandler` does it, because that also works while C code holds the interpreter's lock.
    """

    def still_alive() -> None:
        if timeout_s > 0:
            # Not sys.stderr: a notebook's has no file descriptor.
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or 2)

    still_alive()
    try:
        yield still_alive
    finally:
        if timeout_s > 0:
            faulthandler.cancel_dump_traceback_later()
