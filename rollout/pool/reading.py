"""The reference pool: graded reference samples on disk, from which V* is computed.

A pool is a folder with `manifest.json`, `prompts.parquet` and `samples-*.parquet`. The manifest names every shard, and a
shard that it does not name does not exist, so a kill at any moment loses at most the shard being filled. V* is never stored:
it follows from the rewards at whatever `beta1` is asked for.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from ..values import optimal_values
from .summary import summarize

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROMPTS = "prompts.parquet"
KEYS = ("prompt_id", "sample_index")
FINGERPRINT = "astarpo_pool"
"""Under this name a data set's `info` holds the fingerprint of its pool."""
FILES = (MANIFEST, PROMPTS, "samples-*.parquet", "grades-*.parquet")
"""What makes up a pool, as patterns; a published pool holds no more."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the pool: one graded turn of one reference sample.

    Attributes:
        prompt_id (`str`):
            Id of its problem, see [`Problem`].
        sample_index (`int`):
            0 to N - 1; in pools of episodes of K roles, K·i + turn - 1 for episode i.
        seed (`int`):
            Seed that it was sampled with.
        completion_ids (`tuple[int, ...]`):
            Token ids, end-of-sequence included.
        text (`str`):
            The completion as text.
        finish_reason (`str`):
            `stop` or `length`; `none` for a turn that the episode did not come to.
        num_tokens (`int`):
            Length of `completion_ids`.
        outcome (`str`):
            The grader's outcome.
        reward (`float`, *optional*):
            The reward, `None` for no signal.
        role (`str`, *optional*, defaults to `"attempt"`):
            Role of the turn.
        turn (`int`, *optional*, defaults to `1`):
            Number of the role, from 1.
        parent (`int`, *optional*):
            `sample_index` of the turn before.
        logprobs (`tuple[float, ...]`, *optional*):
            The engine's log-prob in nats of each of `completion_ids`; None in a pool that does not keep them.
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
    role: str = "attempt"
    turn: int = 1
    parent: int | None = None
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A committed file of samples: its name, its rows, the blake2b of its content, its size in bytes."""

    file: str
    rows: int
    blake2b: str
    bytes: int = -1


@dataclass(frozen=True, slots=True)
class FailedSample:
    """A row that the engine could not sample. It is tried again whenever the pool is continued, after all others.

    Attributes:
        prompt_id (`str`):
            Id of its problem.
        sample_index (`int`):
            As in [`Sample`].
        reason (`str`):
            What the engine said.
        attempts (`int`):
            How often it failed.
    """

    prompt_id: str
    sample_index: int
    reason: str
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Regrade:
    """Grades that later ones replaced.

    Attributes:
        file (`str`):
            Parquet file with `prompt_id`, `sample_index`, `outcome` and `reward` as they were.
        verifier (`str`):
            The verifier that gave them.
    """

    file: str
    verifier: str


@dataclass(frozen=True, slots=True)
class PoolManifest:
    """What decides the samples of a pool, and which shards are committed.

    Attributes:
        fingerprint (`dict[str, Any]`):
            Everything that decides a sample: model, tokenizer, data, sampling, engine, verifier.
        num_samples (`int`):
            Samples (completions or episodes) per prompt, N.
        num_prompts (`int`):
            Number of prompts, P.
        shards (`tuple[Shard, ...]`):
            The committed shards.
        regrades (`tuple[Regrade, ...]`):
            Earlier grades, oldest first.
        failures (`tuple[FailedSample, ...]`):
            Rows that the engine could not sample.
        prompts_blake2b (`str`):
            Hash of the prompts' file.
        turns (`int`):
            Rows of a sample, K: 1, or the number of roles of an episode.
        schema_version (`int`):
            Version of this layout.
    """

    fingerprint: dict[str, Any]
    num_samples: int
    num_prompts: int
    shards: tuple[Shard, ...] = field(default=())
    regrades: tuple[Regrade, ...] = field(default=())
    failures: tuple[FailedSample, ...] = field(default=())
    prompts_blake2b: str = ""
    turns: int = 1
    schema_version: int = SCHEMA_VERSION

    @property
    def slots(self) -> int:
        """Rows per prompt, N·K."""
        return self.num_samples * self.turns

    @property
    def total(self) -> int:
        """Rows of the complete pool, P·N·K."""
        return self.num_prompts * self.slots

    @property
    def num_rows(self) -> int:
        """Number of committed rows."""
        return sum(shard.rows for shard in self.shards)

    @property
    def has_logprobs(self) -> bool:
        """Whether the samples keep the engine's log-probs."""
        return bool(self.fingerprint.get("logprobs"))

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return self.num_rows == self.total

    @property
    def is_settled(self) -> bool:
        """Whether every sample is there or recorded as failed, so that there is nothing left but to try again."""
        return self.num_rows + len(self.failures) == self.total

    @classmethod
    def load(cls, folder: Path) -> "PoolManifest":
        """Read the manifest of the pool in `folder`; raises `ValueError` when there is none that can be read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"`{folder}` is not a reference pool: it has no {MANIFEST}. Make one with `astarpo-rollout --output_dir "
                f"{folder} ...`."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The manifest of the pool in `{folder}` cannot be read ({error}). Restore {MANIFEST} from a copy: without it, "
                "whole samples cannot be told from broken ones."
            ) from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"The pool in `{folder}` has layout version {version}, this astarpo reads {SCHEMA_VERSION}. Use the astarpo "
                "that wrote it, or sample again into another folder."
            )
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        regrades = tuple(Regrade(**regrade) for regrade in content.pop("regrades", ()))
        failures = tuple(FailedSample(**failure) for failure in content.pop("failures", ()))
        for file in (one.file for one in (*shards, *regrades)):
            if file != Path(file).name:  # a pool may be a stranger's
                raise ValueError(
                    f"The manifest of the pool in `{folder}` names `{file}`, which is not a file of the pool. Do not use this pool."
                )
        return cls(**content, shards=shards, regrades=regrades, failures=failures)

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
        """Open the pool in folder `path`, or a published one by its hub id; raises `ValueError` when there is none."""
        folder = Path(path)
        if not folder.exists() and str(path).count("/") == 1 and not str(path).startswith((".", "/")):
            folder = fetch_pool(str(path))
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

    def read_keys(self, *columns: str) -> "pa.Table":
        """The key columns and `columns`, with the prompts' ids as a dictionary: a few bytes a row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [*KEYS, *columns]
        tables = [
            pq.read_table(self.folder / shard.file, columns=names, read_dictionary=["prompt_id"])
            for shard in self.manifest.shards
        ]
        return pa.concat_tables(tables) if tables else sample_schema().empty_table().select(names)

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
    def prompt_ids(self) -> list[str]:
        """Ids of all prompts, in the pool's order."""
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / PROMPTS, columns=["prompt_id"])["prompt_id"].to_pylist()

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return self.manifest.is_complete

    @property
    def num_rows(self) -> int:
        """Number of committed rows."""
        return self.manifest.num_rows

    def present(self) -> "np.ndarray":
        """Which rows are there: booleans of shape (P, N·K). Reads the key columns only."""
        import numpy as np

        shape = (self.manifest.num_prompts, self.manifest.slots)
        numbers = key_numbers(self.read_keys(), self.prompt_ids, self.manifest.slots)
        present = np.zeros(shape, dtype=bool)
        present.reshape(-1)[numbers[numbers >= 0]] = True
        return present

    def reward_matrix(self) -> "np.ndarray":
        """Rewards of the first turns, shape (P, N); NaN for no signal or a failed sample.

        Raises:
            ValueError: If samples are missing.
        """
        return self.turn_rewards()[:, :, 0]

    def turn_rewards(self) -> "np.ndarray":
        """Rewards of every turn, shape (P, N, K); NaN for no signal, a failed sample, or a turn that was not reached.

        Raises:
            ValueError: If samples are missing.
        """
        import numpy as np

        if not self.manifest.is_settled:
            raise ValueError(
                f"The pool in `{self.folder}` has {self.num_rows} of "
                f"{self.manifest.total} samples. Run the same `astarpo-rollout` command "
                "again to finish it."
            )
        table = self.read_keys("reward")
        numbers = key_numbers(table, self.prompt_ids, self.manifest.slots)
        if len(np.unique(numbers[numbers >= 0])) != len(numbers):
            raise ValueError(
                f"The pool in `{self.folder}` has foreign or repeated rows. `astarpo-rollout verify {self.folder}` names the "
                "shards; the `astarpo-rollout` command that made the pool replaces them."
            )
        rewards = np.full(self.manifest.total, np.nan)
        rewards[numbers] = table["reward"].to_numpy()
        return rewards.reshape(self.manifest.num_prompts, self.manifest.num_samples, self.manifest.turns)

    def rewards(self) -> dict[str, list[float | None]]:
        """The N rewards of each prompt id, in the order of the samples."""
        rows = self.reward_matrix().tolist()
        rewards = [[None if reward != reward else reward for reward in row] for row in rows]
        return dict(zip(self.prompt_ids, rewards, strict=True))

    def values(self, beta1: float) -> dict[str, float]:
        """V* of each prompt id at `beta1`, from the samples that have signal; NaN where none has."""
        import torch

        values = optimal_values(torch.from_numpy(self.reward_matrix()), beta1)
        return dict(zip(self.prompt_ids, values.tolist(), strict=True))

    def to_dataset(self) -> "Dataset":
        """A data set for [`AStarPOTrainer`]: `prompt`, `solution`, `reference_rewards` and `prompt_id`.

        Prompts are messages, or text where they were sampled as text. What the pool was made with travels in `info.description`,
        where [`fingerprint_of_dataset`] finds it.
        """
        from datasets import Dataset, DatasetInfo

        rewards = self.rewards()
        is_text = bool(self.manifest.fingerprint.get("text_prompts"))
        rows = []
        for row in self.prompts.to_pylist():
            messages = json.loads(row["prompt"])
            rows.append(
                {
                    "prompt": messages[-1]["content"] if is_text else messages,
                    "solution": row["solution"],
                    "reference_rewards": rewards[row["prompt_id"]],
                    "prompt_id": row["prompt_id"],
                }
            )
        description = json.dumps({FINGERPRINT: self.manifest.fingerprint})
        return Dataset.from_list(rows, info=DatasetInfo(description=description))

    def summary(self) -> dict[str, Any]:
        """Counts, solve rates, pass@k, lengths and the spread of V*, as plain data; see `summary.py`."""
        return summarize(self)


def fingerprint_of_dataset(dataset: Any) -> dict[str, Any] | None:
    """What the pool was made with that [`ReferencePool.to_dataset`] made a data set of; None for other data sets."""
    description = getattr(getattr(dataset, "info", None), "description", None)
    try:
        return json.loads(description)[FINGERPRINT] if description else None
    except (ValueError, KeyError, TypeError):
        return None


def fetch_pool(repo_id: str, revision: str | None = None) -> Path:
    """Fetch a published pool into the hub's cache; returns its folder there.

    Raises:
        ValueError: If there is none, or the hub is switched off and the cache does not have it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(FILES)))
    except Exception as error:
        raise ValueError(
            f"`{repo_id}` is neither a folder here nor could it be fetched from the hub as a data set "
            f"({type(error).__name__}). Check the path or the id, and the network."
        ) from error


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
            ("role", pa.string()),  # this and what follows: null in pools that are older
            ("turn", pa.int32()),
            ("parent", pa.int32()),
            ("logprobs", pa.list_(pa.float32())),
        ]
    )


def key_numbers(table: "pa.Table", prompt_ids: Sequence[str], slots: int) -> "np.ndarray":
    """A number for each row of a table with the key columns. Pools have millions of rows, so these are arrays.

    Args:
        table (`pa.Table`):
            Rows with `prompt_id` and `sample_index`.
        prompt_ids (`Sequence[str]`):
            Ids of all P prompts, in the pool's order.
        slots (`int`):
            Rows per prompt, N·K.

    Returns:
        `np.ndarray` of shape (rows,): `position · N·K + sample_index`, in [0, P·N·K); -1 for a key that is not of this pool.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    compute: Any = pc
    column = table["prompt_id"]
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries()
    if column.num_chunks == 0:
        return np.zeros(0, dtype=np.int64)
    # Strings are looked up once each, not once per row.
    found = compute.index_in(column.chunk(0).dictionary, value_set=pa.array(prompt_ids, type=pa.string()))
    lookup = np.append(np.asarray(compute.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64), -1)
    codes = [compute.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in column.chunks]
    positions = lookup[np.concatenate(codes)]
    indices = np.asarray(compute.fill_null(table["sample_index"], -1).to_numpy(), dtype=np.int64)
    valid = (positions >= 0) & (indices >= 0) & (indices < slots)
    return np.where(valid, positions * slots + indices, -1)


def rewards_tensor(rewards: Sequence[Sequence[float | None]]) -> Any:
    """Rewards as a float64 tensor of shape (P, N), NaN for no signal."""
    import torch

    rows = [[float("nan") if reward is None else reward for reward in row] for row in rewards]
    return torch.tensor(rows, dtype=torch.float64)
