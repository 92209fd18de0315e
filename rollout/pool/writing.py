"""Creating and continuing a pool, one writer at a time; and checking what is on disk."""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..data import Problem
from ..files import changed_fields, file_hash, write_atomically
from .lock import lock_pool
from .reading import (
    KEYS,
    MANIFEST,
    PROMPTS,
    FailedSample,
    PoolManifest,
    ReferencePool,
    Sample,
    Shard,
    key_numbers,
    sample_schema,
)

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine"
HASH_BYTES = 2**30
"""Pools up to this size are read in full when they are continued; of larger ones only sizes and keys are checked."""
DESCRIPTIONS = ("sources", "model_name")
"""Fields of a fingerprint that decide nothing: where the problems come from, and the model's name. Hashes of both are there too."""
MERGE_SHARDS, MERGED_ROWS = 64, 16_384
"""So many shards below so many rows are merged into one, since opening a file costs more than reading it."""


class PoolWriter:
    """A pool opened for appending, under its lock: creates it, or continues it when the fingerprint is the same.

    Broken shards are moved to `quarantine/`, named in the log, and count as not sampled.

    Args:
        folder (`Path`):
            The pool's folder.
        problems (`Sequence[Problem]`):
            All problems of the pool.
        num_samples (`int`):
            Samples per prompt.
        fingerprint (`dict[str, Any]`):
            Everything that decides a sample.
        turns (`int`, *optional*, defaults to `1`):
            Rows of a sample, K: one for each role of an episode. They are committed together.

    Raises:
        ValueError: If the folder holds a pool with another fingerprint (the message shows what differs), or if somebody
            else is writing to it.
    """

    def __init__(
        self,
        folder: Path,
        problems: Sequence[Problem],
        num_samples: int,
        fingerprint: dict[str, Any],
        turns: int = 1,
    ):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_pool(folder)
        try:
            if (folder / MANIFEST).exists():
                self.manifest = PoolManifest.load(folder)
                _refuse_changes(folder, self.manifest.fingerprint, fingerprint)
                self._restore_prompts(problems)
                self._quarantine_faults()
            else:
                _refuse_nameless(folder)
                self.manifest = PoolManifest(fingerprint, num_samples, len(problems), turns=turns)
                self._write_prompts(problems)
                self.manifest.save(folder)
            self.present = ReferencePool(folder, self.manifest).present()
        except BaseException:
            self._lock.release()
            raise
        self._position = {problem.prompt_id: position for position, problem in enumerate(problems)}

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return self.manifest.is_complete

    def has(self, prompt_id: str, sample_index: int) -> bool:
        """Whether a sample is committed."""
        return bool(self.present[self._position[prompt_id], sample_index])

    def commit(self, samples: Sequence[Sample]) -> None:
        """Write `samples` as one shard: the file first, then the manifest that makes it exist."""
        import pyarrow as pa

        # A caller that was interrupted here may come again with what is committed already.
        samples = [sample for sample in samples if not self.has(sample.prompt_id, sample.sample_index)]
        if not samples:
            return
        table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=sample_schema())
        shard = self._write_shard(table)
        sampled = {(sample.prompt_id, sample.sample_index) for sample in samples}
        failures = (f for f in self.manifest.failures if (f.prompt_id, f.sample_index) not in sampled)
        self._name(shard, shards=(*self.manifest.shards, shard), failures=tuple(failures))
        for sample in samples:
            self.present[self._position[sample.prompt_id], sample.sample_index] = True
        self._merge_small()

    def record_failures(self, failed: Sequence[tuple[str, int, str]]) -> None:
        """Record rows that the engine could not sample: (prompt_id, sample_index, reason)."""
        failures = {(f.prompt_id, f.sample_index): f for f in self.manifest.failures}
        for prompt_id, sample_index, reason in failed:
            earlier = failures.get((prompt_id, sample_index))
            attempts = earlier.attempts + 1 if earlier else 1
            failures[prompt_id, sample_index] = FailedSample(prompt_id, sample_index, reason, attempts)
        self._save(failures=tuple(failures.values()))

    def _name(self, shard: Shard, **changes: Any) -> None:
        """Save a manifest that names a new shard; delete the shard if that fails (a full disk): nobody would use it."""
        try:
            self._save(**changes)
        except BaseException:
            # An interrupt may come after the manifest is in place.
            if all(shard.file != named.file for named in PoolManifest.load(self.folder).shards):
                (self.folder / shard.file).unlink()
            raise

    def _save(self, **changes: Any) -> None:
        manifest = replace(self.manifest, **changes)
        manifest.save(self.folder)
        self.manifest = manifest

    def _write_shard(self, table: "pa.Table") -> Shard:
        name = self._next_name()
        path = self.folder / name
        write_parquet(path, table)
        return Shard(name, table.num_rows, file_hash(path), path.stat().st_size)

    def _next_name(self) -> str:
        files = [shard.file for shard in self.manifest.shards]
        files += [path.name for path in self.folder.glob(f"{QUARANTINE}/samples-*.parquet*")]
        numbers = [int(file.split("-")[1].split(".")[0]) for file in files]
        return f"samples-{max(numbers, default=-1) + 1:05d}.parquet"

    def _merge_small(self) -> None:
        small = [shard for shard in self.manifest.shards if shard.rows < MERGED_ROWS]
        # Of a settled pool somebody may be reading the shards.
        if len(small) < MERGE_SHARDS or self.manifest.is_settled:
            return
        try:
            self._merge(small)
        except OSError as error:  # a full disk: the rows are safe in their small shards
            logger.warning("%s: small shards are not merged (%s)", self.folder, error)

    def _merge(self, small: Sequence[Shard]) -> None:
        merged = self._write_shard(ReferencePool(self.folder, replace(self.manifest, shards=tuple(small))).read())
        gone = {shard.file for shard in small}
        self._name(merged, shards=(*(shard for shard in self.manifest.shards if shard.file not in gone), merged))
        for file in gone:
            (self.folder / file).unlink()

    def _write_prompts(self, problems: Sequence[Problem]) -> None:
        import pyarrow as pa

        rows = [
            {
                "prompt_id": problem.prompt_id,
                "prompt": json.dumps(list(problem.messages), ensure_ascii=False),
                "solution": problem.gold,
            }
            for problem in problems
        ]
        schema = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string()), ("solution", pa.string())])
        write_parquet(self.folder / PROMPTS, pa.Table.from_pylist(rows, schema=schema))
        self.manifest = replace(self.manifest, prompts_blake2b=file_hash(self.folder / PROMPTS))

    def _restore_prompts(self, problems: Sequence[Problem]) -> None:
        """Write a broken file of prompts again: they are an input, and the fingerprint vouches for their content."""
        path = self.folder / PROMPTS
        if not path.is_file() or file_hash(path) != self.manifest.prompts_blake2b:
            logger.warning("%s was missing or changed; it is written again", path)
            self._write_prompts(problems)
            self.manifest.save(self.folder)

    def _quarantine_faults(self) -> None:
        shards = self.manifest.shards
        in_full = sum(max(0, shard.bytes) for shard in shards) <= HASH_BYTES
        faults: list[Fault] = broken_shards(self.folder, self.manifest, shards, hashes=in_full)
        lost = {fault.file for fault in faults}
        for fault in [*faults, *orphans(self.folder, self.manifest)]:
            place = self.folder / QUARANTINE / fault.file
            place.parent.mkdir(exist_ok=True)
            if (self.folder / fault.file).exists():
                os.replace(self.folder / fault.file, _unused(place))
            logger.warning("%s: %s; moved to %s/", self.folder / fault.file, fault.problem, QUARANTINE)
        if lost:
            kept = [shard for shard in shards if shard.file not in lost]
            rows = sum(shard.rows for shard in shards) - sum(shard.rows for shard in kept)
            logger.warning("%d rows of %d broken shards will be sampled again", rows, len(lost))
            self._save(shards=tuple(kept))

    def close(self) -> None:
        """Release the pool's lock."""
        self._lock.release()

    def __enter__(self) -> "PoolWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_parquet(path: Path, table: "pa.Table") -> None:
    """Write a table as zstd parquet, atomically."""
    import pyarrow.parquet as pq

    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: the file, and what about it."""

    file: str
    problem: str


def check_pool(folder: Path) -> list[Fault]:
    """Everything that is wrong with the pool in `folder`: an empty list for a sound one, complete or not.

    Args:
        folder (`Path`):
            The pool's folder.

    Raises:
        ValueError: If there is no pool, or its manifest cannot be read.
    """
    manifest = PoolManifest.load(folder)
    prompts = folder / PROMPTS
    if not prompts.is_file():
        return [Fault(PROMPTS, "missing")]
    if manifest.prompts_blake2b and file_hash(prompts) != manifest.prompts_blake2b:
        return [Fault(PROMPTS, "its content is not what was written")]
    faults = [*broken_shards(folder, manifest, manifest.shards), *orphans(folder, manifest)]
    if len(ReferencePool(folder, manifest).prompt_ids) != manifest.num_prompts:
        faults.append(Fault(PROMPTS, f"not {manifest.num_prompts} prompts, as the manifest says"))
    return faults


def orphans(folder: Path, manifest: PoolManifest) -> list[Fault]:
    """Shards that the manifest does not name: a kill between writing a shard and naming it leaves one."""
    named = {shard.file for shard in manifest.shards}
    found = sorted(path.name for path in folder.glob("samples-*.parquet"))
    return [Fault(name, "not named by the manifest") for name in found if name not in named]


def broken_shards(folder: Path, manifest: PoolManifest, shards: Iterable[Shard], hashes: bool = True) -> list[Fault]:
    """Faults of the shards that the manifest names.

    Args:
        folder (`Path`):
            The pool's folder.
        manifest ([`PoolManifest`]):
            Its manifest.
        shards (`Iterable[Shard]`):
            Which shards to look at.
        hashes (`bool`, *optional*, defaults to `True`):
            Whether to read all content; without, only sizes and keys are checked.
    """
    prompt_ids = ReferencePool(folder, manifest).prompt_ids
    seen: set[int] = set()
    faults = []
    for shard in shards:
        problem = _broken_file(folder / shard.file, shard, hashes)
        if problem is None:
            problem = _broken_keys(folder / shard.file, shard, prompt_ids, manifest.slots, seen)
        if problem is None and hashes and manifest.has_logprobs:
            problem = _broken_logprobs(folder / shard.file)
        if problem is not None:
            faults.append(Fault(shard.file, problem))
    return faults


def _broken_file(path: Path, shard: Shard, hashes: bool) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size == 0:
        return "empty"
    if shard.bytes >= 0 and size != shard.bytes:
        return f"{size} bytes instead of {shard.bytes}"
    if hashes and file_hash(path) != shard.blake2b:
        return "its content is not what was written"
    return None


def _broken_keys(path: Path, shard: Shard, prompt_ids: list[str], slots: int, seen: set[int]) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(KEYS), schema=sample_schema())
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read: {error}"
    if table.num_rows != shard.rows:
        return f"{table.num_rows} rows instead of {shard.rows}"
    numbers = key_numbers(table, prompt_ids, slots).tolist()
    if min(numbers, default=0) < 0:
        return "holds samples of other prompts"
    keys = set(numbers)
    if len(keys) != len(numbers):
        return "holds a sample twice"
    if repeated := len(keys & seen):
        return f"repeats {repeated} samples of other shards"
    seen |= keys
    return None


def _broken_logprobs(path: Path) -> str | None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    compute: Any = pc
    table = pq.read_table(path, columns=["completion_ids", "logprobs"], schema=sample_schema())
    lengths = [compute.fill_null(compute.list_value_length(table[name]), -1) for name in table.column_names]
    return None if lengths[0].equals(lengths[1]) else "does not have a log-prob for every token"


def _refuse_nameless(folder: Path) -> None:
    shards = sorted(folder.glob("samples-*.parquet"))
    if shards:
        raise ValueError(
            f"`{folder}` holds {len(shards)} shards but no {MANIFEST}, so they cannot be identified. Restore {MANIFEST} from a "
            "copy, choose another --output_dir, or delete the folder."
        )


def _unused(place: Path) -> Path:
    number = 0
    while place.exists():
        number += 1
        place = place.with_name(f"{place.name.split('.parquet')[0]}.parquet.{number}")
    return place


def _refuse_changes(folder: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = [field for field in changed_fields(stored, asked) if field not in DESCRIPTIONS]
    if not changed:
        return
    lines = "\n".join(f"  {key}: {stored.get(key)!r} in the pool, {asked.get(key)!r} asked for" for key in changed)
    if changed == ["verifier"]:
        first = f"run `astarpo-rollout regrade {folder}`, which grades its samples with the present verifier"
    else:
        first = "continue it with its own settings"
    raise ValueError(
        f"The pool in `{folder}` was created with different settings:\n{lines}\nYou can (1) {first}, (2) choose another "
        "--output_dir, or (3) delete the folder."
    )
