"""The trainer's only knowledge of the engine: our engine in the place where TRL keeps its vLLM generation."""

import faulthandler
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..rollout.engines.interface import Engine, PolicyLink, SamplingSettings, generate
from ..rollout.episodes.episode import Episode
from ..rollout.episodes.options import EpisodeOptions
from ..rollout.prompts import sample_seed


class EngineBackend:
    """Has the two methods that `GRPOTrainer` calls on `self.vllm_generation`.

    Args:
        engine ([`Engine`]):
            The engine.
        link ([`PolicyLink`]):
            The policy's way to it.
        settings ([`SamplingSettings`]):
            How to sample.
        seed_parts (`Callable[[], tuple]`):
            What the seeds of this moment derive from besides the prompt: run seed, mode and step.
        timeout_s (`float`, *optional*, defaults to `0.0`):
            Seconds without a finished completion after which the process is ended with a stack dump; 0 is never.
    """

    def __init__(
        self,
        engine: Engine,
        link: PolicyLink,
        settings: SamplingSettings,
        seed_parts: Callable[[], tuple[str | int, ...]],
        timeout_s: float = 0.0,
    ):
        self.engine = engine
        self.link = TimedLink(link)
        self.last_speed = (0, 0.0, 0.0)
        """Tokens of the last `generate`, its seconds, and those in which the policy was brought."""
        self.settings = settings
        self._seed_parts = seed_parts
        self._timeout_s = timeout_s

    def sync_weights(self) -> None:
        """Nothing: TRL skips this when the step has not moved, so the link brings the policy at every `generate`."""

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: AbstractContextManager[Any]
    ) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """Sample one completion per prompt from the policy.

        Returns:
            `tuple`: Prompt ids, completion ids, log-probs of shape [prompt][token][1], and None, as TRL expects.
        """
        if images is not None:
            raise ValueError("Prompts with images are not supported: use text prompts.")
        with profiler, _watched(self._timeout_s) as still_alive:
            seeds, began, self.link.seconds = self._seeds(prompts), time.perf_counter(), 0.0
            completions = generate(self.engine, prompts, seeds, self.settings, self.link, still_alive)
            tokens = sum(len(completion.token_ids) for completion in completions)
            self.last_speed = (tokens, time.perf_counter() - began, self.link.seconds)
        return (
            prompts,
            [list(completion.token_ids) for completion in completions],
            [[[logprob] for logprob in completion.logprobs] for completion in completions],
            None,
        )

    def episodes(self, prompts: list[list[int]], options: EpisodeOptions, tokenizer: Any) -> list[Episode]:
        """Sample one PAG episode per prompt from the policy."""
        with _watched(self._timeout_s) as still_alive:
            seeds, began, self.link.seconds = self._seeds(prompts), time.perf_counter(), 0.0
            sampler = options.sampler(self.engine, tokenizer, self.settings, self.link).observed(still_alive)
            with self.link.brought_once():
                episodes = sampler.sample(prompts, lambda number, role: sample_seed(seeds[number], role))
            tokens = sum(len(turn.completion.token_ids) for episode in episodes for turn in episode.turns)
            self.last_speed = (tokens, time.perf_counter() - began, self.link.seconds)
        return episodes

    def _seeds(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A seed per prompt that depends neither on its place in the batch nor on the rank."""
        seen = _counts_on_earlier_ranks(prompts)
        seeds = []
        for prompt in prompts:
            key = tuple(prompt)
            seeds.append(sample_seed(*self._seed_parts(), ",".join(map(str, key)), seen[key]))
            seen[key] += 1
        return seeds


class TimedLink:
    """A policy link that knows how long it last took to bring the policy.

    Args:
        link ([`PolicyLink`]):
            The link.
    """

    def __init__(self, link: PolicyLink):
        self._link = link
        self._is_held, self._is_brought = False, False
        self.seconds = 0.0
        """Seconds of all `sync` since it was last set to 0."""

    def sync(self) -> bool:
        """Bring the policy, and take the time."""
        if self._is_held and self._is_brought:
            return False
        self._is_brought = True
        began = time.perf_counter()
        changed = self._link.sync()
        self.seconds += time.perf_counter() - began
        return changed

    @contextmanager
    def brought_once(self) -> Iterator[None]:
        """Within, the policy does not change and is brought once, however many turns are sampled: processes that gather it may
        not do so a different number of times."""
        self._is_held, self._is_brought = True, False
        try:
            yield
        finally:
            self._is_held = False

    def active(self) -> AbstractContextManager[Any]:
        """The link's own context."""
        return self._link.active()

    def close(self) -> None:
        """Close the link."""
        self._link.close()


def _counts_on_earlier_ranks(prompts: Sequence[Sequence[int]]) -> Counter[tuple[int, ...]]:
    """How often each prompt stands in the batches of lower ranks, so that seeds are those of one process with all rows."""
    state = PartialState()
    if state.num_processes == 1:
        return Counter()
    keys = gather_object([(state.process_index, tuple(prompt)) for prompt in prompts])
    return Counter(prompt for rank, prompt in keys if rank < state.process_index)


@contextmanager
def _watched(timeout_s: float) -> Iterator[Callable[[], None]]:
    """Within, the process ends with a stack dump after `timeout_s` without a call of what is yielded.

    faulthandler's own thread does it, which also works while C code holds the interpreter's lock.
    """

    def still_alive() -> None:
        if timeout_s > 0:
            # Not sys.stderr: a notebook's has no file descriptor.
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__ or 2)

    still_alive()
    try:
        yield still_alive
    finally:
        if timeout_s > 0:
            faulthandler.cancel_dump_traceback_later()
