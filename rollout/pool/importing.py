"""A pool from rewards that others have published: stage 1 of a paper without sampling anything.

The samples have rewards and nothing else. What they were sampled with is what the user declares; what is not declared is named when the
pool is used.
"""

import fnmatch
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Problem
from ..files import text_hash
from ..graders import REWARD_FUNCTIONS
from .reading import ReferencePool, Sample
from .writing import PoolWriter

logger = logging.getLogger(__name__)

DECLARABLE = ("model", "max_completion_length", "temperature", "require_eos", "verifier")
"""What a pool says of itself, and an imported one only where the user does."""
OUTCOME = "imported"


def reward_columns(names: Sequence[str], pattern: str) -> list[str]:
    """The columns that a pattern such as `eval_*` stands for, eval_2 before eval_10.

    Raises:
        ValueError: If there is none.
    """
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"No column is called `{pattern}`; there are {', '.join(names)}. Name others with --columns.")
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def import_pool(
    folder: Path,
    problems: Sequence[Problem],
    rewards: Sequence[Sequence[Any]],
    declared: Mapping[str, Any],
    source: str,
    text_prompts: bool,
) -> ReferencePool:
    """Write a pool of rewards.

    Args:
        folder (`Path`):
            The pool's folder, which must not hold one yet (or the same).
        problems (`Sequence[Problem]`):
            One for each row; rows of the same problem after the first are left out.
        rewards (`Sequence[Sequence[Any]]`):
            N rewards for each row: numbers, booleans, or None for no signal.
        declared (`Mapping[str, Any]`):
            What the samples were made with, by the names of `DECLARABLE`; None where nobody says.
        source (`str`):
            Where the rewards come from.
        text_prompts (`bool`):
            Whether the prompts are plain text.

    Raises:
        ValueError: If a reward is no finite number.
    """
    rows: dict[str, tuple[Problem, list[float | None]]] = {}
    for number, (problem, row) in enumerate(zip(problems, rewards, strict=True), start=1):
        rows.setdefault(problem.prompt_id, (problem, [_number(value, number) for value in row]))
    if len(rows) < len(problems):
        logger.warning("%d rows repeat the problem of an earlier row; they are left out", len(problems) - len(rows))
    known = {name: declared[name] for name in DECLARABLE if declared.get(name) is not None}
    undeclared = [name for name in DECLARABLE if name not in known]
    num_samples = len(next(iter(rows.values()))[1])
    fingerprint = {
        **known,
        "verifier": known.get("verifier") or f"{REWARD_FUNCTIONS} of {source}",
        "imported": source,
        "declared": sorted(known),
        "undeclared": undeclared,
        "text_prompts": text_prompts,
        "num_prompts": len(rows),
        "num_samples": num_samples,
        "content": text_hash(repr([(prompt_id, row) for prompt_id, (_, row) in rows.items()])),
    }
    kept = [problem for problem, _ in rows.values()]
    with PoolWriter(folder, kept, num_samples, fingerprint) as writer:
        writer.commit(
            [
                Sample(prompt_id, index, 0, (), "", "stop", 0, OUTCOME if reward is not None else "no_signal", reward)
                for prompt_id, (_, row) in rows.items()
                for index, reward in enumerate(row)
            ]
        )
        return ReferencePool(writer.folder, writer.manifest)


def _number(value: Any, row: int) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"Row {row} has the reward {value!r}. Rewards must be finite numbers, booleans, or empty.")
    return float(value)
