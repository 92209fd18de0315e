"""What the policy wrote: a parquet file per update, and a look at it in the terminal.

python -m astarpo.trainer.completions runs/math/adapter --step 12 --num 3 --which unsolved
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FOLDER = "completions"
REWARDS = "rewards"
OWN_COLUMNS = ("step", "prompt", "completion", "advantage", "v_star")


class KeepCompletions(TrainerCallback):
    """Writes each update's completions, and with `log_completions` shows some in tensorboard (TRL has wandb and trackio).

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what the update was made of."""
        if not args.should_save or not self._trainer._logs["prompt"]:
            return
        path = write_completions(str(args.output_dir), state.global_step, self._trainer._logs)
        if not self._trainer.args.log_completions:
            return
        for callback in self._trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                num = self._trainer.args.num_completions_to_print or 4
                writer.add_text("completions", as_markdown(pq.read_table(path).slice(0, num)), state.global_step)


def write_completions(output_dir: str, step: int, logs: Mapping[str, Any]) -> Path:
    """Write the last update's completions where TRL's `log_completions` would, with the same columns.

    Args:
        output_dir (`str`):
            The run's folder.
        step (`int`):
            Updates done.
        logs (`Mapping[str, Any]`):
            `GRPOTrainer._logs`.

    Returns:
        `Path`: `output_dir/completions/completions_<step>.parquet`.
    """
    path = Path(output_dir) / FOLDER / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "step": [step] * len(logs["prompt"]),
        "prompt": list(logs["prompt"]),
        "completion": list(logs["completion"]),
        **{name: list(values) for name, values in logs["rewards"].items()},
        # What a reward function logs for some of the rows only belongs to none that could be told.
        **{name: list(values) for name, values in logs["extra"].items() if len(values) == len(logs["prompt"])},
        "advantage": list(logs["advantages"]),
    }
    unfinished = path.with_suffix(".tmp")
    table = pa.table(columns).replace_schema_metadata({REWARDS: json.dumps(list(logs["rewards"]))})
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.replace(path)
    return path


def read_completions(output_dir: str, step: int | None = None) -> pa.Table:
    """The completions of an update; of the newest when no step is given.

    Raises:
        ValueError: If there are none; the message names the steps that there are.
    """
    files = {_step(path): path for path in sorted((Path(output_dir) / FOLDER).glob("completions_*.parquet"))}
    if not files:
        raise ValueError(f"`{output_dir}` holds no completions. Name the --output_dir of a training run.")
    wanted = max(files) if step is None else step
    if wanted not in files:
        raise ValueError(
            f"No completions of update {wanted} in `{output_dir}`; there are {min(files)} to {max(files)}."
        )
    return pq.read_table(files[wanted])


def _step(path: Path) -> int:
    found = re.search(r"(\d+)$", path.stem)
    assert found is not None
    return int(found.group(1))


def select(table: pa.Table, which: str) -> pa.Table:
    """All completions, or those that any reward function rewarded (`solved`), or the others (`unsolved`)."""
    if which == "all":
        return table
    noted = (table.schema.metadata or {}).get(REWARDS.encode())
    if noted is not None:
        rewards = json.loads(noted)
    else:  # written by TRL
        floats = [name for name in table.column_names if pa.types.is_floating(table[name].type)]
        rewards = [name for name in floats if name not in OWN_COLUMNS]
    scores = [table[name].to_pylist() for name in rewards]
    is_solved = [any(score is not None and score > 0 for score in row) for row in zip(*scores, strict=True)]
    return table.filter(pa.array([solved == (which == "solved") for solved in is_solved]))


def as_text(messages: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt or completion as a person reads it."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"[{message['role']}] {message['content']}" for message in messages)


def as_markdown(table: pa.Table) -> str:
    """Completions as tensorboard renders them."""
    parts = []
    for row in table.to_pylist():
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float))
        parts.append(f"**{scores}**\n\n```\n{as_text(row['prompt'])}\n---\n{as_text(row['completion'])}\n```")
    return "\n\n".join(parts)


def show(table: pa.Table, num: int) -> None:
    """Print the first `num` completions."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    for row in table.slice(0, num).to_pylist():
        scores = "  ".join(
            f"{name} {value:.3f}" for name, value in row.items() if isinstance(value, float) and value == value
        )
        console.print(Panel(Text(as_text(row["prompt"])), title=f"update {row['step']}", title_align="left"))
        console.print(Panel(Text(as_text(row["completion"])), title=Text(scores), title_align="left", style="bold"))
    console.print(f"{min(num, len(table))} of {len(table)} completions")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m astarpo.trainer.completions", description="Show what the policy wrote in an update."
    )
    parser.add_argument("run", help="the --output_dir of a training run")
    parser.add_argument("--step", type=int, help="update; default: the newest")
    parser.add_argument("--num", type=int, default=5, help="how many to show (default: 5)")
    parser.add_argument("--which", choices=["all", "solved", "unsolved"], default="all", help="default: all")
    options = parser.parse_args()
    show(select(read_completions(options.run, options.step), options.which), options.num)
    return 0


if __name__ == "__main__":
    from ..cli import run_command

    run_command(main)
