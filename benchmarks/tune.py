"""Choose the learning rates of `benchmarks/trainer.py --only accuracy`: equally many trials for each contender, on seeds of their own.

    python benchmarks/tune.py --model M

A trial runs for as many updates as its contender makes in the benchmark's time on two cores, and counts its mean held-out accuracy over them.
Updates are what a trial is measured in, not seconds, so trials may run beside one another and on another machine than the benchmark.
Trials that are in the file already are not run again. `--compare` runs ours with other values, clipping and rates too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accuracy import mean_accuracy

BENCHMARK, RATES = Path(__file__).parent / "trainer.py", Path(__file__).parent / "rates.json"
SEEDS = (100, 101)
GRID = {
    "ours": (3e-4, 6e-4, 1e-3),
    "ours_full": (1e-5, 3e-5, 1e-4),
    "grpo": (1e-4, 3e-4, 1e-3),
    "a2po": (3e-6, 1e-5, 3e-5),
    "ours_rounds": (1e-4, 2e-4, 3e-4),
}
UPDATES = {"ours": 30, "ours_full": 15, "grpo": 8, "a2po": 12, "ours_rounds": 20}
"""About what each makes in the benchmark's time on two cores, stage 1 included."""


def tuning() -> list[dict[str, Any]]:
    """The trials that choose the rates."""
    return [
        {"trainer": name, "learning_rate": rate, "seed": seed, "updates": UPDATES[name]}
        for seed in SEEDS
        for name, rates in GRID.items()
        for rate in rates
    ]


def comparison() -> list[dict[str, Any]]:
    """Ours with other V, clipping, beta2 and Adam, and GRPO for as many updates as ours."""
    ours: dict[str, Any] = {"trainer": "ours", "updates": 20, "seed": 101}

    def trial(rate: float, value: str = "tracked", **more: float) -> dict[str, Any]:
        samples = 2 if value == "tracked" else 8
        rest = {"more": json.dumps(more)} if more else {}
        return {**ours, "learning_rate": rate, "value": value, "value_samples": samples, **rest}

    values = [trial(rate, value) for value in ("optimal", "mean") for rate in (1e-3, 3e-4, 1e-4)]
    clipping = [trial(3e-4, max_grad_norm=norm) for norm in (10.0, 500.0)]
    wider = [trial(1e-3, beta2=0.01), trial(1e-3, adam_beta2=0.95), trial(3e-4, beta2=0.01)]
    grpo = [{"trainer": "grpo", "learning_rate": 3e-4, "seed": 101, "updates": 20}]
    return [*values, *clipping, *wider, *grpo, trial(1e-4)]


def name_of(trial: dict[str, Any]) -> str:
    """The trial's key in the file."""
    return " ".join(f"{key}={value}" for key, value in trial.items())


def run(trial: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The curve of one trial, or what went wrong."""
    words = [word for key, value in trial.items() for word in (f"--{key}", str(value))]
    words += ["--part", "accuracy", "--model", options.model, "--engine", options.engine, "--seconds", "1e9"]
    words += ["--evaluate_every_s", "0", "--evaluate_every", str(max(1, trial["updates"] // 8))]
    left = options.limit_s - (time.monotonic() - options.began)
    if left < options.least_s:
        return {"failed": "no time was left"}
    try:
        finished = subprocess.run(
            [sys.executable, str(BENCHMARK), *words], capture_output=True, text=True, timeout=left, check=False
        )
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode() if isinstance(error.stderr, bytes) else error.stderr or ""
        return {"failed": "time was up", "log": said[-2000:]}
    if finished.returncode != 0:
        return {"failed": finished.returncode, "log": finished.stderr[-3000:]}
    return json.loads(finished.stdout.splitlines()[-1])


def score(report: dict[str, Any]) -> float:
    """Mean accuracy over the updates of a trial."""
    curve: Any = [{**point, "seconds": point["update"]} for point in report["curve"]]
    return mean_accuracy(curve, curve[-1]["update"])


def choose(trials: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The rate of each contender with the highest mean score over the seeds, where all of its trials are there."""
    chosen = {}
    for name, rates in GRID.items():
        keys = {
            rate: [name_of(trial) for trial in tuning() if trial["trainer"] == name and trial["learning_rate"] == rate]
            for rate in rates
        }
        if all(key in trials for found in keys.values() for key in found):
            chosen[name] = max(rates, key=lambda rate: statistics.fmean(trials[key]["score"] for key in keys[rate]))
    return chosen


def main() -> None:
    """Run the trials that are missing, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", default=str(RATES))
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--engine", default="vllm", help="ours: vllm or transformers")
    parser.add_argument(
        "--compare", action="store_true", help="run the comparison of values and clipping after the tuning"
    )
    parser.add_argument(
        "--limit_s", type=float, default=1e9, help="start nothing, and stop what runs, after these seconds"
    )
    parser.add_argument("--least_s", type=float, default=60.0, help="start no trial with less time left")
    options = parser.parse_args()
    options.began = time.monotonic()
    path = Path(options.file)
    content = json.loads(path.read_text()) if path.is_file() else {"trials": {}, "chosen": {}}

    def one(trial: dict[str, Any]) -> None:
        began = time.monotonic()
        report = run(trial, options)
        took = round(time.monotonic() - began, 1)
        print(
            name_of(trial),
            took,
            report.get("failed", ""),
            [p["accuracy"] for p in report.get("curve", [])],
            report.get("log", ""),
            flush=True,
        )
        if "failed" in report:
            return
        slim = [{key: point[key] for key in ("update", "accuracy", "answered", "reward")} for point in report["curve"]]
        content["trials"][name_of(trial)] = {"score": round(score(report), 4), "curve": slim}
        content["chosen"] |= choose(content["trials"])
        path.write_text(json.dumps(content, indent=1) + "\n")

    todo = [
        trial
        for trial in [*tuning(), *(comparison() if options.compare else [])]
        if name_of(trial) not in content["trials"]
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1" if options.jobs > 1 else "2")
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, todo))
    print(json.dumps(content["chosen"]))


if __name__ == "__main__":
    main()
