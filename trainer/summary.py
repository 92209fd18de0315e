"""The end of a training run in a few lines: a table, the learning curve, and what one types next."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any


def updates(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log entries of training updates, oldest first."""
    return [entry for entry in log_history if "reward" in entry]


def print_training_summary(
    log_history: list[dict[str, Any]],
    output_dir: str,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    temperature: float = 1.0,
) -> None:
    """Show how reward, KL and speed went, first updates against last, and the evaluations; draw the learning curve.

    Args:
        log_history (`list[dict[str, Any]]`):
            What was logged.
        output_dir (`str`):
            Folder of the run, where the curve goes.
        before, after (`Mapping[str, float]`, *optional*):
            The evaluations of the reference and of the trained policy.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature at which the evaluations sampled.
    """
    from rich.console import Console
    from rich.table import Table

    entries = updates(log_history)
    console = Console()
    if entries:
        ends = max(1, len(entries) // 5)
        table = Table("metric", f"first {ends}", f"last {ends}", title=f"{len(entries)} logged updates")
        for name in ("reward", "residual/mean_square", "kl", "entropy", "completions/mean_length", "step_time"):
            first, last = (
                [entry[name] for entry in part if entry.get(name) is not None]
                for part in (entries[:ends], entries[-ends:])
            )
            if first and last:
                table.add_row(name, f"{fmean(map(float, first)):.4g}", f"{fmean(map(float, last)):.4g}")
        console.print(table)
    if after:
        table = Table(f"evaluation at temperature {temperature:g}", "reference", "trained")
        for name in sorted(after):
            if name in SHOWN:
                table.add_row(name.removeprefix("eval_"), _shown((before or {}).get(name)), _shown(after[name]))
        console.print(table)
    if entries:
        plot_reward(entries, evaluations(log_history, before, after), Path(output_dir) / "reward.png")
        console.print(f"model: {output_dir}   learning curve: {output_dir}/reward.png", soft_wrap=True)


SHOWN = (
    "eval_reward",
    "eval_acc_t1",
    "eval_verify/reward",
    "eval_completions/mean_length",
    "eval_completions/clipped_ratio",
)
"""What the table shows of an evaluation; `run.json` has all of it."""


def _shown(value: Any) -> str:
    return "" if value is None else f"{float(value):.3f}"


def evaluations(
    log_history: list[dict[str, Any]], before: Mapping[str, float] | None, after: Mapping[str, float] | None
) -> list[tuple[int, float]]:
    """Update and mean reward of each evaluation."""
    points = [(0, before)] if before else []
    points += [(entry["step"], entry) for entry in log_history if "eval_reward" in entry]
    if after:
        points.append((max(entry["step"] for entry in updates(log_history)), after))
    found = {step: float(entry["eval_reward"]) for step, entry in points if entry.get("eval_reward") is not None}
    return sorted(found.items())


def next_lines(model: str, output_dir: str, evaluation_set: str, length: int | None, is_adapter: bool) -> list[str]:
    """Three lines that one types after training: evaluate at the trained length, export, use."""
    adapter = f" --adapter {output_dir}" if is_adapter else ""
    trained = model if is_adapter else output_dir
    limit = f" --max_completion_length {length}" if length else ""
    lines = [
        f"astarpo eval --model_name_or_path {trained}{adapter} --dataset_name {evaluation_set}{limit} --output {output_dir}/eval.json"
    ]
    if not is_adapter:
        return [*lines, f"vllm serve {output_dir}", f"transformers chat {output_dir}"]
    return [
        *lines,
        f"astarpo export --adapter {output_dir} --output_dir {output_dir}-merged",
        f"vllm serve {model} --enable-lora --lora-modules math={output_dir}",
    ]


SERVED = "(`vllm serve` needs a GPU)"
"""vLLM's CPU build has no `vllm serve`: it looks for a package named `vllm`."""


def plot_reward(entries: list[dict[str, Any]], evaluated: list[tuple[int, float]], path: Path) -> None:
    """Draw the reward of each logged update, V* as what the reference would need to reach, and the evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in entries]
    axes.plot(
        steps, [float(entry["reward"]) for entry in entries], marker="o", markersize=3, label="mean reward in training"
    )
    if all(entry.get("v_star") is not None for entry in entries):
        axes.plot(steps, [float(entry["v_star"]) for entry in entries], linestyle="--", label="mean V*")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), marker="s", label="mean reward on the evaluation set")
    axes.set(xlabel="update", ylabel="reward", title="A*-PO: reward of the policy's completions")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
