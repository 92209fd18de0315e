"""How long a run takes, stage by stage: tokens, over tokens a second.

The tokens follow from the recipe. The speeds were measured by `astarpo calibrate` on the machine, or are estimated from what the maker of
a card says of it, which no GPU has confirmed yet.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import formulas
from .cards import Card
from .plan import RunSizes
from .shape import ModelShape

BANDWIDTH_USED = 0.6
"""Share of a card's bandwidth that decoding reaches. Estimate."""
FLOPS_USED = 0.2
"""Share of a card's arithmetic that training reaches. Estimate."""
LAUNCHING = {"vllm": 1e-3, "graphs": 0.0, "transformers": 3e-3}
"""Seconds that the host takes to launch one block of a decoding step; replayed graphs launch nothing. Estimates."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens a second of one machine with one model.

    Attributes:
        sampling (`float`):
            Completion tokens that the engine samples.
        learning (`float`):
            Tokens of prompt and completion that the reference scores and the policy learns from.
        source (`str`):
            Where this is from.
        prompt_tokens (`float`, *optional*):
            Mean length of the prompts that were measured.
        completion_tokens (`float`, *optional*):
            Mean length of the completions that were measured.
    """

    sampling: float
    learning: float
    source: str
    prompt_tokens: float | None = None
    completion_tokens: float | None = None

    @classmethod
    def read(cls, path: str) -> "Speeds":
        """The speeds in a file of `astarpo calibrate`.

        Raises:
            ValueError: If there is no such file, or something else is in it.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            speeds = cls(**{name: content[name] for name in cls.__slots__})
            if min(speeds.sampling, speeds.learning) <= 0:
                raise ValueError("speeds must be positive")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`{path}` is not a file of `astarpo calibrate` ({error}). Make one, or leave --speeds out."
            ) from error
        return speeds

    def write(self, path: str) -> None:
        """Write them to a file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Work:
    """What a run does.

    Attributes:
        problems (`int`):
            Problems of stage 1.
        num_samples (`int`):
            Reference samples of each.
        updates (`int`):
            Updates of stage 2.
        completions (`int`):
            Completions of an update.
        prompt_tokens (`float`):
            Mean tokens of a prompt.
        completion_tokens (`float`):
            Mean tokens of a completion; of an episode, all its turns.
        evaluated (`int`):
            Problems of an evaluation.
    """

    problems: int
    num_samples: int
    updates: int
    completions: int
    prompt_tokens: float
    completion_tokens: float
    evaluated: int


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: the tokens that are sampled in it, its seconds, and what makes it shorter."""

    name: str
    tokens: float
    seconds: float
    shorter: str

    def to_json(self) -> dict[str, Any]:
        """The stage as plain data."""
        return {"name": self.name, "tokens": round(self.tokens), "hours": round(self.seconds / 3600, 3)}


def estimate_speeds(card: Card, shape: ModelShape, sizes: RunSizes, tokens: float, name: str) -> Speeds:
    """Speeds from a card's specification.

    A decoding step reads the weights and all keys and values once, and its blocks are launched one after the other: the slower of the
    two decides. A token that is learnt from costs 2 operations a weight for the reference, 2 forward, 2 backward through frozen weights or
    4 through trained ones, and 2 where blocks are computed again.

    Args:
        card ([`Card`]):
            The GPU.
        shape ([`ModelShape`]):
            The model.
        sizes ([`RunSizes`]):
            As planned: how many completions are decoded at once, checkpointing, the engine.
        tokens (`float`):
            Mean tokens of prompt and completion.
        name (`str`):
            The card's name, for the report.
    """
    rows = sizes.max_num_seqs or 64
    read = formulas.weights(shape, sizes.width) + rows * tokens * formulas.key_values_per_token(shape, sizes.width)
    how = "graphs" if sizes.cuda_graphs and sizes.engine == "vllm" else sizes.engine
    step = max(read / (BANDWIDTH_USED * card.bandwidth), shape.layers * LAUNCHING[how])
    operations = 2 + 2 + (4 if sizes.rank is None else 2) + (2 if sizes.gradient_checkpointing else 0)
    learning = FLOPS_USED * card.flops / (operations * shape.parameters)
    source = f"roughly estimated from the specification of a {name}; `astarpo calibrate` measures your machine"
    return Speeds(rows / step, learning, source)


def stages(work: Work, speeds: Speeds) -> tuple[Stage, ...]:
    """The stages of a run, in order."""
    row = work.prompt_tokens + work.completion_tokens
    reference = work.problems * work.num_samples * work.completion_tokens
    sampled = work.updates * work.completions * work.completion_tokens
    learnt = work.updates * work.completions * row
    evaluated = work.evaluated * work.completion_tokens
    return (
        Stage(
            f"stage 1, {work.problems:,} problems × {work.num_samples} samples",
            reference,
            reference / speeds.sampling,
            "fewer samples (--num_samples 4) or problems (--limit); a pool that is there costs nothing",
        ),
        Stage(
            f"stage 2, {work.updates:,} updates × {work.completions} completions",
            sampled,
            sampled / speeds.sampling + learnt / speeds.learning,
            "fewer updates (--max_steps), or smaller ones (--gradient_accumulation_steps)",
        ),
        Stage(
            f"evaluation, {work.evaluated:,} problems, before and after",
            2 * evaluated,
            2 * evaluated / speeds.sampling,
            "fewer problems (astarpo eval --limit)",
        ),
    )
