"""The reference pool: the rewards of reference samples on disk, from which V* is computed.

A pool is a folder with `manifest.json`, `prompts.parquet` and `samples-*.parquet`. The manifest names every shard,
and a shard that it does not name does not exist, so a kill at any moment loses at most the shard being filled. V*
is never stored: it follows from the rewards at whatever `beta1` is asked for.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..values import optimal_values
from .keys import KEYS, key_numbers
from .manifest import PROMPTS, PoolManifest, sample_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset


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
            from .hub import fetch_pool

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
        """Number of committed samples."""
        return self.manifest.num_rows

    def present(self) -> "np.ndarray":
        """Which rows are there: booleans of shape (P, N), or (P, N·K). Reads the key columns only."""
        import numpy as np

        shape = (self.manifest.num_prompts, self.manifest.slots)
        numbers = key_numbers(self.read_keys(), self.prompt_ids, self.manifest.slots)
        present = np.zeros(shape, dtype=bool)
        present.reshape(-1)[numbers[numbers >= 0]] = True
        return present

    def reward_matrix(self) -> "np.ndarray":
        """Rewards of shape (P, N), NaN for no signal or a failed sample; of episodes those of the attempts.

        Raises:
            ValueError: If samples are missing.
        """
        return self.turn_rewards()[:, :, 0]

    def turn_rewards(self) -> "np.ndarray":
        """Rewards of every turn, shape (P, N, K): whether the attempt, the verdict and the revision are right. NaN for a turn
        that was not reached, too.

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
        """Counts, solve rates, pass@k, lengths and the spread of V*, as plain data; see `summary.py`."""
        from .summary import summarize

        return summarize(self)


def rewards_tensor(rewards: Sequence[Sequence[float | None]]) -> Any:
    """Rewards as a float64 tensor of shape (P, N), NaN for no signal."""
    import torch

    rows = [[float("nan") if reward is None else reward for reward in row] for row in rewards]
    return torch.tensor(rows, dtype=torch.float64)
