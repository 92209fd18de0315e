"""What is wrong with a pool: every shard's hash, rows and keys."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..files import file_hash
from .keys import KEYS, key_numbers
from .manifest import PROMPTS, PoolManifest, Shard, sample_schema
from .reading import ReferencePool


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
