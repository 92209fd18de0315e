"""The parts of `benchmarks/trainer.py`: each runs in a process of its own, and what it prints is kept."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAINER, RATES = Path(__file__).parent / "trainer.py", Path(__file__).parent / "rates.json"


class Parts:
    """Runs parts in processes of their own and keeps what they print in a JSON file."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._path = Path(options.cache)
        self._kept: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def run(self, part: str, name: str, **settings: Any) -> dict[str, Any]:
        """The part's report, from the file if it was made under the same settings."""
        settings |= {"model": Path(self._options.model).name, "attention": self._options.attention}
        if self._options.task != "division":
            settings["task"] = self._options.task
        key = " ".join([part, name, *(f"{field}={value}" for field, value in settings.items())])
        if key not in self._kept:
            words = [word for field, value in settings.items() for word in (f"--{field}", str(value))]
            print(f"running: {key}", file=sys.stderr, flush=True)
            finished = subprocess.run(
                [
                    sys.executable,
                    str(TRAINER),
                    "--part",
                    part,
                    "--trainer",
                    name,
                    *words,
                    "--model",
                    self._options.model,
                ],
                stdout=subprocess.PIPE,
                check=True,
            )
            self._kept[key] = {**json.loads(finished.stdout.splitlines()[-1]), "commit": _commit()}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._kept, indent=1))
        return self._kept[key]


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
