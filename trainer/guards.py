"""Callbacks that stop a run in time: before a deadline, and before broken numbers reach the weights."""

import re
import time
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .interrupt import agreed, stop_and_save

BROKEN_STREAK = 5
"""Updates in a row with a gradient that is not finite after which training stops."""
SCALER_STREAK = 20
"""The same under loss scaling, whose scale falls by half at each of them: from 65536 to below 1 it takes 17."""


class NumericGuard(TrainerCallback):
    """Leaves out updates whose gradient is not finite, counts them, and stops when they keep coming.

    Adam would carry a single NaN in its moments for ever. Under fp16 the loss scaler leaves such updates out by itself.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer; gets a metric `skipped_updates`.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._streak = 0
        self._skipped = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradient; where it is sharded, a process sees only its part."""
        self._skipped = False
        if self._trainer.accelerator.scaler is None and agreed(not is_finite(self._parameters())):
            self._skipped = True
            for parameter in self._parameters():
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count, and stop when it is hopeless."""
        scaled = self._trainer.accelerator.scaler is not None
        skipped = self._skipped or (scaled and self._trainer.accelerator.optimizer_step_was_skipped)
        self._trainer._metrics["train"]["skipped_updates"].append(float(skipped))
        self._streak = self._streak + 1 if skipped else 0
        if self._streak == (SCALER_STREAK if scaled else BROKEN_STREAK):
            raise FloatingPointError(
                f"The gradient was not finite in {self._streak} updates in a row (now update {state.global_step})"
                f"{f', with the loss scale down to {self._trainer.accelerator.scaler.get_scale():g}' if scaled else ''}. "
                "The weights are still those from before. Usual reasons: a learning rate that is too high (lower "
                "--learning_rate), activations beyond float16 (use bf16 or float32), or a reward function that returns inf."
            )

    def _parameters(self) -> Iterable[torch.nn.Parameter]:
        return (parameter for parameter in self._trainer.model.parameters() if parameter.grad is not None)


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
            From [`parse_deadline`].
    """

    def __init__(self, save_by: str):
        self.deadline = parse_deadline(save_by, datetime.now())
        self.reached = False
        self._began = 0.0
        self._longest = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the time since the last update began: evaluation and saving count too."""
        now = time.monotonic()
        self._longest = max(self._longest, now - self._began if self._began else 0.0)
        self._began = now

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End training when another update and a checkpoint might not fit any more."""
        self._longest = max(self._longest, time.monotonic() - self._began)
        left = (self.deadline - datetime.now()).total_seconds()
        if agreed(left < 2 * self._longest):
            self.reached = True
            stop_and_save(control)
            if state.is_world_process_zero:
                print(
                    f"{left:.0f} s left before --save_by: saving after update {state.global_step} and stopping",
                    flush=True,
                )


def parse_deadline(text: str, now: datetime) -> datetime:
    """The moment that `save_by` names: a duration (`3h50m`, `45m`, `90s`) from `now`, a time of day, or an ISO date and time.

    Raises:
        ValueError: If it is none of these, or not in the future.
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
    if deadline <= now:
        raise ValueError(f"`save_by={text!r}` is not in the future (it is {now:%Y-%m-%d %H:%M}).")
    return deadline
