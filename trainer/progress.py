"""A line for each logged update, for the terminal and for notebooks alike."""

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback


class ProgressLine(TrainerCallback):
    """Prints reward, V*, KL and the time left where transformers would print every metric; those are in the trackers and in the log."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; a run that goes on from a checkpoint has updates behind it."""
        self._began, self._first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print what matters of an update, or of an evaluation."""
        if logs is None or not state.is_world_process_zero:
            return
        if "eval_reward" in logs:
            print(f"evaluation after update {state.global_step}: reward {float(logs['eval_reward']):.3f}", flush=True)
        if "reward" in logs:
            done = max(1, state.global_step - self._first)
            left = (state.max_steps - state.global_step) * (time.monotonic() - self._began) / done
            print(line(logs, state.global_step, state.max_steps, left), flush=True)


def line(logs: dict[str, Any], update: int, updates: int, seconds_left: float) -> str:
    """An update in one line.

    Args:
        logs (`dict[str, Any]`):
            Its metrics.
        update, updates (`int`):
            Its number, and how many there will be.
        seconds_left (`float`):
            What the others will take.
    """
    roles = [name for name in ("attempt", "verify", "revise") if logs.get(f"{name}/reward") is not None]
    names = [("reward", "reward"), *((name, f"{name}/reward") for name in roles), ("V*", "v_star"), ("KL/token", "kl")]
    shown = [f"{name} {float(logs[key]):.3f}" for name, key in names if logs.get(key) is not None]
    shown += [f"{float(logs['completions/mean_length']):.0f} tokens"] if "completions/mean_length" in logs else []
    shown += [f"{float(logs['step_time']):.1f} s"] if "step_time" in logs else []
    return f"update {update:3d}/{updates}  {'  '.join(shown)}  ({duration(seconds_left)} left)"


def duration(seconds: float) -> str:
    """Seconds as people say them: `40 s`, `4m10s`, `1h03m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def show_progress(trainer: Any) -> None:
    """Print a line for each logged update instead of every metric."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressLine())
