"""Grading a pool's samples again, with the present verifier or reward functions, and without sampling."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...verifier import Verifier
from ..data import Problem
from ..episode import EpisodeKind, TurnGrade, episode_from_rows, final_reward, grade_turns
from ..files import file_hash
from ..graders import REWARD_FUNCTIONS
from ..pag import kind_of_pool
from ..sample import GradeFunction, grade_answers, grade_function
from .lock import lock_pool
from .reading import PoolManifest, ReferencePool, Regrade, Shard
from .writing import write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

GRADE_BATCH = 1024


def regrade_pool(
    folder: Path,
    grader: Verifier | GradeFunction,
    graded_by: str | dict[str, Any],
    kind: EpisodeKind | None = None,
) -> Counter[tuple[str, str]]:
    """Replace all grades of the pool in `folder`; the old ones are kept in a file beside the shards.

    The grader grades the answers, the kind of episode judges the other turns anew. New shards are written first and named
    by the manifest all at once, so that a kill leaves the old grades in force.

    Args:
        folder (`Path`):
            The pool's folder.
        grader ([`Verifier`] or `GradeFunction`):
            Gives the new grades.
        graded_by (`str` or `dict[str, Any]`):
            The verifier's name and version, or what [`grader_fingerprint`] says of reward functions, for the fingerprint.
        kind ([`EpisodeKind`], *optional*):
            The pool's kind of episode; needed only for a kind of your own.

    Returns:
        `Counter[tuple[str, str]]`: How many rows went from which outcome to which.

    Raises:
        ValueError: If the verifier would replace the rewards of reward functions, the pool's kind is not known or another one, or somebody else is
            writing to the pool.
    """
    import pyarrow as pa

    lock = lock_pool(folder)
    try:
        manifest = PoolManifest.load(folder)
        made = manifest.fingerprint
        if isinstance(graded_by, str) and str(made.get("verifier")).startswith(REWARD_FUNCTIONS):
            raise ValueError(
                f"The pool in `{folder}` was graded by {made['verifier']}, and the verifier would give it other rewards. Name the "
                "functions with --reward_funcs."
            )
        kind = _checked(kind, made, folder) if kind is not None else kind_of_pool(made)
        problems = {
            row["prompt_id"]: Problem(tuple(json.loads(row["prompt"])), row["solution"])
            for row in ReferencePool(folder, manifest).prompts.to_pylist()
        }
        grade, needs_ids = grade_function(grader), not isinstance(grader, Verifier)
        require_eos = bool(made.get("require_eos", True))
        shards, old, transitions = [], [], Counter()
        for shard in manifest.shards:
            table = ReferencePool(folder, replace(manifest, shards=(shard,))).read()
            old.append(table.select(["prompt_id", "sample_index", "outcome", "reward"]))
            graded = _regraded(table, kind, problems, grade, require_eos, needs_ids)
            transitions.update(zip(table["outcome"].to_pylist(), graded["outcome"].to_pylist(), strict=True))
            shards.append(_rewritten(folder, shard, graded, len(manifest.regrades) + 1))
        name = f"grades-{len(manifest.regrades):03d}.parquet"
        if old:
            write_parquet(folder / name, pa.concat_tables(old))
        kept = {name: value for name, value in made.items() if not name.startswith("reward_")}
        before = Regrade(name, str(made.get("verifier", "unknown")))
        replace(
            manifest,
            shards=tuple(shards),
            regrades=(*manifest.regrades, before),
            fingerprint=kept | ({"verifier": graded_by} if isinstance(graded_by, str) else graded_by),
        ).save(folder)
        for shard in manifest.shards:
            (folder / shard.file).unlink()
    finally:
        lock.release()
    return transitions


def _checked(kind: EpisodeKind, fingerprint: dict[str, Any], folder: Path) -> EpisodeKind:
    """The kind, if the pool was sampled with it."""
    own = kind.fingerprint() or {"episode": None}  # pools of completions have no such field
    changed = [key for key, value in own.items() if fingerprint.get(key) != value]
    if changed:
        raise ValueError(
            f"The pool in `{folder}` was sampled with another kind of episode than `{kind.name}`: {changed[0]} is "
            f"{fingerprint.get(changed[0])!r} in the pool and {own[changed[0]]!r} in the kind. Pass the one it was sampled with."
        )
    return kind


def _regraded(
    table: "pa.Table",
    kind: EpisodeKind,
    problems: dict[str, Problem],
    grade: GradeFunction,
    require_eos: bool,
    needs_ids: bool,
) -> "pa.Table":
    """The table with new outcomes and rewards."""
    import pyarrow as pa

    grades = [
        one
        for rows in _batches(table, len(kind.roles), needs_ids)
        for episode_grades in _grades(rows, kind, problems, grade, require_eos)
        for one in episode_grades
    ]
    columns = {
        "outcome": pa.array([grade.outcome for grade in grades], type=pa.string()),
        "reward": pa.array([grade.reward for grade in grades], type=pa.float64()),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _batches(table: "pa.Table", turns: int, needs_ids: bool) -> Iterator[list[list[dict[str, Any]]]]:
    """The rows of the table, those of an episode together, which is how they are written."""
    columns = ["prompt_id", "sample_index", "completion_ids", "text", "finish_reason"]
    table = table.select(columns if turns > 1 or needs_ids else [name for name in columns if name != "completion_ids"])
    step = turns * max(1, GRADE_BATCH // turns)
    for start in range(0, table.num_rows, step):  # a shard's token ids all at once would be a lot of Python objects
        rows = [{"completion_ids": (), **row} for row in table.slice(start, step).to_pylist()]
        yield [rows[first : first + turns] for first in range(0, len(rows), turns)]


def _grades(
    episodes: list[list[dict[str, Any]]],
    kind: EpisodeKind,
    problems: dict[str, Problem],
    grade: GradeFunction,
    require_eos: bool,
) -> Iterator[tuple[TurnGrade, ...]]:
    rebuilt = [(problems[rows[0]["prompt_id"]], episode_from_rows(kind, rows)) for rows in episodes]
    grades = iter(grade_answers(kind, rebuilt, grade))
    for _, episode in rebuilt:
        answers = []
        for turn in episode.turns:
            if turn.role in kind.answers:
                given = next(grades)
                answers.append(TurnGrade(given.outcome, final_reward(given.reward, turn.is_truncated, require_eos)))
        yield grade_turns(kind, episode, answers)


def _rewritten(folder: Path, shard: Shard, table: "pa.Table", round_number: int) -> Shard:
    stem = shard.file.removesuffix(".parquet").split("-g")[0]
    path = folder / f"{stem}-g{round_number}.parquet"
    write_parquet(path, table)
    return Shard(path.name, table.num_rows, file_hash(path), path.stat().st_size)
