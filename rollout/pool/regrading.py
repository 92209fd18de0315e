"""Grading a pool's samples again, with the present verifier and without sampling."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...verifier import Verifier
from ...verifier.reward import reward_of
from ..episode import EpisodeKind, TurnGrade, episode_from_rows, final_reward, grade_turns
from ..files import file_hash
from ..pag import kind_of_pool
from .lock import lock_pool
from .reading import PoolManifest, ReferencePool, Regrade, Shard
from .writing import write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

GRADE_BATCH = 1024
REWARD_FUNCTIONS = "reward functions"
"""How the fingerprint names a grader that is not the verifier."""


def regrade_pool(
    folder: Path, verifier: Verifier, verifier_name: str, kind: EpisodeKind | None = None
) -> Counter[tuple[str, str]]:
    """Replace all grades of the pool in `folder`; the old ones are kept in a file beside the shards.

    The verifier grades the answers, the kind of episode judges the other turns anew. New shards are written first and named
    by the manifest all at once, so that a kill leaves the old grades in force.

    Args:
        folder (`Path`):
            The pool's folder.
        verifier ([`Verifier`]):
            Gives the new grades.
        verifier_name (`str`):
            Its name and version, for the fingerprint.
        kind ([`EpisodeKind`], *optional*):
            The pool's kind of episode; needed only for a kind of your own.

    Returns:
        `Counter[tuple[str, str]]`: How many rows went from which outcome to which.

    Raises:
        ValueError: If the grades are not the verifier's, the pool's kind is not known or another one, or somebody else is
            writing to the pool.
    """
    import pyarrow as pa

    lock = lock_pool(folder)
    try:
        manifest = PoolManifest.load(folder)
        made = manifest.fingerprint
        if str(made.get("verifier")).startswith(REWARD_FUNCTIONS):
            raise ValueError(
                f"The pool in `{folder}` was graded by {made['verifier']}, and the verifier would give it other rewards. Sample "
                "it again with those functions changed."
            )
        kind = _checked(kind, made, folder) if kind is not None else kind_of_pool(made)
        prompts = ReferencePool(folder, manifest).prompts
        golds = dict(zip(prompts["prompt_id"].to_pylist(), prompts["solution"].to_pylist(), strict=True))
        require_eos = bool(made.get("require_eos", True))
        shards, old, transitions = [], [], Counter()
        for shard in manifest.shards:
            table = ReferencePool(folder, replace(manifest, shards=(shard,))).read()
            old.append(table.select(["prompt_id", "sample_index", "outcome", "reward"]))
            graded = _regraded(table, kind, golds, verifier, require_eos)
            transitions.update(zip(table["outcome"].to_pylist(), graded["outcome"].to_pylist(), strict=True))
            shards.append(_rewritten(folder, shard, graded, len(manifest.regrades) + 1))
        name = f"grades-{len(manifest.regrades):03d}.parquet"
        if old:
            write_parquet(folder / name, pa.concat_tables(old))
        before = Regrade(name, str(made.get("verifier", "unknown")))
        replace(
            manifest,
            shards=tuple(shards),
            regrades=(*manifest.regrades, before),
            fingerprint={**made, "verifier": verifier_name},
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
    table: "pa.Table", kind: EpisodeKind, golds: dict[str, str], verifier: Verifier, require_eos: bool
) -> "pa.Table":
    """The table with new outcomes and rewards."""
    import pyarrow as pa

    grades = [
        grade
        for rows in _batches(table, len(kind.roles))
        for episode_grades in _grades(rows, kind, golds, verifier, require_eos)
        for grade in episode_grades
    ]
    columns = {
        "outcome": pa.array([grade.outcome for grade in grades], type=pa.string()),
        "reward": pa.array([grade.reward for grade in grades], type=pa.float64()),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _batches(table: "pa.Table", turns: int) -> Iterator[list[list[dict[str, Any]]]]:
    """The rows of the table, those of an episode together, which is how they are written."""
    columns = ["prompt_id", "sample_index", "completion_ids", "text", "finish_reason"]
    table = table.select(columns if turns > 1 else [name for name in columns if name != "completion_ids"])
    step = turns * max(1, GRADE_BATCH // turns)
    for start in range(0, table.num_rows, step):  # a shard's token ids all at once would be a lot of Python objects
        rows = [{"completion_ids": (), **row} for row in table.slice(start, step).to_pylist()]
        yield [rows[first : first + turns] for first in range(0, len(rows), turns)]


def _grades(
    episodes: list[list[dict[str, Any]]],
    kind: EpisodeKind,
    golds: dict[str, str],
    verifier: Verifier,
    require_eos: bool,
) -> Iterator[tuple[TurnGrade, ...]]:
    rebuilt = [episode_from_rows(kind, rows) for rows in episodes]
    answers = [
        (turn, golds[rows[0]["prompt_id"]])
        for rows, episode in zip(episodes, rebuilt, strict=True)
        for turn in episode.turns
        if turn.role in kind.answers
    ]
    grades = iter(verifier.grade_batch([turn.text for turn, _ in answers], [gold for _, gold in answers]))
    for episode in rebuilt:
        own = [(turn, next(grades)) for turn in episode.turns if turn.role in kind.answers]
        yield grade_turns(
            kind,
            episode,
            [
                TurnGrade(grade.outcome.value, final_reward(reward_of(grade.outcome), turn.is_truncated, require_eos))
                for turn, grade in own
            ],
        )


def _rewritten(folder: Path, shard: Shard, table: "pa.Table", round_number: int) -> Shard:
    stem = shard.file.removesuffix(".parquet").split("-g")[0]
    path = folder / f"{stem}-g{round_number}.parquet"
    write_parquet(path, table)
    return Shard(path.name, table.num_rows, file_hash(path), path.stat().st_size)
