"""The trainer's only knowledge of the engine: our engine in the place where TRL keeps its vLLM generation."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ..rollout.engines.interface import Engine, PolicyLink, SamplingSettings, generate
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
    """

    def __init__(
        self,
        engine: Engine,
        link: PolicyLink,
        settings: SamplingSettings,
        seed_parts: Callable[[], tuple[str | int, ...]],
    ):
        self.engine = engine
        self.link = link
        self.settings = settings
        self._seed_parts = seed_parts

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
        with profiler:
            completions = generate(self.engine, prompts, self._seeds(prompts), self.settings, self.link)
        return (
            prompts,
            [list(completion.token_ids) for completion in completions],
            [[[logprob] for logprob in completion.logprobs] for completion in completions],
            None,
        )

    def _seeds(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """A seed per prompt that depends neither on its place in the batch nor on the rank."""
        seen: Counter[tuple[int, ...]] = Counter()
        seeds = []
        for prompt in prompts:
            key = tuple(prompt)
            seeds.append(sample_seed(*self._seed_parts(), ",".join(map(str, key)), seen[key]))
            seen[key] += 1
        return seeds
