"""Reads the golden sets."""

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "data"
_LINE = re.compile(r"(\??)(yes|no|YES|NO|NONE|BAD) (.*?) :: (.*)")
OUTCOMES = {
    "yes": {"correct"},
    "no": {"wrong", "no_answer"},
    "YES": {"correct"},
    "NO": {"wrong"},
    "NONE": {"no_answer"},
    "BAD": {"unparseable_gold"},
}


@dataclass(frozen=True)
class Pair:
    """One labelled pair."""

    category: str
    completion: str
    gold: str
    outcomes: frozenset[str]
    known_to_fail: bool
    line: str

    @property
    def is_correct(self) -> bool:
        return "correct" in self.outcomes


def golden_pairs(name: str = "golden*.txt") -> list[Pair]:
    """All pairs of the golden sets; a line that is no pair is an error."""
    pairs = []
    for path in sorted(FOLDER.glob(name)):
        category = ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("##"):
                category = f"{path.stem}: {line[2:].strip()}"
            elif line and not line.startswith("#"):
                match = _LINE.fullmatch(line)
                assert match is not None, f"{path.name}: not a golden pair: {line}"
                known, kind, gold, text = match.groups()
                completion = text.replace("⏎", "\n") if kind in ("YES", "NO", "NONE") else f"\\boxed{{{text}}}"
                pairs.append(Pair(category, completion, gold, frozenset(OUTCOMES[kind]), known == "?", line))
    return pairs
