"""Grading a pool's samples again, with the present verifier and without sampling."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...verifier import Verifier
from ...verifier.reward import reward_of
from ..files import file_hash
from .lock import PoolLock
from .manifest import PoolManifest, Regrade, Shard, final_reward
from .reading import ReferencePool
from .writing import write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

GRADE_BATCH = 1024
REWARD_FUNCTIONS = "reward functions"
"""How the fingerprint names a grader that is not the verifier."""


def regrade_pool(folder: Path, verifier: Verifier, verifier_name: str) -> Counter[tuple[str, str]]:
    """Replace all grades of the pool in `folder`; the old ones are kept in a file beside the shards.

    New shards are written first and named by the manifest all at once, so that a kill leaves the old grades in force.

    Args:
        folder (`Path`):
            The pool's folder.
        verifier ([`Verifier`]):
            Gives the new grades.
        verifier_name (`str`):
            Its name and version, for the fingerprint.

    Returns:
        `Counter[tuple[str, str]]`: How many samples went from which outcome to which.

    Raises:
        ValueError: If the grades are not the verifier's, or somebody else is writing to the pool.
    """
    import pyarrow as pa

    lock = PoolLock(folder)
    try:
        manifest = PoolManifest.load(folder)
        if str(manifest.fingerprint.get("verifier")).startswith(REWARD_FUNCTIONS):
            raise ValueError(
                f"The pool in `{folder}` was graded by {manifest.fingerprint['verifier']}; the verifier's grades would be other "
                "rewards. Sample it again with those functions changed."
            )
        pool = ReferencePool(folder, manifest)
        prompts = pool.prompts
        golds = dict(zip(prompts["prompt_id"].to_pylist(), prompts["solution"].to_pylist(), strict=True))
        require_eos = bool(manifest.fingerprint.get("require_eos", True))
        shards, old, transitions = [], [], Counter()
        for shard in manifest.shards:
            table = ReferencePool(folder, replace(manifest, shards=(shard,))).read()
            old.append(table.select(["prompt_id", "sample_index", "outcome", "reward"]))
            graded = _graded(table, golds, verifier, require_eos)
            if manifest.turns > 1:
                graded = _with_verdicts(table, graded)
            transitions.update(zip(table["outcome"].to_pylist(), graded["outcome"].to_pylist(), strict=True))
            shards.append(_rewritten(folder, shard, graded, len(manifest.regrades) + 1))
        name = f"grades-{len(manifest.regrades):03d}.parquet"
        if old:
            write_parquet(folder / name, pa.concat_tables(old))
        before = Regrade(name, str(manifest.fingerprint.get("verifier", "unknown")))
        replace(
            manifest,
            shards=tuple(shards),
            regrades=(*manifest.regrades, before),
            fingerprint={**manifest.fingerprint, "verifier": verifier_name},
        ).save(folder)
        for shard in manifest.shards:
            (folder / shard.file).unlink()
    finally:
        lock.release()
    return transitions


def _graded(table: "pa.Table", golds: dict[str, str], verifier: Verifier, require_eos: bool) -> "pa.Table":
    import pyarrow as pa

    texts, ids = table["text"].to_pylist(), table["prompt_id"].to_pylist()
    outcomes = []
    for start in range(0, len(texts), GRADE_BATCH):
        part = slice(start, start + GRADE_BATCH)
        outcomes += [
            g.outcome for g in verifier.grade_batch(texts[part], [golds[prompt_id] for prompt_id in ids[part]])
        ]
    reasons = table["finish_reason"].to_pylist()
    rewards = [final_reward(reward_of(o), reason, require_eos) for o, reason in zip(outcomes, reasons, strict=True)]
    columns = {"outcome": pa.array([o.value for o in outcomes]), "reward": pa.array(rewards, type=pa.float64())}
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _with_verdicts(table: "pa.Table", graded: "pa.Table") -> "pa.Table":
    """Of episodes only attempts and revisions have grades of the verifier; whether a verdict is true follows from the attempt's.

    The rows of an episode stand in the same shard.
    """
    import pyarrow as pa

    from ..episodes.stage1 import NOT_REACHED, VERDICT, verdict_reward

    keys = list(zip(graded["prompt_id"].to_pylist(), graded["sample_index"].to_pylist(), strict=True))
    acc = dict(zip(keys, graded["reward"].to_pylist(), strict=True))
    outcomes, rewards = graded["outcome"].to_pylist(), graded["reward"].to_pylist()
    for row, ((prompt_id, index), before) in enumerate(zip(keys, table["outcome"].to_pylist(), strict=True)):
        if before.startswith(VERDICT):
            outcomes[row], rewards[row] = before, verdict_reward(before, acc[prompt_id, index - 1])
        elif before == NOT_REACHED:
            outcomes[row], rewards[row] = before, None
    columns = {"outcome": pa.array(outcomes), "reward": pa.array(rewards, type=pa.float64())}
    for name, column in columns.items():
        graded = graded.set_column(graded.schema.get_field_index(name), name, column)
    return graded


def _rewritten(folder: Path, shard: Shard, table: "pa.Table", round_number: int) -> Shard:
    stem = shard.file.removesuffix(".parquet").split("-g")[0]
    path = folder / f"{stem}-g{round_number}.parquet"
    write_parquet(path, table)
    return Shard(path.name, table.num_rows, file_hash(path), path.stat().st_size)
