"""A limited number of a data set's rows: a seeded sample that is spread over subjects and levels.

Data sets are often sorted. The first 500 rows of MATH's training set are algebra alone.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from .files import text_hash

SUBJECTS = ("subject", "type", "subfield")
LEVELS = ("level", "difficulty")
"""Columns by which rows are spread, the first of each that a data set has."""


def spread_sample(columns: Mapping[str, Sequence[Any]], count: int, limit: int, seed: int) -> list[int]:
    """Choose rows, in proportion from every pair of subject and level.

    Which rows of a pair are chosen, and which pairs get one row more where proportions are not whole, follows from a hash of the seed and
    the row's number: the same on every machine.

    Args:
        columns (`Mapping[str, Sequence]`):
            The data set's columns by name; those of `SUBJECTS` and `LEVELS` are looked at.
        count (`int`):
            Rows of the data set.
        limit (`int`):
            Rows to choose.
        seed (`int`):
            Seed of the choice.

    Returns:
        `list[int]`: Row numbers, in the data set's order; all of them where `limit` is not below `count`.

    Raises:
        ValueError: If `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    if limit >= count:
        return list(range(count))
    by = [next((columns[name] for name in names if name in columns), None) for names in (SUBJECTS, LEVELS)]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row in range(count):
        groups[tuple(None if column is None else str(column[row]) for column in by)].append(row)
    shares = {key: Fraction(len(rows) * limit, count) for key, rows in groups.items()}
    quotas = {key: int(share) for key, share in shares.items()}
    # Largest remainders get what is left over, ties by hash.
    order = sorted(groups, key=lambda key: (quotas[key] - shares[key], text_hash(f"{seed} {key}")))
    for key in order[: limit - sum(quotas.values())]:
        quotas[key] += 1
    chosen = []
    for key, rows in groups.items():
        shuffled = sorted(rows, key=lambda row: text_hash(f"{seed} {row}"))
        chosen += shuffled[: quotas[key]]
    return sorted(chosen)


def shares(sizes: Sequence[int], weights: Sequence[float | None], limit: int | None) -> list[int]:
    """How many rows of each data set a mixture takes.

    Args:
        sizes (`Sequence[int]`):
            Rows of each data set.
        weights (`Sequence[float | None]`):
            Their weights, all None where everything is used.
        limit (`int`, *optional*):
            Most rows in all.

    Returns:
        `list[int]`: In the proportions of the weights (of the sizes, where there are none), none above its size: the most that is possible.

    Raises:
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1, got {limit}.")
    parts = [Fraction(size if weight is None else weight) for size, weight in zip(sizes, weights, strict=True)]
    total = min(Fraction(size) / part * sum(parts) for size, part in zip(sizes, parts, strict=True) if part)
    if limit is not None:
        total = min(total, Fraction(limit))
    exact = [total * part / sum(parts) for part in parts]
    whole = [int(share) for share in exact]
    # Largest remainders get what is left over.
    for place in sorted(range(len(parts)), key=lambda place: whole[place] - exact[place])[: int(total) - sum(whole)]:
        whole[place] += whole[place] < sizes[place]
    return whole
