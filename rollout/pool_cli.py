"""`astarpo-rollout verify`, `regrade`, `summary` and `publish`: what can be done with a pool that is there."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _arguments(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"astarpo-rollout {command}", description=description)
    parser.add_argument("pool", type=Path, help="folder of the pool")
    return parser


def verify_command() -> int:
    """Check every shard of a pool; returns 1 when something is wrong."""
    parser = _arguments("verify", "Check every shard's hash, rows and keys. Exit code 1 names what is wrong.")
    folder = parser.parse_args(sys.argv[2:]).pool
    from .pool import PoolManifest, check_pool

    faults = check_pool(folder)
    for fault in faults:
        print(f"{folder / fault.file}: {fault.problem}")
    manifest = PoolManifest.load(folder)
    state = "sound" if not faults else f"{len(faults)} faults; the command that made it replaces what is broken"
    if manifest.failures:
        print(
            f"{folder}: {len(manifest.failures)} samples could not be drawn; they are tried again when it is continued"
        )
    print(f"{folder}: {manifest.num_rows} of {manifest.total} samples in {len(manifest.shards)} shards, {state}")
    return 1 if faults else 0


def regrade_command() -> int:
    """Grade a pool's samples again and show which outcomes changed."""
    parser = _arguments("regrade", "Grade all samples again with the present verifier. The old grades are kept.")
    parser.add_argument("--verifier_workers", type=int, default=1, help="grading processes (default: 1)")
    options = parser.parse_args(sys.argv[2:])
    from rich.console import Console
    from rich.table import Table

    from ..verifier import Verifier
    from .fingerprint import verifier_name
    from .pool import regrade_pool

    with Verifier(options.verifier_workers) as verifier:
        transitions = regrade_pool(options.pool, verifier, verifier_name())
    table = Table("before", "now", "samples", title=f"{transitions.total()} samples graded again")
    for (before, now), count in sorted(transitions.items(), key=lambda item: -item[1]):
        table.add_row(before, now, str(count), style="" if before == now else "yellow")
    Console().print(table)
    return 0


def summary_command() -> int:
    """Describe a pool."""
    parser = _arguments("summary", "Solve rates, pass@k, lengths and the spread of V* of a pool.")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this image file")
    options = parser.parse_args(sys.argv[2:])
    from .files import write_json
    from .pool import ReferencePool
    from .pool.summary import plot_summary

    summary = ReferencePool.open(options.pool).summary()
    print_summary(summary, str(options.pool))
    if options.json:
        write_json(options.json, summary)
    if options.plot:
        plot_summary(summary, options.plot)
    return 0


def publish_command() -> int:
    """Upload a pool to the hub."""
    parser = _arguments(
        "publish", "Upload a pool to the hub as a data set, with a card. ReferencePool.open(ID) loads it."
    )
    parser.add_argument("repo_id", help="user/name of the data set")
    parser.add_argument("--private", action="store_true", help="make a new data set private")
    options = parser.parse_args(sys.argv[2:])
    from .pool.hub import publish_pool

    print(publish_pool(options.pool, options.repo_id, private=options.private))
    return 0


def print_summary(summary: dict[str, Any], folder: str) -> None:
    """Show a pool's summary as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"reference pool in {folder}", show_header=False)
    for name, value in summary.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {_short(item)}" for key, item in value.items())
        else:
            text = _short(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return json.dumps(value) if isinstance(value, list) else str(value)


COMMANDS: dict[str, Callable[[], int]] = {
    "verify": verify_command,
    "regrade": regrade_command,
    "summary": summary_command,
    "publish": publish_command,
}
