"""Everything that only a GPU can say, in 48 minutes at most.

    python benchmarks/gpu/run.py --model SMOLLM2_FOLDER --data gsm8k_train.jsonl
    python benchmarks/gpu/run.py --tiny              # on a CPU: shows that every part works

Each part runs in a process of its own, with a time limit, and writes a JSON line to the output when it ends. So an interrupted run keeps what
it has, and the same command goes on with the parts that are missing or failed. Without `--model` (a folder of SmolLM2-135M-Instruct, which
`make quickstart` leaves in runs/models) and `--data` the parts that need them are left out, and say so.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from common import Options, Skipped, on_gpu

TINY_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Part:
    """A part: the function that measures it, what it is told, and its time limit in seconds on a GPU."""

    function: str
    seconds: int
    told: dict[str, Any] = field(default_factory=dict)


PARTS = {
    "starts": Part("starts:measure", 120),
    "speed": Part("speed:measure", 300),
    "memory, shared": Part("memory:measure", 200),
    "memory, unshared": Part("memory:measure", 200, {"share": "off"}),
    "memory, adapter": Part("memory:measure", 200, {"link": "adapter"}),
    "memory, GRPO": Part("memory:measure_grpo", 200),
    "cycles": Part("memory:measure_cycles", 200),
    "mismatch": Part("mismatch:measure", 150),
    "update": Part("update:measure", 300),
    "learning, division": Part("learning:measure_division", 400),
    "learning, words": Part("learning:measure_words", 400),
    "episodes": Part("episodes:measure", 200),
}
"""In the order of what is learnt soonest: starts, speed and memory before what takes long."""


def finished(output: Path, key: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The newest line of each part that ended well, under the same options."""
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    return {line["part"]: line for line in lines if line["options"] == key and "failed" not in line}


def run_part(name: str, words: list[str], limit: int) -> dict[str, Any]:
    """Run a part in a process of its own; returns what it found, or how it failed."""
    command = [sys.executable, __file__, "--part", name, *words]
    print(f"running: {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
        process.communicate()
        return {"failed": f"took more than {limit} s", "seconds": limit}
    seconds = round(time.monotonic() - began, 1)
    if process.returncode:
        return {"failed": f"exit code {process.returncode}: {stderr[-1500:]}", "seconds": seconds}
    return {**json.loads(stdout.splitlines()[-1]), "seconds": seconds}


def measure(name: str, options: Options) -> dict[str, Any]:
    """What one part finds, in this process."""
    part = PARTS[name]
    module, _, function = part.function.partition(":")
    try:
        return {"found": getattr(importlib.import_module(module), function)(options, **part.told)}
    except Skipped as reason:
        return {"skipped": str(reason)}


def parse() -> tuple[argparse.Namespace, Options]:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program, also on a CPU")
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="", help="JSONL file of word problems, such as GSM8K's training set")
    parser.add_argument("--folder", default="runs/benchmarks", help="where random models are kept (3 GB)")
    parser.add_argument("--budget_gb", type=float, default=10.0, help="hard cap of the parts that measure memory")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="which parts; default: all"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/gpu.jsonl"), help="a JSON line for each part"
    )
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time; more than one only with --tiny")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.jobs != 1 and not given.tiny:
        parser.error("--jobs is for --tiny: parts that share a GPU measure one another")
    return given, Options(given.tiny, given.model, given.data, given.folder, given.budget_gb)


def main() -> int:
    """Run the parts that are missing, and print a line for each. Exit code 1: one of them failed."""
    given, options = parse()
    if given.part:
        if options.tiny:
            options = replace(options, budget_gb=min(options.budget_gb, 2.0))
        print(json.dumps(measure(given.part, options)))
        return 0
    if not options.tiny and not on_gpu():
        raise SystemExit("error: this needs an NVIDIA GPU; --tiny tries the program on a CPU")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    done = finished(given.output, asdict(options))
    words = [
        word for name in ("model", "data", "folder", "budget_gb") for word in (f"--{name}", f"{getattr(given, name)}")
    ]
    words += ["--tiny"] if options.tiny else []
    options.random()  # once, before parts run side by side

    def run(name: str) -> dict[str, Any]:
        line = done.get(name)
        if line is None:
            limit = TINY_SECONDS if options.tiny else PARTS[name].seconds
            line = {"part": name, "options": asdict(options), **run_part(name, words, limit)}
            with given.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
        shown = line.get("failed") or line.get("skipped") or json.dumps(line["found"])
        print(f"{name}: {shown}", flush=True)
        return line

    with ThreadPoolExecutor(given.jobs) as pool:
        lines = list(pool.map(run, given.parts))
    return int(any("failed" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
