"""A recipe from end to end: evaluate, sample the reference, train, evaluate again.

    python examples/run_recipe.py --config t4_small --output_dir runs/t4_small

Prints the accuracy before and after, the hours, and the most GPU memory that training held, and writes them to `summary.json`. Run it again
after an interruption: what is finished is kept, and stage 1 and training go on where they were.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def steps(config: str, folder: Path) -> dict[str, tuple[list[str], Path]]:
    """Name of each step: the words after `astarpo`, and the file that is there once it has finished."""
    adapter, pool = folder / "adapter", folder / "pool"
    return {
        "before": (["eval", "--config", config, "--output", f"{folder}/before.json"], folder / "before.json"),
        "stage 1": (["rollout", "--config", config, "--output_dir", f"{pool}"], folder / "stage1_finished"),
        "stage 2": (
            ["train", "--config", config, "--pool", f"{pool}", "--output_dir", f"{adapter}"],
            folder / "stage2_finished",
        ),
        "after": (
            ["eval", "--config", config, "--adapter", f"{adapter}", "--output", f"{folder}/after.json"],
            folder / "after.json",
        ),
    }


def run(config: str, folder: Path) -> int:
    """Run what is not finished yet, and say what came of it. Returns the exit code of a step that failed, or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(clock.read_text()) if clock.is_file() else {}
    for name in ("before", "stage 1", "stage 2", "after"):
        words, finished = steps(config, folder)[name]
        if finished.exists():
            print(f"== {name}: finished before", flush=True)
            continue
        print(f"== {name}: astarpo {' '.join(words)}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "astarpo", *words], check=False).returncode
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began  # of interrupted runs, too
        clock.write_text(json.dumps(seconds))
        if code:
            print(
                f"`astarpo {words[0]}` ended with exit code {code}. Run this again to go on from there.",
                file=sys.stderr,
            )
            return code
        if name.startswith("stage"):
            finished.touch()
    report = summary(folder, seconds)
    (folder / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    peak = "not measured (no GPU)" if report["peak_gb"] is None else f"{report['peak_gb']:.1f} GB"
    print(
        f"accuracy {report['accuracy_before']:.3f} before, {report['accuracy_after']:.3f} after\n"
        f"{report['hours']:.2f} hours: {', '.join(f'{name} {s / 3600:.2f}' for name, s in seconds.items())}\n"
        f"peak of training {peak}"
    )
    return 0


def summary(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """What came of it, from the files of the steps."""
    before, after = (json.loads((folder / f"{name}.json").read_text())["accuracy"] for name in ("before", "after"))
    states = sorted(
        (folder / "adapter").glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    history = json.loads(states[-1].read_text())["log_history"] if states else []
    peaks = [entry["memory/peak_gb"] for entry in history if "memory/peak_gb" in entry]
    return {
        "accuracy_before": before,
        "accuracy_after": after,
        "hours": sum(seconds.values()) / 3600,
        "seconds": seconds,
        "peak_gb": max(peaks, default=None),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="t4_small", help="a recipe's name or a YAML file (default: t4_small)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/t4_small"), help="where everything is kept")
    options = parser.parse_args()
    sys.exit(run(options.config, options.output_dir))


if __name__ == "__main__":
    main()
