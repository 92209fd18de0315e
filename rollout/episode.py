"""Episodes: one vocabulary for one turn and for many.

A plain completion is an episode of one turn. An [`EpisodeKind`] says what the turns are, which of them are graded, and what
each earns; sampling, the pool, evaluation and training ask it and know nothing else about it. `pag.py` is the other kind that
ships with astarpo, and a kind of your own is a subclass of a few lines:

```python
class SecondTry(EpisodeKind):
    name = "second_try"
    roles = ("attempt", "second")
    follow_ups = {"second": "Check your answer."}

KIND = SecondTry()  # --episode my_module:KIND, or AStarPOTrainer(episode=KIND)
```
"""

import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .engines.interface import Completion, Engine, EngineError, Failure, FinishReason, PolicyLink, SamplingSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ATTEMPT = "attempt"
"""Name of the first role in every kind that ships with astarpo."""
SEPARATOR = "\n\n"
"""Stands between the end of the model's turn and the user's next one, as in PAG's code."""
_MARK = "\u241f"
"""Stands for an assistant's turn while the chat template is asked what follows one; no template contains it."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn that the model wrote.

    Attributes:
        role (`str`):
            What the turn is for, one of the kind's `roles`.
        number (`int`):
            Position of the role in the kind's `roles`, from 1.
        given (`tuple[int, ...]`):
            Tokens between the turn before and this one, which the model did not write; empty for the first turn.
        completion ([`Completion`]):
            What the model wrote.
        text (`str`):
            The same as text, without special tokens.
    """

    role: str
    number: int
    given: tuple[int, ...]
    completion: Completion
    text: str

    @property
    def is_truncated(self) -> bool:
        """Whether the turn ended at the length limit."""
        return self.completion.finish_reason is FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode: its prompt and the turns that it came to."""

    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]

    def turn(self, role: str) -> Turn | None:
        """The turn of a role, or None if the episode did not come to it."""
        return next((turn for turn in self.turns if turn.role == role), None)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything after the prompt, follow-up prompts included."""
        return tuple(token for turn in self.turns for token in (*turn.given, *turn.completion.token_ids))

    @property
    def turn_ids(self) -> tuple[int, ...]:
        """For each of `token_ids` the number of its turn's role, 0 where the model did not write it."""
        return tuple(
            number
            for turn in self.turns
            for number in (*(0 for _ in turn.given), *(turn.number for _ in turn.completion.token_ids))
        )

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The engine's log-prob in nats of each of `token_ids`, 0 where the model did not write it."""
        return tuple(
            logprob for turn in self.turns for logprob in (*(0.0 for _ in turn.given), *turn.completion.logprobs)
        )


@dataclass(frozen=True, slots=True)
class TurnGrade:
    """What a grader says of a turn.

    Attributes:
        outcome (`str`):
            The grader's outcome, such as `correct`; for people and for the pool.
        reward (`float`, *optional*):
            1 for success and 0 for failure (any finite number in an episode of one turn); None for no signal.
        answer (`str`, *optional*, defaults to `""`):
            The answer that was graded, where the grader says it; empty where there is none.
    """

    outcome: str
    reward: float | None
    answer: str = ""

    @property
    def is_right(self) -> bool:
        """Whether the turn earned something."""
        return self.reward is not None and self.reward > 0


NO_TURN = "none"
"""Finish reason, in a pool, of a turn that the episode did not come to."""
NOT_REACHED = TurnGrade("not_reached", None)
"""The grade of a turn that the episode did not come to."""


@dataclass(frozen=True, slots=True)
class GradedEpisode:
    """An episode with one grade for each role of its kind, in the order of the roles."""

    episode: Episode
    grades: tuple[TurnGrade, ...]


def final_reward(reward: float | None, truncated: bool, require_eos: bool) -> float | None:
    """The reward that an answer earns: 0 where it was truncated and `require_eos` holds; no signal stays no signal."""
    return 0.0 if reward is not None and require_eos and truncated else reward


class EpisodeKind:
    """What the model is asked to do, turn by turn. This class is the kind of one turn; subclass it for others.

    Attributes:
        name (`str`):
            Name in pools, checkpoints and messages.
        roles (`tuple[str, ...]`):
            What the turns are for, in order. The names double as metric names.
        follow_ups (`Mapping[str, str]`):
            For each role but the first, the user message that asks for its turn.
    """

    name: str = "single"
    roles: tuple[str, ...] = (ATTEMPT,)
    follow_ups: Mapping[str, str] = {}

    @property
    def answers(self) -> tuple[str, ...]:
        """Roles whose turns are answers to the problem, which the reward functions grade; all of them unless overridden."""
        return self.roles

    def next_role(self, turns: Sequence[Turn]) -> str | None:
        """The role of the turn that follows, None where the episode is over. By default every role has its turn."""
        return self.roles[len(turns)] if len(turns) < len(self.roles) else None

    def judge(self, turn: Turn, label: int | None) -> TurnGrade:
        """Grade a turn that is not an answer; the reward functions never see it.

        Args:
            turn ([`Turn`]):
                A turn of a role outside `answers`.
            label (`int`, *optional*):
                Whether the first turn succeeded, 0 or 1; None where it has no signal.
        """
        raise NotImplementedError(f"{type(self).__name__} must define judge() for the role `{turn.role}`.")

    def reward(self, role: str, success: float, label: int) -> float:
        """What a turn earns in training.

        Args:
            role (`str`):
                The turn's role.
            success (`float`):
                Its grade: 1 or 0, or any finite number in an episode of one turn.
            label (`int`):
                Whether the first turn succeeded, 0 or 1; always 0 for the first turn itself.
        """
        return success

    def value(self, role: str, chance_S: "torch.Tensor", label_S: "torch.Tensor", beta1: float) -> "torch.Tensor":
        """V* of the states in which turns of a role begin, as a function of the reference's chance of success.

        A turn that earns R₁ = reward(role, 1, label) with chance p and else R₀ = reward(role, 0, label) has
        V* = β₁ ln((1 − p) e^{R₀/β₁} + p e^{R₁/β₁}); see docs/algorithm.md.

        Args:
            role (`str`):
                The role.
            chance_S (`torch.Tensor`):
                Chances of success in [0, 1], shape (S,).
            label_S (`torch.Tensor`):
                Whether the first turn succeeded, 0 or 1, shape (S,); 0 for first turns.
            beta1 (`float`):
                Temperature of V*, > 0.

        Returns:
            `torch.Tensor`: float64 values of shape (S,).
        """
        from .values import two_point_value

        by_label = [two_point_value(chance_S, self.reward(role, 0, z), self.reward(role, 1, z), beta1) for z in (0, 1)]
        return by_label[1].where(label_S > 0, by_label[0])

    def for_evaluation(self) -> "EpisodeKind":
        """The kind to sample in an evaluation, where it differs from training."""
        return self

    def last_answer(self, turns: Sequence[Turn]) -> Turn:
        """The answer that stands in the end, of the turns that this kind comes to.

        Args:
            turns (`Sequence[Turn]`):
                Turns of an episode, perhaps of the kind for evaluation, which may have more of them.
        """
        return [turn for turn in self.own_turns(turns) if turn.role in self.answers][-1]

    def own_turns(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns up to the first one that this kind would not have come to."""
        own: list[Turn] = []
        for turn in turns:
            if self.next_role(own) != turn.role:
                break
            own.append(turn)
        return own

    def report(
        self, episodes: Sequence[GradedEpisode], num_samples: int, decode: Callable[[Sequence[int]], str]
    ) -> dict[str, float | None]:
        """Metrics that this kind adds to an evaluation: by default the accuracy of each role, where there are several.

        Args:
            episodes (`Sequence[GradedEpisode]`):
                The episodes of `for_evaluation()`, those of a problem after one another. A grade has no `answer` where the turn
                was truncated and therefore does not count.
            num_samples (`int`):
                Episodes per problem.
            decode (`Callable[[Sequence[int]], str]`):
                Token ids to text.

        Returns:
            `dict[str, float | None]`: By name; None where there is nothing to take the mean of.
        """
        if len(self.roles) == 1:
            return {}
        metrics: dict[str, float | None] = {}
        for number, role in enumerate(self.roles):
            right = [graded.grades[number].is_right for graded in episodes if graded.episode.turn(role) is not None]
            metrics[f"accuracy_{role}"] = sum(right) / len(right) if right else None
        return metrics

    def metrics(self, grades: Sequence[Sequence[TurnGrade]]) -> dict[str, float | None]:
        """What else is logged of a batch of episodes in training, by name; None where it cannot be told.

        Args:
            grades (`Sequence[Sequence[TurnGrade]]`):
                One grade a role for each episode.
        """
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What decides the samples of this kind, as plain data; empty for completions."""
        if self.name == EpisodeKind.name:
            return {}
        return {"episode": self.name, "roles": list(self.roles), "follow_ups": dict(self.follow_ups)}


SINGLE = EpisodeKind()
"""Plain completions."""


def load_kind(name: str, pag: Callable[[], EpisodeKind]) -> EpisodeKind:
    """The kind of episode that a command names.

    Args:
        name (`str`):
            `single`, `pag`, or `module:ATTRIBUTE` of a kind of the user's own; the module may be in the working folder.
        pag (`Callable[[], EpisodeKind]`):
            Makes the PAG kind with the prompts and the parser that were asked for.

    Raises:
        ValueError: If there is no such kind; the message says what to pass.
    """
    if name == SINGLE.name:
        return SINGLE
    if name == "pag":
        return pag()
    module, found, attribute = name.partition(":")
    if not found:
        raise ValueError(
            f"There is no kind of episode `{name}`. Choose single or pag, or name a kind of your own as module:ATTRIBUTE."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command started from its entry point does not look here
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"The kind of episode `{name}` could not be imported: {error}.") from error
    if not isinstance(kind, EpisodeKind):
        raise ValueError(f"`{name}` is a {type(kind).__name__}, not an instance of astarpo.rollout.EpisodeKind.")
    return kind


def episode_from_rows(
    kind: EpisodeKind,
    rows: Sequence[Mapping[str, Any]],
    prompt: Sequence[int] = (),
    follow_ups: "FollowUps | None" = None,
) -> Episode:
    """Rebuild an episode from its rows in a pool.

    Args:
        kind ([`EpisodeKind`]):
            The pool's kind.
        rows (`Sequence[Mapping[str, Any]]`):
            One row for each role, in the order of the roles, with `completion_ids`, `text`, `finish_reason`, and perhaps `logprobs`.
        prompt (`Sequence[int]`, *optional*):
            Token ids of the prompt, which a pool does not hold.
        follow_ups ([`FollowUps`], *optional*):
            The follow-up prompts; without them `given` is empty.

    Returns:
        [`Episode`]: Its turns have log-probs where the rows have them.
    """
    turns: list[Turn] = []
    for number, (role, row) in enumerate(zip(kind.roles, rows, strict=True), start=1):
        if row["finish_reason"] == NO_TURN:
            continue
        logprobs = tuple(row.get("logprobs") or ())
        completion = Completion(tuple(row["completion_ids"]), logprobs, FinishReason(row["finish_reason"]))
        given = () if follow_ups is None else follow_ups.before(turns, role)
        turns.append(Turn(role, number, given, completion, row["text"]))
    return Episode(tuple(prompt), tuple(turns))


def grade_turns(kind: EpisodeKind, episode: Episode, answers: Sequence[TurnGrade]) -> tuple[TurnGrade, ...]:
    """One grade for each role of the kind.

    Args:
        kind ([`EpisodeKind`]):
            Grades the turns that are not answers.
        episode ([`Episode`]):
            The episode.
        answers (`Sequence[TurnGrade]`):
            Grades of its answers, in the order of its turns; each answer is graded once.

    Returns:
        `tuple[TurnGrade, ...]`: In the order of `kind.roles`; `NOT_REACHED` for a turn that is not there.

    Raises:
        ValueError: If an answer of several turns earned neither 0 nor 1.
    """
    if len(kind.roles) > 1:
        _refuse_partial([grade.reward for grade in answers], kind)
    left, label = iter(answers), None
    grades: dict[str, TurnGrade] = {}
    for turn in episode.turns:
        grades[turn.role] = next(left) if turn.role in kind.answers else kind.judge(turn, label)
        if turn.number == 1:
            reward = grades[turn.role].reward
            label = None if reward is None else int(reward > 0)
    return tuple(grades.get(role, NOT_REACHED) for role in kind.roles)


def _refuse_partial(rewards: Sequence[float | None], kind: EpisodeKind) -> None:
    """The values of later turns are those of a chance of success, so an answer is right, wrong or without signal."""
    partial = [reward for reward in rewards if reward not in (None, 0.0, 1.0)]
    if partial:
        raise ValueError(
            f"An answer of a `{kind.name}` episode earned {partial[0]}. In episodes of several turns an answer is right (1), wrong "
            "(0) or without signal (None). Use one such reward function with weight 1, or --episode single."
        )


@dataclass(frozen=True, slots=True)
class FollowUps:
    """Token ids of the follow-up prompts.

    Attributes:
        by_role (`Mapping[str, tuple[int, ...]]`):
            For each role but the first: the separator, the user's message and the assistant's header. What closes the model's
            own turn is not among them, the model wrote that itself.
        end_of_turn (`int`, *optional*):
            What closes a turn of the model in this template; put after a turn that was truncated.
    """

    by_role: Mapping[str, tuple[int, ...]]
    end_of_turn: int | None

    @classmethod
    def render(cls, tokenizer: "PreTrainedTokenizerBase", kind: EpisodeKind) -> "FollowUps":
        """Render the kind's follow-up prompts through the tokenizer's chat template, without a system block.

        Raises:
            ValueError: If the template drops assistants' turns, or a follow-up prompt is empty.
        """
        texts = {role: kind.follow_ups.get(role, "") for role in kind.roles[1:]}
        if not texts:
            return cls({}, None)  # nothing follows, so a model without a chat template will do
        empty = [role for role, text in texts.items() if not text.strip()]
        if empty:
            raise ValueError(
                f"The follow-up prompt of the turn `{empty[0]}` is empty, so the model would not know what is asked of it. "
                f"Write it into `follow_ups` of the kind `{kind.name}`, or leave --{empty[0]}_prompt out."
            )
        rendered = [_after_a_turn(tokenizer, text) for text in texts.values()]
        ids: list[list[int]] = tokenizer([text for _, text in rendered], add_special_tokens=False)["input_ids"]
        end: Any = tokenizer.convert_tokens_to_ids(rendered[0][0])
        return cls({role: tuple(part) for role, part in zip(texts, ids, strict=True)}, end)

    def before(self, turns: Sequence[Turn], role: str) -> tuple[int, ...]:
        """What stands between earlier turns and the turn of a role: an end if the last one was truncated, and the follow-up
        prompt."""
        if not turns:
            return ()
        assert self.end_of_turn is not None
        end = (self.end_of_turn,) if turns[-1].is_truncated else ()
        return (*end, *self.by_role[role])

    def longest_after_prompt(self, max_completion_length: int) -> int:
        """Most tokens of an episode without its prompt: every turn, every follow-up prompt, and an end for truncated turns."""
        between = sum(len(ids) + 1 for ids in self.by_role.values())
        return between + (len(self.by_role) + 1) * max_completion_length


def _after_a_turn(tokenizer: Any, text: str) -> tuple[str, str]:
    """What closes a turn of the model, and what stands between that and its next turn."""
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _MARK},
        {"role": "user", "content": text},
    ]
    rendered: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    _, found, rest = rendered.rpartition(_MARK)
    if not found:
        raise ValueError(
            f"The chat template of `{tokenizer.name_or_path}` drops earlier turns, so an episode of several turns cannot be "
            "rendered. Use a model whose template keeps them."
        )
    rest = rest.lstrip()
    # Not always the tokenizer's end-of-sequence token: base models with a chat template have another one.
    specials = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    end = next((token for token in specials if rest.startswith(token)), "")
    return end or str(tokenizer.eos_token), SEPARATOR + rest.removeprefix(end).lstrip()


class SyncOnce:
    """A policy link that syncs once for all the turns of a batch of episodes, and times it.

    The policy does not change while a batch is sampled. Under FSDP syncing is a collective, so all processes must sync
    equally often, however many turns their episodes come to.

    Args:
        link ([`PolicyLink`]):
            The policy's way to the engine.
    """

    def __init__(self, link: PolicyLink):
        self.link = link
        self.seconds = 0.0
        """Seconds that the last sync took."""
        self._is_synced = False

    @contextmanager
    def once(self) -> Iterator[None]:
        """Inside, only the first `sync` does anything."""
        self._is_synced, self.seconds = False, 0.0
        yield

    def sync(self) -> bool:
        """Sync the policy if this batch has not done so yet; returns whether anything had changed."""
        if self._is_synced:
            return False
        self._is_synced = True
        began = time.perf_counter()
        changed = self.link.sync()
        self.seconds = time.perf_counter() - began
        return changed

    def active(self) -> AbstractContextManager[Any]:
        """The link's own context."""
        return self.link.active()

    def close(self) -> None:
        """Close the link."""
        self.link.close()


def sample_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63) that is a hash of `parts`, so that there is no generator state to save or to share."""
    content = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) >> 1


Seeds = Callable[[int, str], int]
"""The seed of a turn, from the number of its prompt in the batch and its role."""


class EpisodeSampler:
    """Samples episodes of one kind, each turn for many episodes at once.

    Args:
        engine ([`Engine`]):
            The engine. Its prefix cache holds the earlier turns of as many episodes as fit into it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Renders the follow-up prompts and decodes.
        kind ([`EpisodeKind`]):
            What an episode is.
        settings ([`SamplingSettings`]):
            How every turn is sampled; `max_completion_length` is that of one turn.
        policy ([`PolicyLink`], *optional*):
            The policy; the reference when not given.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: "PreTrainedTokenizerBase",
        kind: EpisodeKind,
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ):
        self.engine, self.tokenizer, self.kind, self.settings = engine, tokenizer, kind, settings
        self.policy = None if policy is None else SyncOnce(policy)
        self.follow_ups = FollowUps.render(tokenizer, kind)
        self.decode = lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))

    def with_kind(self, kind: EpisodeKind) -> "EpisodeSampler":
        """The same engine, settings and policy with another kind of episode."""
        policy = None if self.policy is None else self.policy.link
        return EpisodeSampler(self.engine, self.tokenizer, kind, self.settings, policy)

    def longest(self, prompt_length: int) -> int:
        """Most tokens of an episode whose prompt has `prompt_length`."""
        return prompt_length + self.follow_ups.longest_after_prompt(self.settings.max_completion_length)

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Seeds, on_turn: Callable[[], None] = lambda: None
    ) -> list[Episode]:
        """Sample one episode per prompt, in the prompts' order.

        Args:
            prompts (`Sequence[Sequence[int]]`):
                Token ids, generation prompt included.
            seeds (`Seeds`):
                The seed of each turn.
            on_turn (`Callable[[], None]`, *optional*):
                Called after each turn.

        Raises:
            ValueError: If an episode may become longer than the engine's context.
            EngineError: If a turn cannot be sampled.
        """
        episodes: dict[int, Episode] = {}
        for number, episode in self.stream(prompts, seeds, on_turn):
            if isinstance(episode, Failure):
                raise EngineError(f"The engine could not sample prompt {number}: {episode.reason}", (number,))
            episodes[number] = episode
        return [episodes[number] for number in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Seeds, on_turn: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[int, Episode | Failure]]:
        """Sample one episode per prompt, yielding (number, episode) in the order in which they finish.

        A prompt that makes the engine fail is yielded as a [`Failure`] and costs none of the others.

        Raises:
            ValueError: If an episode may become longer than the engine's context.
            EngineError: If the engine fails on whatever it is given; it names the prompts that were being sampled.
        """
        longest = self.longest(max(map(len, prompts), default=0))
        self._refuse_too_long(longest)
        step = self.at_once(longest) or len(prompts)
        with self.policy.once() if self.policy is not None else _nothing():
            for start in range(0, len(prompts), max(1, step)):
                part = {n: Episode(tuple(prompts[n]), ()) for n in range(start, min(start + step, len(prompts)))}
                while part:  # one round gives every episode of the part its next turn
                    part = yield from self._next_turns(part, seeds, on_turn)

    def _next_turns(
        self, part: dict[int, Episode], seeds: Seeds, on_turn: Callable[[], None]
    ) -> Iterator[tuple[int, Episode | Failure]]:
        """Sample the next turn of each episode, yield what is over, and return what goes on."""
        numbers = list(part)
        roles = [str(self.kind.next_role(part[number].turns)) for number in numbers]
        given = [self.follow_ups.before(part[number].turns, role) for number, role in zip(numbers, roles, strict=True)]
        contexts = [
            # A first turn's context is the prompt itself: a job has many samples of each, and no copy for each of them.
            (*part[number].prompt, *part[number].token_ids, *between) if part[number].turns else part[number].prompt
            for number, between in zip(numbers, given, strict=True)
        ]
        turn_seeds = [seeds(number, role) for number, role in zip(numbers, roles, strict=True)]
        going: dict[int, Episode] = {}
        try:
            for index, completion in self.engine.stream(contexts, turn_seeds, self.settings, self.policy):
                on_turn()
                number, role = numbers[index], roles[index]
                if isinstance(completion, Failure):
                    yield number, completion
                    continue
                place = self.kind.roles.index(role) + 1
                turn = Turn(role, place, given[index], completion, self.decode(completion.token_ids))
                episode = replace(part[number], turns=(*part[number].turns, turn))
                if self.kind.next_role(episode.turns) is None:
                    yield number, episode
                else:
                    going[number] = episode
        except EngineError as error:
            raise EngineError(str(error), tuple(numbers[index] for index in error.in_flight)) from error
        return dict(sorted(going.items()))  # pyright: ignore[reportReturnType]

    def _refuse_too_long(self, longest: int) -> None:
        if longest > self.engine.max_model_len and len(self.kind.roles) > 1:
            raise ValueError(
                f"An episode may take {longest} tokens (prompt, follow-up prompts, {len(self.kind.roles)} turns of up to "
                f"{self.settings.max_completion_length}), the engine's context has {self.engine.max_model_len}. Lower "
                f"--max_completion_length, or set --max_model_len {longest}."
            )

    def at_once(self, longest: int) -> int | None:
        """How many episodes go through their turns together, so that the KV cache still holds their earlier turns when the
        next one begins; None for all.

        Args:
            longest (`int`):
                Most tokens of an episode.
        """
        if len(self.kind.roles) == 1 or self.engine.kv_cache_tokens is None:
            return None
        return max(self.engine.max_num_seqs, self.engine.kv_cache_tokens // longest)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
