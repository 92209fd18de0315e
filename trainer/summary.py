"""The end of a training run in a few lines: a table, and the curve of the reward."""

from pathlib import Path
from statistics import fmean
from typing import Any


def updates(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log entries of training updates, oldest first."""
    return [entry for entry in log_history if "reward" in entry]


def print_training_summary(log_history: list[dict[str, Any]], output_dir: str) -> None:
    """Show how reward, KL and speed went, first updates against last."""
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
        plot_reward(entries, Path(output_dir) / "reward.png")
        console.print(f"adapter: {output_dir}   reward curve: {output_dir}/reward.png")


def plot_reward(entries: list[dict[str, Any]], path: Path) -> None:
    """Draw the reward of each logged update, and V* as what the reference would need to reach."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in entries]
    axes.plot(steps, [float(entry["reward"]) for entry in entries], marker="o", markersize=3, label="mean reward")
    axes.plot(steps, [float(entry["v_star"]) for entry in entries], linestyle="--", label="mean V*")
    axes.set(xlabel="update", ylabel="reward", ylim=(-0.02, 1.02), title="A*-PO: reward of the policy's completions")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
