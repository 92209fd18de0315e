"""What the policy wrote: a parquet file per update, and a look at it in the terminal.

python -m astarpo.trainer.completions runs/math/adapter --step 12 --num 3 --which unsolved
"""

import argparse
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = "completions"
REWARDS = "rewards"
OWN_COLUMNS = ("step", "prompt", "completion", "advantage", "v_star")


def record_completions(
    args: Any,
    step: int,
    columns: Mapping[str, Sequence[Any]],
    reward_names: Sequence[str],
    callbacks: Sequence[Any],
) -> None:
    """Write an update's completions, and show some where `log_completions` asks for it.

    Args:
        args ([`AStarPOConfig`]):
            `output_dir`, `log_completions`, `num_completions_to_print`, `log_unique_prompts`, `report_to`.
        step (`int`):
            The update, from 1.
        columns (`Mapping[str, Sequence[Any]]`):
            `prompt`, `completion`, the rewards, `v_star`, `advantage`, and what reward functions logged for each completion.
        reward_names (`Sequence[str]`):
            Which columns are rewards.
        callbacks (`Sequence[TrainerCallback]`):
            The trainer's; a tensorboard writer is found among them.
    """
    path = write_completions(str(args.output_dir), step, columns, reward_names)
    if not args.log_completions:
        return
    table = pq.read_table(path)
    if args.log_unique_prompts:
        prompts = [json.dumps(prompt) for prompt in table["prompt"].to_pylist()]
        table = table.take(sorted({prompt: row for row, prompt in reversed(list(enumerate(prompts)))}.values()))
    num = args.num_completions_to_print or len(table)
    show(table, num)
    for callback in callbacks:
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text("completions", as_markdown(table.slice(0, args.num_completions_to_print or 4)), step)
    for name in ("wandb", "trackio"):
        if name in (args.report_to or []):
            tracker = importlib.import_module(name)
            tracker.log({"completions": tracker.Table(dataframe=table.to_pandas())})


def write_completions(
    output_dir: str, step: int, columns: Mapping[str, Sequence[Any]], reward_names: Sequence[str]
) -> Path:
    """Write completions where TRL's `log_completions` would, with the same columns.

    Returns:
        `Path`: `output_dir/completions/completions_<step>.parquet`.
    """
    path = Path(output_dir) / FOLDER / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"step": [step] * len(columns["prompt"]), **{name: list(values) for name, values in columns.items()}}
    unfinished = path.with_suffix(".tmp")
    table = pa.table(content).replace_schema_metadata({REWARDS: json.dumps(list(reward_names))})
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
        prog="astarpo completions", description="Show what the policy wrote in an update."
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
