"""Memory of sampler and trainer apart against both in one process, over six rounds in which either part is killed once.

    python benchmarks/apart.py

Prints one JSON line: the most resident memory of each process in GB (on a CPU; a GPU's is what `astarpo plan` says), and whether the adapter has the
bytes that the same rounds give without a kill.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from astarpo.trainer.division import write_problems

ROUNDS, LAG = 6, 1


def command(model: str, data: Path, *words: str) -> list[str]:
    """A training on divisions."""
    return [
        *(sys.executable, "-m", "astarpo", "train", "--model_name_or_path", model, "--dataset_name", str(data)),
        *("--max_completion_length", "24", "--per_device_train_batch_size", "32", "--learning_rate", "1e-4"),
        *("--lr_scheduler_type", "constant", "--report_to", "none", "--save_steps", "1", "--logging_steps", "1"),
        *("--attn_implementation", "eager", "--gradient_checkpointing", "false", "--kv_cache_gb", "0.5"),
        *words,
    ]


class Part:
    """A process that is started again when it was killed, and the most memory that it held.

    Args:
        words (`list[str]`):
            Its command line.
        kill_when (`Callable[[], bool]`, *optional*):
            Kill it once, when this becomes true.
    """

    def __init__(self, words: list[str], kill_when: Callable[[], bool] | None = None):
        self._words, self._kill_when = words, kill_when
        self.peak, self.kills, self.is_done = 0, 0, False
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL)

    def look(self) -> None:
        """Note its memory, kill it when it is time, start it again where it was killed."""
        if self.is_done:
            return
        with suppress(psutil.NoSuchProcess):
            self.peak = max(self.peak, psutil.Process(self._process.pid).memory_info().rss)
        if self.kills == 0 and self._kill_when is not None and self._kill_when():
            self._process.kill()
            self._process.wait()
            self.kills += 1
            self._start()
        code = self._process.poll()
        if code not in (None, 0):
            raise RuntimeError(f"{' '.join(self._words)} ended with {code}")
        self.is_done = code == 0


def run(*parts: Part) -> None:
    """Until all are done."""
    while not all(part.is_done for part in parts):
        for part in parts:
            part.look()
        time.sleep(0.1)


def measure(model: str, folder: Path) -> dict[str, Any]:
    """Run all three ways in `folder`."""
    data, _ = write_problems(folder)
    shared = Part(
        command(model, data, "--max_steps", "4", "--num_value_samples", "2", "--output_dir", str(folder / "shared"))
    )
    run(shared)
    outcomes, peaks, kills = [], {}, {}
    for name, is_killed in (("whole", False), ("killed", True)):
        place = folder / name
        rounds = [
            "--rounds",
            str(ROUNDS),
            "--updates_per_round",
            "2",
            "--num_samples",
            "8",
            "--lag",
            str(LAG),
            "--beta2",
            "0.3",
        ]
        rounds += ["--rounds_dir", str(place / "rounds")]

        def made(number: int, what: str, place: Path = place) -> Callable[[], bool]:
            return lambda: (place / "rounds" / f"round-{number:04d}" / what).exists()

        sampler = Part(
            command(model, data, *rounds, "--part", "sampler", "--output_dir", str(place / "sampler")),
            made(2, "pool") if is_killed else None,
        )
        trainer = Part(
            command(model, data, *rounds, "--part", "trainer", "--output_dir", str(place / "out")),
            made(3, "adapter") if is_killed else None,
        )
        run(sampler, trainer)
        outcomes.append((place / "out" / "adapter_model.safetensors").read_bytes())
        peaks = {"sampler": round(sampler.peak / 1e9, 2), "trainer": round(trainer.peak / 1e9, 2)}
        kills = {"sampler": sampler.kills, "trainer": trainer.kills}
    return {
        "peak_gb": {"together": round(shared.peak / 1e9, 2), **peaks},
        "kills": kills,
        "same_bytes": outcomes[0] == outcomes[1],
        "rounds": ROUNDS,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, fetched into runs/models")
    options = parser.parse_args()
    if options.model is None:
        from astarpo.trainer.quickstart import fetch_model

        options.model = str(fetch_model(Path("runs/models")))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options.model, Path(folder))))


if __name__ == "__main__":
    main()
