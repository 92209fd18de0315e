"""How soon and how well a contender learns in a given time: one run, and what several runs say."""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from contenders import PROMPTS_PER_UPDATE, TRAINERS, EachUpdate, Heldout

from astarpo.rollout.pool import PoolManifest


class Point(TypedDict):
    """One evaluation: after how many updates and sampled completions (stage 1 included), after how many seconds from loading the model
    (evaluations not counted), and what it said."""

    update: int
    seconds: float
    accuracy: float
    answered: float
    reward: float | None
    completions: int


def learn(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a contender for `options.seconds`, or `options.updates` updates, and evaluate it on the way.

    Args:
        name (`str`):
            The contender.
        options (`argparse.Namespace`):
            `seconds` and `updates` end the run, whichever comes first; `evaluate_every_s` and `evaluate_every` say when it is evaluated.

    Returns:
        `dict[str, Any]`: `curve`, a [`Point`] for each evaluation, the first one before training.
    """
    heldout, curve, rewards = Heldout(options.model, options.task), [], []
    began, aside = time.perf_counter(), 0.0

    def evaluate(update: int) -> None:
        nonlocal aside
        paused = time.perf_counter()
        found = {key: round(value, 4) for key, value in heldout.evaluate(trainer).items()}
        reward = round(statistics.fmean(rewards), 3) if rewards else None
        seconds, completions = round(paused - began - aside, 1), sampled(trainer, update)
        curve.append({"update": update, "seconds": seconds, **found, "reward": reward, "completions": completions})
        rewards.clear()
        print(name, options.learning_rate, options.seed, curve[-1], file=sys.stderr, flush=True)
        aside += time.perf_counter() - paused

    def after_update(step: int, seconds: float) -> bool:
        rewards.extend(entry["reward"] for entry in trainer.state.log_history[-1:] if "reward" in entry)
        spent = time.perf_counter() - began - aside
        is_over = spent >= options.seconds or step >= options.updates
        is_due = spent - curve[-1]["seconds"] >= options.evaluate_every_s and step % options.evaluate_every == 0
        if is_due or is_over:
            evaluate(step)
        return is_over

    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](options, folder)
        trainer.add_callback(EachUpdate(after_update))
        evaluate(0)
        trainer.train()
    return {"curve": curve, "seconds": options.seconds}


def sampled(trainer: Any, update: int) -> int:
    """Completions that a trainer has sampled, stage 1 included: those of its pools, and of its updates where they sample."""
    manifests = Path(trainer.args.output_dir).rglob("manifest.json")
    pools = sum(PoolManifest.load(path.parent).num_rows for path in manifests)
    if type(trainer).__name__ == "A2POTrainer" and update > 0:  # it keeps no pool
        pools = len(trainer.train_dataset) * trainer.args.num_value_samples
    return pools if getattr(trainer, "in_rounds", False) else pools + update * PROMPTS_PER_UPDATE


def reached(curve: Sequence[Point], level: float, seconds: float) -> Point | None:
    """The first of two consecutive evaluations at `level` or above; None where there are none within `seconds`."""
    within = [point for point in curve if point["seconds"] <= seconds]
    for first, second in itertools.pairwise(within):
        if first["accuracy"] >= level and second["accuracy"] >= level:
            return first
    return None


def mean_accuracy(curve: Sequence[Point], seconds: float) -> float:
    """Mean over the time from 0 to `seconds`; between two evaluations the accuracy is that of the earlier one."""
    ends = [min(point["seconds"], seconds) for point in curve[1:]] + [seconds]
    area, start = 0.0, 0.0
    for point, end in zip(curve, ends, strict=True):
        area += point["accuracy"] * (end - start)
        start = end
    return area / seconds


def summary(runs: Sequence[dict[str, Any]], level: float) -> dict[str, Any]:
    """What the runs of one contender say, one entry a seed."""
    limit = runs[0]["seconds"]
    points = [reached(run["curve"], level, limit) for run in runs]
    final = [[point for point in run["curve"] if point["seconds"] <= limit][-1] for run in runs]
    means = [mean_accuracy(run["curve"], limit) for run in runs]
    return {
        "seconds_to_level": [point["seconds"] if point else limit for point in points],
        "not_reached": [point is None for point in points],
        "median_seconds": statistics.median(point["seconds"] if point else limit for point in points),
        # Where a run does not get there, all that it sampled counts.
        "completions_to_level": [(point or last)["completions"] for point, last in zip(points, final, strict=True)],
        "mean_accuracy": [round(value, 3) for value in means],
        "median_mean_accuracy": round(statistics.median(means), 3),
        "final_accuracy": [point["accuracy"] for point in final],
        "final_answered": [point["answered"] for point in final],
        "best_accuracy": [max(point["accuracy"] for point in run["curve"]) for run in runs],
        "updates": [point["update"] for point in final],
        "completions": [point.get("completions") for point in final],
    }
