"""The reference pool: the rewards of reference samples on disk, from which V* is computed.

A pool is a folder with `manifest.json`, `prompts.parquet` and `samples-*.parquet`. The manifest names every shard,
and a shard that it does not name does not exist, so a kill at any moment loses at most the shard being filled. V*
is never stored: it follows from the rewards at whatever `beta1` is asked for.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Problem
from .files import file_hash, write_atomically, write_json
from .values import optimal_values

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.parquet"


@dataclass(frozen=True, slots=True)
class Sample:
    """One graded reference sample: a row of the pool.

    Attributes:
        prompt_id (`str`):
            Id of its problem, see [`Problem`].
        sample_index (`int`):
            0 to N - 1.
        seed (`int`):
            Seed it was drawn with.
        completion_ids (`tuple[int, ...]`):
            Token ids, end-of-sequence included.
        text (`str`):
            The completion as text.
        finish_reason (`str`):
            `stop` or `length`.
        num_tokens (`int`):
            Length of `completion_ids`.
        outcome (`str`):
            The verifier's outcome.
        reward (`float`, *optional*):
            The reward, `None` for no signal.
    """

    prompt_id: str
    sample_index: int
    seed: int
    completion_ids: tuple[int, ...]
    text: str
    finish_reason: str
    num_tokens: int
    outcome: str
    reward: float | None


@dataclass(frozen=True, slots=True)
class Shard:
    """A committed file of samples: its name, its rows and the blake2b of its content."""

    file: str
    rows: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class PoolManifest:
    """What decides the samples of a pool, and which shards are committed.

    Attributes:
        fingerprint (`dict[str, Any]`):
            Everything that decides a sample: model, tokenizer, data, sampling, engine, verifier.
        num_samples (`int`):
            Samples per prompt, N.
        num_prompts (`int`):
            Number of prompts.
        shards (`tuple[Shard, ...]`):
            The committed shards.
        schema_version (`int`):
            Version of this layout.
    """

    fingerprint: dict[str, Any]
    num_samples: int
    num_prompts: int
    shards: tuple[Shard, ...] = field(default=())
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, folder: Path) -> "PoolManifest":
        """Read the manifest of the pool in `folder`."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"`{folder}` is not a reference pool: it has no {MANIFEST}. Make one with `astarpo-rollout --output_dir "
                f"{folder} ...`."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"The pool in `{folder}` has layout version {content['schema_version']}, this astarpo reads "
                f"{SCHEMA_VERSION}. Use the astarpo that wrote it, or sample again into another folder."
            )
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        return cls(**content, shards=shards)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        write_json(folder / MANIFEST, asdict(self))


class ReferencePool:
    """A pool opened for reading.

    Args:
        folder (`Path`):
            The pool's folder.
        manifest ([`PoolManifest`]):
            Its manifest.
    """

    def __init__(self, folder: Path, manifest: PoolManifest):
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "ReferencePool":
        """Open the pool in folder `path`; raises `ValueError` when there is none."""
        folder = Path(path)
        return cls(folder, PoolManifest.load(folder))

    def read(self, columns: Sequence[str] | None = None) -> "pa.Table":
        """The samples as a table, all columns or only `columns`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = [
            pq.read_table(self.folder / shard.file, columns=list(columns) if columns else None, schema=sample_schema())
            for shard in self.manifest.shards
        ]
        if tables:
            return pa.concat_tables(tables)
        empty = sample_schema().empty_table()
        return empty.select(list(columns)) if columns else empty

    @property
    def samples(self) -> "pa.Table":
        """All samples, one row per (prompt_id, sample_index)."""
        return self.read()

    @property
    def prompts(self) -> "pa.Table":
        """The problems: `prompt_id`, `prompt` (messages as JSON) and `solution` (the gold answer)."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / PROMPTS)

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return self.num_rows == self.manifest.num_prompts * self.manifest.num_samples

    @property
    def num_rows(self) -> int:
        """Number of committed samples."""
        return sum(shard.rows for shard in self.manifest.shards)

    def rewards(self) -> dict[str, list[float | None]]:
        """The N rewards of each prompt id, in the order of the samples."""
        if not self.is_complete:
            raise ValueError(
                f"The pool in `{self.folder}` has {self.num_rows} of "
                f"{self.manifest.num_prompts * self.manifest.num_samples} samples. Run the same `astarpo-rollout` command "
                "again to finish it."
            )
        table = self.read(["prompt_id", "sample_index", "reward"])
        rewards: dict[str, list[float | None]] = {
            prompt_id: [None] * self.manifest.num_samples for prompt_id in self.prompts["prompt_id"].to_pylist()
        }
        columns = (table[name].to_pylist() for name in ("prompt_id", "sample_index", "reward"))
        for prompt_id, index, reward in zip(*columns, strict=True):
            rewards[prompt_id][index] = reward
        return rewards

    def values(self, beta1: float) -> dict[str, float]:
        """V* of each prompt id at `beta1`; NaN where no sample has signal."""
        rewards = self.rewards()
        values = optimal_values(rewards_tensor(list(rewards.values())), beta1)
        return dict(zip(rewards, values.tolist(), strict=True))

    def to_dataset(self) -> "Dataset":
        """A data set for [`AStarPOTrainer`]: `prompt`, `solution`, `reference_rewards` and `prompt_id`."""
        from datasets import Dataset

        rewards = self.rewards()
        return Dataset.from_list(
            [
                {
                    "prompt": json.loads(row["prompt"]),
                    "solution": row["solution"],
                    "reference_rewards": rewards[row["prompt_id"]],
                    "prompt_id": row["prompt_id"],
                }
                for row in self.prompts.to_pylist()
            ]
        )

    def summary(self) -> dict[str, Any]:
        """Counts, solve rates and lengths of the pool, as plain data."""
        table = self.read(["reward", "num_tokens", "finish_reason", "outcome"])
        rewards = [reward for reward in table["reward"].to_pylist() if reward is not None]
        lengths = table["num_tokens"].to_pylist()
        per_prompt = [[r or 0.0 for r in row] for row in self.rewards().values()] if self.is_complete else []
        return {
            "num_prompts": self.manifest.num_prompts,
            "num_samples": self.manifest.num_samples,
            "rows": self.num_rows,
            "mean_reward": sum(rewards) / len(rewards) if rewards else None,
            "never_solved": _share(sum(row) == 0 for row in per_prompt),
            "always_solved": _share(min(row) > 0 for row in per_prompt),
            "mean_tokens": sum(lengths) / len(lengths) if lengths else None,
            "finish_reasons": dict(Counter(table["finish_reason"].to_pylist())),
            "outcomes": dict(Counter(table["outcome"].to_pylist())),
        }


def _share(flags: Any) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def rewards_tensor(rewards: Sequence[Sequence[float | None]]) -> Any:
    """Rewards as a float64 tensor of shape (P, N), NaN for no signal."""
    import torch

    rows = [[float("nan") if reward is None else reward for reward in row] for row in rewards]
    return torch.tensor(rows, dtype=torch.float64)


def sample_schema() -> "pa.Schema":
    """Arrow schema of a shard."""
    import pyarrow as pa

    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("sample_index", pa.int32()),
            ("seed", pa.int64()),
            ("completion_ids", pa.list_(pa.int32())),
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            ("num_tokens", pa.int32()),
            ("outcome", pa.string()),
            ("reward", pa.float64()),
        ]
    )


class PoolWriter:
    """A pool opened for appending; creates it, or continues it when the fingerprint is the same.

    Args:
        folder (`Path`):
            The pool's folder.
        problems (`Sequence[Problem]`):
            All problems of the pool.
        num_samples (`int`):
            Samples per prompt.
        fingerprint (`dict[str, Any]`):
            Everything that decides a sample.

    Raises:
        ValueError: If the folder holds a pool with another fingerprint; the message shows what differs.
    """

    def __init__(self, folder: Path, problems: Sequence[Problem], num_samples: int, fingerprint: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            self.manifest = PoolManifest.load(folder)
            _refuse_changes(folder, self.manifest.fingerprint, fingerprint)
        else:
            self.manifest = PoolManifest(fingerprint, num_samples, len(problems))
            self._write_prompts(problems)
            self.manifest.save(folder)
        keys = ReferencePool(folder, self.manifest).read(["prompt_id", "sample_index"])
        self.done = set(zip(keys["prompt_id"].to_pylist(), keys["sample_index"].to_pylist(), strict=True))

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return ReferencePool(self.folder, self.manifest).is_complete

    def _write_prompts(self, problems: Sequence[Problem]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "prompt_id": problem.prompt_id,
                "prompt": json.dumps(list(problem.messages), ensure_ascii=False),
                "solution": problem.gold,
            }
            for problem in problems
        ]
        table = pa.Table.from_pylist(rows)
        write_atomically(self.folder / PROMPTS, lambda path: pq.write_table(table, path, compression="zstd"))

    def commit(self, samples: Sequence[Sample]) -> None:
        """Write `samples` as one shard: the file first, then the manifest that makes it exist."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not samples:
            return
        name = f"samples-{len(self.manifest.shards):05d}.parquet"
        table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=sample_schema())
        write_atomically(self.folder / name, lambda path: pq.write_table(table, path, compression="zstd"))
        shard = Shard(name, len(samples), file_hash(self.folder / name))
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        self.manifest.save(self.folder)
        self.done.update((sample.prompt_id, sample.sample_index) for sample in samples)


def _refuse_changes(folder: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [key for key in sorted(stored.keys() | wanted.keys()) if stored.get(key) != wanted.get(key)]
    if changed:
        lines = "\n".join(
            f"  {key}: {stored.get(key)!r} in the pool, {wanted.get(key)!r} asked for" for key in changed
        )
        raise ValueError(
            f"The pool in `{folder}` was made otherwise:\n{lines}\nContinue it with its own settings, choose another "
            "--output_dir, or delete the folder."
        )
