"""Progress of a short run: one line per update, and held-out accuracy on the way."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback


class UpdateLines(TrainerCallback):
    """Prints what matters of each update, in place of transformers' dictionary of everything."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @classmethod
    def replace_printer(cls, trainer: Any) -> None:
        """Install the lines in `trainer`."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(cls())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print one update."""
        if logs is None or "reward" not in logs:
            return
        left = (state.max_steps - state.global_step) * (time.monotonic() - self._began) / max(1, state.global_step)
        print(
            f"update {state.global_step:3d}/{state.max_steps}  reward {float(logs['reward']):.3f}  "
            f"{_roles(logs)}V* {float(logs['v_star']):.3f}  KL/token {float(logs['kl']):.3f}  "
            f"tokens {float(logs['completions/mean_length']):.1f}  {float(logs['step_time']):.1f} s  "
            f"({left:.0f} s left)",
            flush=True,
        )


def _roles(logs: dict[str, Any]) -> str:
    """Rewards of attempts, verdicts and revisions, where there are such."""
    roles = [name for name in ("attempt", "verify", "revise") if f"{name}/reward" in logs]
    return "".join(f"{name} {float(logs[f'{name}/reward']):.3f}  " for name in roles)


class HeldOutCurve(TrainerCallback):
    """Evaluates every few updates, for the plot only: nothing is chosen by it.

    Args:
        every (`int`):
            Updates between evaluations.
        evaluate (`Callable[[int], dict[str, Any]]`):
            Returns a point of the curve for an update: the present policy's held-out accuracy.
    """

    def __init__(self, every: int, evaluate: Callable[[int], dict[str, Any]]):
        self._every = every
        self._evaluate = evaluate
        self.points: list[dict[str, Any]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate when it is time; the last update is evaluated by the caller."""
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self.points.append(self._evaluate(state.global_step))
