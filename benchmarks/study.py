"""The study: how soon and how well A*-PO, A*-PO in rounds, TRL's GRPO and TRL's A*-PO learn two tasks, five seeds each, in equal time.

    python benchmarks/study.py --model M    # runs what is missing (nearly three hours on two cores), then draws
    python benchmarks/study.py --draw       # draws again from the raw results

The raw curves are kept in `docs/results/TASK.json`, a part a run, so the study can be made in several sittings. The picture is
`docs/images/study.png`; the table is printed as Markdown. Bands are 90 % intervals of the median, by bootstrap over the seeds.
"""

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from accuracy import mean_accuracy, reached
from parts import RATES, Parts

REPOSITORY = Path(__file__).parents[1]
RESULTS, PICTURE = REPOSITORY / "docs" / "results", REPOSITORY / "docs" / "images" / "study.png"
SECONDS = {"division": 180.0, "two_steps": 120.0}
"""How long each contender runs on a task, from loading its model; evaluations are not counted."""
EVERY_S = {"division": 25.0, "two_steps": 40.0}
SEEDS = (0, 1, 2, 3, 4)
LEAST_SEEDS = 3
"""Seeds of each contender from which on a task is in the picture; one with fewer is in the tables only."""
LEVELS = {"division": 0.35, "two_steps": 0.35}
"""Held-out accuracy whose time is compared, fixed before the first run."""
TITLES = {"division": "Division", "two_steps": "A product and a sum"}
NAMES = {
    "ours": "A*-PO (astarpo)",
    "ours_rounds": "A*-PO in rounds (astarpo)",
    "grpo": "GRPO (TRL)",
    "a2po": "A2PO (TRL)",
}
COLOURS = {"ours": "#1f5fa8", "ours_rounds": "#4ca1d8", "grpo": "#c4572b", "a2po": "#8a8a8a"}
DASHED = ("a2po",)
"""Contenders whose curve would otherwise hide another's."""
DRAWS = 2000


def median_band(values: Sequence[float]) -> tuple[float, float, float]:
    """The median of values over seeds, and its 90 % interval by bootstrap."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return statistics.median(values), medians[DRAWS // 20], medians[-DRAWS // 20 - 1]


def point_at(curve: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The last evaluation up to then; the first one where there is none."""
    return [point for point in curve if point["seconds"] <= seconds or point is curve[0]][-1]


def run(options: argparse.Namespace, task: str) -> None:
    """Make the runs on a task that are missing from its raw results. Seeds are the outer loop."""
    rates = json.loads(RATES.read_text())["chosen"]
    parts = Parts(argparse.Namespace(**{**vars(options), "task": task, "cache": RESULTS / f"{task}.json"}))
    how = {"seconds": SECONDS[task], "evaluate_every_s": EVERY_S[task]}
    for seed in options.seeds:
        for name in options.trainers:
            parts.run("accuracy", name, seed=seed, learning_rate=rates[name], **how)


def kept(task: str) -> dict[str, list[dict[str, Any]]]:
    """The runs in the raw results of a task, by contender; only contenders that have any.

    Raises:
        ValueError: If a contender's runs differ in more than the seed.
    """
    path = RESULTS / f"{task}.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    found = {
        name: [report for key, report in content.items() if key.startswith(f"accuracy {name} ")] for name in NAMES
    }
    for name in NAMES:
        settings = {re.sub(r" seed=\d+", "", key) for key in content if key.startswith(f"accuracy {name} ")}
        if len(settings) > 1:
            raise ValueError(
                "\n  ".join(
                    [f"`{path}` mixes runs with different settings; move one kind to another file:", *sorted(settings)]
                )
            )
    return {name: runs for name, runs in found.items() if runs}


def table(task: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table of a task: medians over the seeds, with their bands."""
    level, seconds = LEVELS[task], SECONDS[task]

    def last(run: dict[str, Any]) -> dict[str, Any]:
        return point_at(run["curve"], seconds)

    def cell(values: Sequence[float], shown: str) -> str:
        return "{} ({} to {})".format(*(format(value, shown) for value in median_band(values)))

    def to_level(one: list[dict[str, Any]], what: Literal["seconds", "completions"]) -> str:
        """A run that does not get there counts with its whole time, and with all that it sampled."""
        points = [reached(run["curve"], level, seconds) for run in one]
        if 2 * sum(point is not None for point in points) <= len(one):
            return "not reached"
        whole = [{"seconds": seconds, "completions": last(run)["completions"]} for run in one]
        return cell([(point or end)[what] for point, end in zip(points, whole, strict=True)], ".0f")

    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        f"seconds to {level}": lambda one: to_level(one, "seconds"),
        f"completions to {level}": lambda one: to_level(one, "completions"),
        "reached": lambda one: (
            f"{sum(reached(run['curve'], level, seconds) is not None for run in one)} of {len(one)}"
        ),
        "mean accuracy over the time": lambda one: cell([mean_accuracy(run["curve"], seconds) for run in one], ".2f"),
        "at the end": lambda one: cell([last(run)["accuracy"] for run in one], ".2f"),
        "updates": lambda one: cell([last(run)["update"] for run in one], ".0f"),
        "completions": lambda one: cell([last(run)["completions"] for run in one], ".0f"),
    }
    rows = [
        f"| {NAMES[name]} | {' | '.join(column(one) for column in columns.values())} |" for name, one in runs.items()
    ]
    return "\n".join([f"| {TITLES[task]} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|", *rows])


def draw(found: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Learning curves over seconds, a panel a task: medians over the seeds, and their bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 3.4), squeeze=False, sharey=True)
    for axis, (task, runs) in zip(axes[0], found.items(), strict=True):
        times = list(range(0, int(SECONDS[task]) + 1, 5))
        for name, one in runs.items():
            bands = [median_band([point_at(run["curve"], time)["accuracy"] for run in one]) for time in times]
            middle, low, high = zip(*bands, strict=True)
            style = "--" if name in DASHED else "-"
            axis.step(times, middle, style, where="post", color=COLOURS[name], label=NAMES[name], linewidth=2)
            axis.fill_between(times, low, high, step="post", color=COLOURS[name], alpha=0.15, linewidth=0)
        counts = sorted({len(one) for one in runs.values()})
        seeds = " to ".join(map(str, counts[:: max(1, len(counts) - 1)])) + (" seed" if counts[-1] == 1 else " seeds")
        axis.set(title=f"{TITLES[task]} ({seeds})", xlabel="seconds from loading the model", xlim=(0, SECONDS[task]))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out accuracy")
    axes[0][0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is missing, draw, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct; default: fetched into runs/models")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--tasks", nargs="+", default=list(LEVELS), choices=list(LEVELS))
    parser.add_argument("--trainers", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--attention", default="eager")
    options = parser.parse_args()
    if not options.draw:
        if options.model is None:
            from astarpo.trainer.quickstart import fetch_model

            options.model = str(fetch_model(Path("runs/models")))
        RESULTS.mkdir(exist_ok=True)
        for task in options.tasks:
            run(options, task)
    found = {task: kept(task) for task in LEVELS}
    found = {task: runs for task, runs in found.items() if runs}
    drawn = {task: runs for task, runs in found.items() if min(map(len, runs.values())) >= LEAST_SEEDS}
    draw(drawn, PICTURE)
    for task, runs in found.items():
        print(table(task, runs), end="\n\n")


if __name__ == "__main__":
    main()
