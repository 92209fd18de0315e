"""What an engine is: token ids in, completions with log-probs out.

`VLLMEngine` is one; anything else with these methods is another. The policy reaches an engine through a `PolicyLink`
(`policy_link.py`); without one, the engine samples the reference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class FinishReason(StrEnum):
    """Why a completion ended. The values double as metric names."""

    STOP = "stop"
    """The model ended it with an end-of-sequence token, which is the last of `token_ids`."""
    LENGTH = "length"
    """It was cut at the length limit."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How completions are drawn. There is no top_p and no top_k: samples must come from the scored distribution.

    Attributes:
        max_completion_length (`int`):
            Most tokens of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            0 is greedy.
        logprobs (`bool`, *optional*, defaults to `True`):
            Whether completions carry log-probs, which cost a few percent.
    """

    max_completion_length: int
    temperature: float = 1.0
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids (`tuple[int, ...]`):
            The tokens, end-of-sequence included.
        logprobs (`tuple[float, ...]`):
            Log-probability in nats of each token under the distribution it was drawn from; empty when not asked for.
        finish_reason (`FinishReason`):
            Why it ended.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Failure:
    """A prompt that the engine could not sample, while it goes on with the others; `reason` says why."""

    reason: str


class EngineError(RuntimeError):
    """The engine failed, and not because of one prompt.

    Args:
        message (`str`):
            What happened.
        in_flight (`tuple[int, ...]`):
            Indices of the prompts that were being sampled.
    """

    def __init__(self, message: str, in_flight: tuple[int, ...] = ()):
        super().__init__(message)
        self.in_flight = in_flight


class PolicyLink(Protocol):
    """One way by which the trainer's policy reaches an engine."""

    def sync(self) -> bool:
        """Make the engine's copy, where it has one, equal to the policy. Returns whether anything had changed."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """A context in which the engine computes with the policy; yields what requests must carry, or None."""
        ...

    def close(self) -> None:
        """Leave the engine as it was found."""
        ...


class OwnAdapter:
    """The adapter that an engine was started with, as its policy: nothing to bring, nothing to undo."""

    def sync(self) -> bool:
        """It never changes."""
        return False

    def active(self) -> AbstractContextManager[Any]:
        """The engine switches it on by itself."""
        return nullcontext()

    def close(self) -> None:
        """Nothing to undo."""


class Engine(Protocol):
    """Samples completions."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt, yielding (index, completion) in the order they finish.

        A prompt that makes the engine fail is yielded as a [`Failure`] and costs none of the others.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids, one sequence per completion wanted; repeat a prompt to sample it several times.
            seeds (`Sequence[int]`):
                One seed per prompt.
            settings ([`SamplingSettings`]):
                How to sample.
            policy ([`PolicyLink`], *optional*):
                The policy to sample; the reference when not given.

        Raises:
            EngineError: If the engine fails on whatever it is given.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: SamplingSettings,
    policy: PolicyLink | None = None,
    on_finished: Callable[[], None] = lambda: None,
) -> list[Completion]:
    """Sample one completion per prompt and return them in the prompts' order; `EngineError` if one cannot be sampled.

    `on_finished` is called after each.
    """
    finished: dict[int, Completion] = {}
    for index, completion in engine.stream(prompts, seeds, settings, policy):
        on_finished()
        if isinstance(completion, Failure):
            raise EngineError(f"The engine could not sample prompt {index}: {completion.reason}", (index,))
        finished[index] = completion
    return [finished[index] for index in range(len(prompts))]
