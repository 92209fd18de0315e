"""A PAG episode (arXiv 2506.10406): attempt, verification by the same model, and a revision where that said "wrong"."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ..engines.interface import (
    Completion,
    Engine,
    EngineError,
    Failure,
    FinishReason,
    PolicyLink,
    SamplingSettings,
)
from ..engines.vllm_engine import VLLMEngine
from .templates import FollowUps
from .verdict import Verdict, parse_verdict


class Role(StrEnum):
    """What a turn is for; in this order. The values double as metric names."""

    ATTEMPT = "attempt"
    VERIFY = "verify"
    REVISE = "revise"


ROLES = tuple(Role)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn that the model wrote.

    Attributes:
        role (`Role`):
            What it is for.
        given (`tuple[int, ...]`):
            Tokens between the turn before and this one, which the model did not write; empty for the attempt.
        completion ([`Completion`]):
            What it wrote.
        text (`str`):
            The same, without special tokens.
    """

    role: Role
    given: tuple[int, ...]
    completion: Completion
    text: str

    @property
    def is_cut(self) -> bool:
        """Whether it ended at the length limit."""
        return self.completion.finish_reason is FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode; the revision is there only where the verdict was "wrong"."""

    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]
    verdict: Verdict

    def turn(self, role: Role) -> Turn | None:
        """The turn of a role, if the episode came to it."""
        return next((turn for turn in self.turns if turn.role is role), None)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything after the prompt, templates included."""
        return tuple(token for turn in self.turns for token in (*turn.given, *turn.completion.token_ids))

    @property
    def turn_ids(self) -> tuple[int, ...]:
        """For each of `token_ids` the number of its role (1 attempt, 2 verify, 3 revise); 0 where the model did not write it."""
        return tuple(
            number
            for turn in self.turns
            for number in (
                *(0 for _ in turn.given),
                *(ROLES.index(turn.role) + 1 for _ in turn.completion.token_ids),
            )
        )

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The engine's log-prob of each of `token_ids`, 0 where the model did not write it."""
        return tuple(
            logprob for turn in self.turns for logprob in (*(0.0 for _ in turn.given), *turn.completion.logprobs)
        )


@dataclass(frozen=True, slots=True)
class EpisodeSampler:
    """Samples episodes, each turn for all episodes at once.

    Attributes:
        engine ([`Engine`]):
            The engine; vLLM's prefix cache carries the earlier turns, of as many episodes as its KV cache holds.
        settings ([`SamplingSettings`]):
            How every turn is drawn; `max_completion_length` is that of one turn.
        follow_ups ([`FollowUps`]):
            What is put between the turns, and closes one that was cut.
        decode (`Callable[[Sequence[int]], str]`):
            Token ids to text, without special tokens.
        parser (`str`):
            The verdict parser.
        policy ([`PolicyLink`], *optional*):
            The policy; the reference when not given.
    """

    engine: Engine
    settings: SamplingSettings
    follow_ups: FollowUps
    decode: Callable[[Sequence[int]], str]
    parser: str = "strict"
    policy: PolicyLink | None = None
    on_finished: Callable[[], None] = field(default=lambda: None)

    def observed(self, on_finished: Callable[[], None]) -> "EpisodeSampler":
        """The same, calling `on_finished` after each turn."""
        return replace(self, on_finished=on_finished)

    def longest(self, prompt: int) -> int:
        """Most tokens of an episode whose prompt has `prompt`."""
        return prompt + self.follow_ups.longest_after_prompt(self.settings.max_completion_length)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Callable[[int, Role], int],
        revise_on: Collection[Verdict] = (Verdict.WRONG,),
    ) -> list[Episode]:
        """Sample one episode per prompt.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids, generation prompt included.
            seeds (`Callable[[int, Role], int]`):
                The seed of a prompt's turn.
            revise_on (`Collection[Verdict]`, *optional*):
                The verdicts after which there is a revision.

        Raises:
            ValueError: If an episode may become longer than the engine's context.
            EngineError: If a turn cannot be sampled.
        """
        episodes: list[Episode] = []
        for number, episode in enumerate(self.try_sample(prompts, seeds, revise_on)):
            if isinstance(episode, Failure):
                raise EngineError(
                    f"The engine could not sample the episode of prompt {number}: {episode.reason}", (number,)
                )
            episodes.append(episode)
        return episodes

    def try_sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Callable[[int, Role], int],
        revise_on: Collection[Verdict] = (Verdict.WRONG,),
    ) -> list[Episode | Failure]:
        """Sample one episode per prompt as `sample` does; a prompt that the engine cannot sample costs none of the others."""
        longest = self.longest(max(map(len, prompts), default=0))
        self._refuse_too_long(longest)
        episodes: list[Episode | Failure] = [Episode(tuple(prompt), (), Verdict.NONE) for prompt in prompts]
        step = episodes_at_once(self.engine, longest) or len(prompts)
        for start in range(0, len(prompts), max(1, step)):
            numbers = list(range(len(prompts)))[start : start + step]
            self._add(episodes, numbers, Role.ATTEMPT, (), seeds)
            self._add(episodes, numbers, Role.VERIFY, self.follow_ups.verify, seeds)
            flagged = []
            for number in numbers:
                if isinstance(episode := episodes[number], Episode):
                    verdict = self._verdict(episode.turns[1])
                    episodes[number] = replace(episode, verdict=verdict)
                    if verdict in revise_on:
                        flagged.append(number)
            self._add(episodes, flagged, Role.REVISE, self.follow_ups.revise, seeds)
        return episodes

    def _refuse_too_long(self, needed: int) -> None:
        if needed > self.engine.max_model_len:
            raise ValueError(
                f"An episode may take {needed} tokens (prompt, two follow-ups, three turns of up to "
                f"{self.settings.max_completion_length}), the engine's context has {self.engine.max_model_len}. Lower "
                f"--max_completion_length, or set --max_model_len {needed}."
            )

    def _add(
        self,
        episodes: list[Episode | Failure],
        numbers: Sequence[int],
        role: Role,
        follow_up: tuple[int, ...],
        seeds: Callable[[int, Role], int],
    ) -> None:
        """Append a turn to the episodes of these numbers; a failure takes an episode's place."""
        going = [(number, episode) for number in numbers if isinstance(episode := episodes[number], Episode)]
        if not going:
            return
        given = [self._closing(episode) + follow_up for _, episode in going]
        contexts = [
            (*episode.prompt, *episode.token_ids, *between) for (_, episode), between in zip(going, given, strict=True)
        ]
        drawn = [seeds(number, role) for number, _ in going]
        try:
            for index, completion in self.engine.stream(contexts, drawn, self.settings, self.policy):
                self.on_finished()
                number, episode = going[index]
                if isinstance(completion, Failure):
                    episodes[number] = completion
                    continue
                turn = Turn(role, given[index], completion, self.decode(completion.token_ids))
                episodes[number] = replace(episode, turns=(*episode.turns, turn))
        except EngineError as error:
            raise EngineError(str(error), tuple(going[index][0] for index in error.in_flight)) from error

    def _closing(self, episode: Episode) -> tuple[int, ...]:
        return (self.follow_ups.end_of_turn,) if episode.turns and episode.turns[-1].is_cut else ()

    def _verdict(self, verification: Turn) -> Verdict:
        """What a verification says; nothing where it was cut."""
        return Verdict.NONE if verification.is_cut else parse_verdict(verification.text, self.parser)


def episodes_at_once(engine: Engine, longest: int) -> int | None:
    """How many episodes are taken through their turns together, so that the KV cache still holds their earlier turns when the
    next one begins; None where that is not known.

    Args:
        engine ([`Engine`]):
            The engine.
        longest (`int`):
            Most tokens of an episode.
    """
    if not isinstance(engine, VLLMEngine):
        return None
    return max(engine.max_num_seqs, engine.kv_cache_tokens // longest)
