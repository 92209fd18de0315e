"""What an engine is: token ids in, completions with log-probs out.

Every engine has the methods and sizes of [`Engine`], so that jobs and the trainer never ask which one they hold. The policy
reaches an engine through a [`PolicyLink`] (`policy_link.py`); without one, the engine samples the reference.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any, Protocol


class FinishReason(StrEnum):
    """Why a completion ended. The values double as metric names."""

    STOP = "stop"
    """The model ended it with an end-of-sequence token, which is the last of `token_ids`."""
    LENGTH = "length"
    """It was truncated at the length limit."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How completions are sampled.

    Reference samples and completions in training must come from the distribution that the trainer scores, so there is no top_k, and
    `top_p` is for evaluations alone.

    Attributes:
        max_completion_length (`int`):
            Most tokens of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            0 is greedy.
        logprobs (`bool`, *optional*, defaults to `True`):
            Whether completions carry log-probs, which cost a few percent of the speed.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the smallest set of tokens whose chance is at least this.
    """

    max_completion_length: int
    temperature: float = 1.0
    logprobs: bool = True
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}.")


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids (`tuple[int, ...]`):
            The tokens, end-of-sequence included.
        logprobs (`tuple[float, ...]`):
            Log-probability in nats of each token under the distribution it was sampled from; empty when not asked for.
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
    """One way by which the policy reaches an engine."""

    def sync(self) -> bool:
        """Make the engine's copy of the policy, where it has one, equal to the policy.

        Returns:
            `bool`: Whether the policy has changed since the last call, so that the engine must forget what it cached.
        """
        ...

    def active(self) -> AbstractContextManager[Any]:
        """A context in which the engine computes with the policy; it yields what requests must carry, or None."""
        ...

    def close(self) -> None:
        """Leave the engine as it was before the link."""
        ...


class OwnModelLink:
    """The model that the engine holds is the policy itself, so there is nothing to sync and nothing to undo.

    Used where the engine switches its adapter on by itself when it is given any policy: [`TransformersEngine`], which may
    hold the trainer's own model, and [`RayEngine`], whose workers load a saved adapter.
    """

    def sync(self) -> bool:
        """Return False: there is no copy that could be old, and neither engine keeps a cache between two calls."""
        return False

    def active(self) -> AbstractContextManager[Any]:
        """Do nothing: the engine switches the adapter on."""
        return nullcontext()

    def close(self) -> None:
        """Do nothing."""


class Engine(Protocol):
    """Samples completions."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and completion together."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Most completions that are decoded at once."""
        ...

    @property
    def kv_cache_tokens(self) -> int | None:
        """How many tokens the KV cache holds between two calls of `stream`; None where it holds none or that is not known."""
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
                Token ids, one sequence per completion; repeat a prompt to sample it several times.
            seeds (`Sequence[int]`):
                One seed per prompt. A sample depends on its seed, not on which prompts share its batch.
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
    """Sample one completion per prompt and return them in the prompts' order.

    Args:
        engine ([`Engine`]):
            The engine.
        prompts (`Sequence[Sequence[int]]`):
            Token ids, as for [`Engine.stream`].
        seeds (`Sequence[int]`):
            One seed per prompt.
        settings ([`SamplingSettings`]):
            How to sample.
        policy ([`PolicyLink`], *optional*):
            The policy to sample; the reference when not given.
        on_finished (`Callable[[], None]`, *optional*):
            Called after each completion.

    Raises:
        EngineError: If one prompt cannot be sampled, or the engine fails.
    """
    finished: dict[int, Completion] = {}
    for index, completion in engine.stream(prompts, seeds, settings, policy):
        on_finished()
        if isinstance(completion, Failure):
            raise EngineError(f"The engine could not sample prompt {index}: {completion.reason}", (index,))
        finished[index] = completion
    return [finished[index] for index in range(len(prompts))]


MOST_FAILURES = 16
"""So many failures with nothing finished in between mean that the engine is broken, not a prompt."""

Run = Callable[[Sequence[int]], Iterator[tuple[int, Completion]]]


def isolate_failures(prompts: Sequence[Sequence[int]], run: Run) -> Iterator[tuple[int, Completion | Failure]]:
    """Sample all prompts, so that one on which the engine fails costs none of the others.

    When the engine fails, sampling goes on with the prompts that were not in flight. Those that were in flight are halved
    until the one that makes the engine fail is alone; it becomes a [`Failure`].

    Args:
        prompts (`Sequence[Sequence[int]]`):
            Token ids. Equal prompts stay together: they fail together.
        run (`Run`):
            Samples the prompts of the given indices, yields (index, completion), and raises [`EngineError`] naming those in
            flight.

    Raises:
        EngineError: If the engine fails `MOST_FAILURES` times with nothing finished in between; it names those that were
            in flight at the first of these failures.
    """
    groups = deque([list(range(len(prompts)))])
    # Not the errors themselves: their tracebacks would keep the failed attempts' memory alive.
    streak: list[tuple[int, ...]] = []
    while groups:
        group = groups.popleft()
        done: set[int] = set()
        try:
            for index, completion in run(group):
                done.add(index)
                streak.clear()
                yield index, completion
        except EngineError as error:
            streak.append(error.in_flight)
            if len(streak) == MOST_FAILURES:
                raise EngineError(
                    f"The engine failed {MOST_FAILURES} times in a row, with different prompts. The last time: {error}",
                    streak[0],
                ) from error
            left = [index for index in group if index not in done]
            in_flight = set(error.in_flight)
            suspects = [index for index in left if index in in_flight] or left
            if others := [index for index in left if index not in set(suspects)]:
                groups.appendleft(
                    others
                )  # the innocent first: they finish before the search, which may take many failures
            halves = _halves(suspects, prompts)
            if len(halves) == 1:
                yield from ((index, Failure(str(error))) for index in suspects)
            else:
                groups.extend(halves)


def _halves(indices: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Split `indices` in two such that equal prompts stay together; one part if they are all equal."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        by_prompt.setdefault(tuple(prompts[index]), []).append(index)
    parts = list(by_prompt.values())
    middle = len(parts) // 2
    return [list(chain.from_iterable(half)) for half in (parts[:middle], parts[middle:]) if half]


def stop_token_ids(model: str, revision: str | None, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: those that the model declares, and the tokenizer's (as TRL does).

    Args:
        model (`str`):
            Hub id or folder.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:  # a model folder need not have a generation_config.json
        declared = None
    ids = {declared} if isinstance(declared, int) else set(declared or [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
