"""Creating and continuing a pool."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..data import Problem
from ..files import file_hash, write_atomically
from ..fingerprint import changed_fields
from .checking import Fault, broken_shards, orphans
from .lock import PoolLock
from .manifest import MANIFEST, PROMPTS, FailedSample, PoolManifest, Sample, Shard, sample_schema
from .reading import ReferencePool

if TYPE_CHECKING:
    import pyarrow as pa

QUARANTINE = "quarantine"
HASH_BYTES = 2**30
"""Pools up to this size are read in full when they are continued; of larger ones only sizes and keys are checked."""
MERGE_SHARDS, MERGED_ROWS = 64, 16_384
"""So many shards below so many rows are merged into one, since opening a file costs more than reading it."""


class PoolWriter:
    """A pool opened for appending, under its lock; creates it, or continues it when the fingerprint is the same.

    Shards that are broken are moved to `quarantine/`, named on stderr, and count as not sampled.

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
            Rows of a sample: the turns of an episode, which are committed together.

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
        self._lock = PoolLock(folder)
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
        drawn = {(sample.prompt_id, sample.sample_index) for sample in samples}
        failures = (f for f in self.manifest.failures if (f.prompt_id, f.sample_index) not in drawn)
        self._name(shard, shards=(*self.manifest.shards, shard), failures=tuple(failures))
        for sample in samples:
            self.present[self._position[sample.prompt_id], sample.sample_index] = True
        self._merge_small()

    def record_failures(self, failed: Sequence[tuple[str, int, str]]) -> None:
        """Remember samples that the engine could not draw: (prompt_id, sample_index, reason)."""
        failures = {(f.prompt_id, f.sample_index): f for f in self.manifest.failures}
        for prompt_id, sample_index, reason in failed:
            earlier = failures.get((prompt_id, sample_index))
            attempts = earlier.attempts + 1 if earlier else 1
            failures[prompt_id, sample_index] = FailedSample(prompt_id, sample_index, reason, attempts)
        self._save(failures=tuple(failures.values()))

    def _name(self, shard: Shard, **changes: Any) -> None:
        """Save a manifest that names a new shard; a shard that did not get its name (a full disk) is only in the way."""
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
        if len(small) < MERGE_SHARDS:
            return
        try:
            self._merge(small)
        except OSError as error:  # a full disk: the rows are safe in their small shards
            print(f"{self.folder}: small shards are not merged ({error})", file=sys.stderr)

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
        """The prompts are an input: a broken file of them is written again (the fingerprint vouches for the content)."""
        path = self.folder / PROMPTS
        if not path.is_file() or file_hash(path) != self.manifest.prompts_blake2b:
            print(f"{path} was missing or changed; it is written again", file=sys.stderr)
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
            print(f"{self.folder / fault.file}: {fault.problem}; moved to {QUARANTINE}/", file=sys.stderr)
        if lost:
            kept = [shard for shard in shards if shard.file not in lost]
            rows = sum(shard.rows for shard in shards) - sum(shard.rows for shard in kept)
            print(f"{rows} samples of {len(lost)} broken shards will be sampled again", file=sys.stderr)
            self._save(shards=tuple(kept))

    def close(self) -> None:
        """Give the pool's lock back."""
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


def _refuse_nameless(folder: Path) -> None:
    shards = sorted(folder.glob("samples-*.parquet"))
    if shards:
        raise ValueError(
            f"`{folder}` holds {len(shards)} shards but no {MANIFEST}, so nobody knows what they are. Restore {MANIFEST} from a "
            "copy, choose another --output_dir, or delete the folder."
        )


def _unused(place: Path) -> Path:
    number = 0
    while place.exists():
        number += 1
        place = place.with_name(f"{place.name.split('.parquet')[0]}.parquet.{number}")
    return place


def _refuse_changes(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = changed_fields(stored, wanted)
    if not changed:
        return
    lines = "\n".join(f"  {key}: {stored.get(key)!r} in the pool, {wanted.get(key)!r} asked for" for key in changed)
    verifier = changed == ["verifier"]
    first = (
        f"run `astarpo-rollout regrade {folder}`, which grades its samples with the present verifier"
        if verifier
        else "continue it with its own settings"
    )
    raise ValueError(
        f"The pool in `{folder}` was made otherwise:\n{lines}\nThree ways on: {first}; choose another --output_dir; or delete "
        "the folder."
    )
