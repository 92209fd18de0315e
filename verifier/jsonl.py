"""Reading graded completions from JSONL, line by line, whatever the lines hold."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Item:
    """One completion to grade."""

    id: Any
    completion: str
    gold: str


@dataclass
class ItemFile:
    """A JSONL file of completions; remembers which lines it could not use.

    Args:
        path (`Path`):
            The file: `id`, `completion` and `gold` on each line.
    """

    path: Path
    bad_lines: list[int] = field(default_factory=list)

    def __post_init__(self):
        if not self.path.is_file():
            raise ValueError(f"Input file `{self.path}` does not exist. Check --input.")

    def count(self) -> int:
        """Number of lines, for a progress bar."""
        with self.path.open("rb") as lines:
            return sum(1 for _ in lines)

    def batches(self, size: int) -> Iterator[list[Item]]:
        """The usable lines in order, `size` at a time; the others are logged and skipped."""
        items = self._items()
        while batch := list(islice(items, size)):
            yield batch

    def _items(self) -> Iterator[Item]:
        with self.path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield _item(json.loads(line))
                except (ValueError, RecursionError) as error:
                    logger.warning("%s, line %d skipped: %s", self.path, number, error)
                    self.bad_lines.append(number)

    def report(self) -> int:
        """Log how many lines were skipped, and return the exit code for it: 1 if any was, else 0."""
        if self.bad_lines:
            logger.warning("%d lines skipped, the first is line %d", len(self.bad_lines), self.bad_lines[0])
        return 1 if self.bad_lines else 0


def _item(row: Any) -> Item:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    missing = [key for key in ("id", "completion", "gold") if key not in row]
    if missing:
        raise ValueError(f"no field {', '.join(f'`{key}`' for key in missing)}")
    if not isinstance(row["completion"], str):
        raise ValueError("`completion` is not a string")
    if not isinstance(row["gold"], str | int | float) or isinstance(row["gold"], bool):
        raise ValueError("`gold` is neither a string nor a number")
    return Item(row["id"], row["completion"], str(row["gold"]))
