"""A PAG episode (arXiv 2506.10406): attempt, verification by the same model, and a revision where that said "wrong"."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from ..engines.interface import Completion, Engine, FinishReason, PolicyLink, SamplingSettings, generate
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
        """
        needed = self.longest(max(map(len, prompts), default=0))
        if needed > self.engine.max_model_len:
            raise ValueError(
                f"An episode may take {needed} tokens (prompt, two follow-ups, three turns of up to "
                f"{self.settings.max_completion_length}), the engine's context has {self.engine.max_model_len}. Lower "
                f"--max_completion_length, or set --max_model_len {needed}."
            )
        episodes = [Episode(tuple(prompt), (), Verdict.NONE) for prompt in prompts]
        everyone = list(range(len(prompts)))
        episodes = self._add(episodes, everyone, Role.ATTEMPT, (), seeds)
        episodes = self._add(episodes, everyone, Role.VERIFY, self.follow_ups.verify, seeds)
        episodes = [self._judged(episode) for episode in episodes]
        flagged = [number for number in everyone if episodes[number].verdict in revise_on]
        return self._add(episodes, flagged, Role.REVISE, self.follow_ups.revise, seeds)

    def _add(
        self,
        episodes: list[Episode],
        numbers: Sequence[int],
        role: Role,
        follow_up: tuple[int, ...],
        seeds: Callable[[int, Role], int],
    ) -> list[Episode]:
        if not numbers:
            return episodes
        given = [self._closing(episodes[number]) + follow_up for number in numbers]
        contexts = [
            (*episodes[number].prompt, *episodes[number].token_ids, *between)
            for number, between in zip(numbers, given, strict=True)
        ]
        drawn = [seeds(number, role) for number in numbers]
        completions = generate(self.engine, contexts, drawn, self.settings, self.policy, self.on_finished)
        grown = list(episodes)
        for number, between, completion in zip(numbers, given, completions, strict=True):
            turn = Turn(role, between, completion, self.decode(completion.token_ids))
            grown[number] = Episode(episodes[number].prompt, (*episodes[number].turns, turn), episodes[number].verdict)
        return grown

    def _closing(self, episode: Episode) -> tuple[int, ...]:
        return (self.follow_ups.end_of_turn,) if episode.turns and episode.turns[-1].is_cut else ()

    def _judged(self, episode: Episode) -> Episode:
        turn = episode.turns[-1]
        verdict = Verdict.NONE if turn.is_cut else parse_verdict(turn.text, self.parser)
        return Episode(episode.prompt, episode.turns, verdict)
