"""What the folder of a run remembers of it, in `run.json`: the options, whether it has finished, and what it found.

The checkpoints have a fingerprint of their own (`checkpoint.py`), which is compared when the model is loaded. This file is compared
before anything is, in the words of the command line, so that the same command can continue a run, show a finished one, or say in a
second which option is another one.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..rollout.files import write_json
from .checkpoint import PREFIX, differences, settings_of
from .config import ROUND_PLACES

RECORD = "run.json"
LEFTOVERS = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "model*.safetensors*",
    "reward.png",
    "README.md",
    RECORD,
)
"""What a run writes into its folder beside checkpoints and pool."""
FOLDERS = ("completions", "runs")
REFERENCE = "reference"
"""Folder of the model that an earlier adapter was merged into."""


@dataclass(frozen=True)
class RunRecord:
    """A run, as `run.json` has it.

    Attributes:
        options (`dict[str, Any]`):
            Options that decide what is computed, by their names on the command line.
        length (`dict[str, Any]`):
            `max_steps` and `num_train_epochs`, which may grow where the learning rate does not follow from them.
        updates (`int`):
            Updates made by the time it was written.
        is_finished (`bool`):
            Whether the run came to its end.
        before (`dict[str, float]`, *optional*):
            The reference on the evaluation set.
        after (`dict[str, float]`, *optional*):
            The trained policy on it.
        log (`list[dict[str, Any]]`):
            What was logged.
    """

    options: dict[str, Any]
    length: dict[str, Any]
    updates: int = 0
    is_finished: bool = False
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path) -> "RunRecord | None":
        """The record in `folder`; None where there is none. Raises a `ValueError` for one that cannot be read."""
        path = folder / RECORD
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{one.name: content[one.name] for one in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`{path}` cannot be read ({type(error).__name__}: {error}). Delete it: the run then goes on from its newest checkpoint."
            ) from error

    def save(self, folder: Path) -> None:
        """Write the record into `folder`, atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD, _plain(asdict(self)))

    def refuse_other(self, asked: "RunRecord", folder: Path) -> None:
        """Raise a `ValueError` that names every option in which another run is asked for."""
        lines = differences(self.options, asked.options, "--")
        if lines:
            raise ValueError(
                f"`{folder}` holds another run:\n{lines}\nSet these back to continue it, choose another --output_dir, or delete that run "
                "with --overwrite_output_dir true (its reference pool stays)."
            )

    def is_over(self, asked: "RunRecord") -> bool:
        """Whether there is nothing left to do for what is asked: the run has finished, and is not to be longer now."""
        # Not `updates` alone: rounds may end early, and then a finished run has fewer than were asked for.
        longer = self.length != asked.length and not 0 < asked.length["max_steps"] <= self.updates
        return self.is_finished and not longer

    def with_options(self, asked: "RunRecord") -> "RunRecord":
        """This record with the options that are asked for now, where the run goes on."""
        return replace(self, options=asked.options, length=asked.length, is_finished=False)


def asked_run(args: Any, *groups: Any) -> RunRecord:
    """The run that a command line asks for.

    Args:
        args ([`AStarPOConfig`]):
            The training arguments.
        *groups:
            Dataclasses of the other options.
    """
    settings, length = settings_of(args)
    for group in groups:
        settings |= asdict(group)
    for name in ROUND_PLACES:
        settings.pop(name, None)
    return RunRecord(_plain(settings), length)


def delete_run(folder: Path) -> None:
    """Delete a run's checkpoints, adapter, logs and record; never its reference, its pool or rounds, nor files that are somebody else's."""
    for path in folder.glob(f"{PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
    for name in FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            path.unlink()


def _plain(content: Any) -> Any:
    """Content as JSON has it; what is not a number there is None."""
    return json.loads(json.dumps(content, default=str), parse_constant=lambda name: None)
