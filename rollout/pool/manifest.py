"""What a pool is on disk: rows, shards, and the manifest that makes a shard exist."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json

if TYPE_CHECKING:
    import pyarrow as pa

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
            0 to N - 1; in pools of episodes of K turns K·i + turn - 1 for episode i.
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
        role (`str`, *optional*, defaults to `"attempt"`):
            What the turn was for; in pools of episodes `attempt`, `verify` or `revise`.
        turn (`int`, *optional*, defaults to `1`):
            Its number in the episode, from 1.
        parent (`int`, *optional*):
            `sample_index` of the turn before.
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


def final_reward(reward: float | None, finish_reason: str, require_eos: bool) -> float | None:
    """The reward that a sample earns: 0 when it was cut at the length limit and `require_eos` holds; no signal stays none."""
    return 0.0 if reward is not None and require_eos and finish_reason == "length" else reward


@dataclass(frozen=True, slots=True)
class Shard:
    """A committed file of samples: its name, its rows, the blake2b of its content, its size in bytes."""

    file: str
    rows: int
    blake2b: str
    bytes: int = -1


@dataclass(frozen=True, slots=True)
class FailedSample:
    """A sample that the engine could not draw; tried again whenever the pool is continued, after all others.

    Attributes:
        prompt_id (`str`):
            Id of its problem.
        sample_index (`int`):
            0 to N - 1.
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
            Number of prompts.
        shards (`tuple[Shard, ...]`):
            The committed shards.
        regrades (`tuple[Regrade, ...]`):
            Earlier grades, oldest first.
        failures (`tuple[FailedSample, ...]`):
            Samples that the engine could not draw.
        prompts_blake2b (`str`):
            Hash of the prompts' file.
        turns (`int`):
            Rows of a sample, K: 1, or the turns of an episode.
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
        """Number of committed samples."""
        return sum(shard.rows for shard in self.shards)

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has all its samples."""
        return self.num_rows == self.total

    @property
    def is_settled(self) -> bool:
        """Whether every sample is there or recorded as failed: what is left can only be tried again."""
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
                f"The manifest of the pool in `{folder}` cannot be read ({error}). Restore {MANIFEST} from a copy; without "
                "it nobody knows which samples are whole."
            ) from error
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"The pool in `{folder}` has layout version {version}, this astarpo reads {SCHEMA_VERSION}. Use the astarpo "
                "that wrote it, or sample again into another folder."
            )
        shards = tuple(Shard(**shard) for shard in content.pop("shards"))
        regrades = tuple(Regrade(**regrade) for regrade in content.pop("regrades", ()))
        failures = tuple(FailedSample(**failure) for failure in content.pop("failures", ()))
        return cls(**content, shards=shards, regrades=regrades, failures=failures)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        write_json(folder / MANIFEST, asdict(self))


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
        ]
    )
