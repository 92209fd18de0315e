"""States, and what the reference made of them: what constants and value networks learn from.

Suffixes name the dimensions: S states, D hidden size, K roles.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..rollout.episode import NOT_REACHED, EpisodeKind, FollowUps
from ..rollout.pool import ReferencePool

Hidden = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[torch.Tensor]]
"""Sequences and positions to hidden states, one tensor of shape (positions, D) for each sequence."""


@dataclass(frozen=True, slots=True)
class States:
    """States with what the reference made of them.

    Attributes:
        hidden_SD (`torch.Tensor`):
            The reference's last hidden state at the last token of each state, float32, shape (S, D).
        role_S (`torch.Tensor`):
            Index of the role of the turn that follows, shape (S,).
        label_S (`torch.Tensor`):
            1 where the first turn succeeded; 0 for the first turn itself; shape (S,).
        successes_S (`torch.Tensor`):
            How many reference samples succeeded, shape (S,).
        trials_S (`torch.Tensor`):
            Of how many, at least 1, shape (S,).
        prompts (`tuple[str, ...]`):
            The prompt that each state belongs to.
        roles (`tuple[str, ...]`):
            Names of the roles.
    """

    hidden_SD: torch.Tensor
    role_S: torch.Tensor
    label_S: torch.Tensor
    successes_S: torch.Tensor
    trials_S: torch.Tensor
    prompts: tuple[str, ...]
    roles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index_S: torch.Tensor) -> "States":
        return States(
            self.hidden_SD[index_S],
            self.role_S[index_S],
            self.label_S[index_S],
            self.successes_S[index_S],
            self.trials_S[index_S],
            tuple(self.prompts[i] for i in index_S.tolist()),
            self.roles,
        )


@dataclass(frozen=True, slots=True)
class ConstantChances:
    """Chances of success by role and label: successes over trials, a half where nothing was tried.

    Attributes:
        table (`tuple[tuple[float, float], ...]`):
            For each role the chance after a failed and after a successful first turn.
    """

    table: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, states: States) -> "ConstantChances":
        """Success rates of the reference by role and label."""
        rows = []
        for role in range(len(states.roles)):
            row = []
            for label in (0, 1):
                here = (states.role_S == role) & (states.label_S == label)
                trials = float(states.trials_S[here].sum())
                row.append(float(states.successes_S[here].sum()) / trials if trials else 0.5)
            rows.append((row[0], row[1]))
        return cls(tuple(rows))

    def chances(self, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """Chances of states, shape (S,)."""
        return torch.tensor(self.table, device=role_S.device)[role_S.long(), label_S.long()]


@dataclass(frozen=True, slots=True)
class _State:
    """Where a state ends in its sequence, and the outcomes that followed it."""

    sequence: int
    position: int
    role: int
    label: int
    successes: int
    trials: int
    prompt: str


@dataclass(frozen=True, slots=True)
class _Row:
    token_ids: list[int]
    is_truncated: bool
    outcome: str
    reward: float | None


def first_states(
    prompt_ids: Sequence[str],
    rewards: Sequence[Sequence[float | None]],
    contexts: Sequence[list[int]] | None,
    kind: EpisodeKind,
    hidden: Hidden | None = None,
) -> States:
    """The states in which first turns begin: the prompts, each with as many trials as it has reference samples with a signal.

    Args:
        prompt_ids (`Sequence[str]`):
            Ids of the prompts.
        rewards (`Sequence[Sequence[float | None]]`):
            The rewards of each prompt's reference samples, 0 or 1; None for no signal.
        contexts (`Sequence[list[int]]`, *optional*):
            Token ids of the prompts, generation prompt included; not needed without `hidden`.
        kind ([`EpisodeKind`]):
            What is trained.
        hidden (`Hidden`, *optional*):
            Gives hidden states; without it they are empty, which is enough for constants.
    """
    states, sequences = [], []
    for row, (prompt_id, of_prompt) in enumerate(zip(prompt_ids, rewards, strict=True)):
        known = [reward for reward in of_prompt if reward is not None]
        if known:
            context = [] if contexts is None else contexts[row]
            states.append(_State(len(sequences), len(context) - 1, 0, 0, int(sum(known)), len(known), prompt_id))
            sequences.append(context)
    return _gathered(sequences, states, hidden, kind.roles)


def later_states(
    pool: ReferencePool,
    kind: EpisodeKind,
    follow_ups: FollowUps,
    tokenize: Callable[[list[Any]], list[list[int]]],
    hidden: Hidden | None = None,
) -> States:
    """The states of a pool in which later turns begin, each with the one trial that followed it.

    Args:
        pool ([`ReferencePool`]):
            The pool.
        kind ([`EpisodeKind`]):
            What is trained.
        follow_ups ([`FollowUps`]):
            The kind's follow-up prompts.
        tokenize (`Callable`):
            Prompts to token ids, generation prompt included: messages, or texts where the pool was sampled from texts.
        hidden (`Hidden`, *optional*):
            Gives hidden states; without it they are empty, which is enough for constants.

    Raises:
        ValueError: If the pool is unfinished or holds episodes of another kind.
    """
    pool.turn_rewards()  # an unfinished pool is refused here
    turns, samples = pool.manifest.turns, pool.manifest.num_samples
    if turns != len(kind.roles):
        raise ValueError(
            f"The pool in `{pool.folder}` holds completions, no episodes of `{kind.name}`. Sample one with `astarpo-rollout "
            f"--episode {kind.name}`."
        )
    rows, prompts = _rows(pool), pool.prompts
    ids = prompts["prompt_id"].to_pylist()
    messages = [json.loads(text) for text in prompts["prompt"].to_pylist()]
    is_text = pool.manifest.fingerprint.get("text_prompts", False)
    # Without hidden states nobody looks at the tokens, and a model without a chat template could not make them.
    contexts = (
        [[]] * len(ids) if hidden is None else tokenize([m[0]["content"] for m in messages] if is_text else messages)
    )
    sequences: list[list[int]] = []
    states: list[_State] = []
    for prompt_id, context in zip(ids, contexts, strict=True):
        for sample in range(samples):
            episode = [rows.get((prompt_id, turns * sample + turn)) for turn in range(turns)]
            _add_episode(prompt_id, context, episode, kind, follow_ups, sequences, states)
    return _gathered(sequences, states, hidden, kind.roles)


def all_states(first: States, later: States) -> States:
    """States of first and of later turns together."""

    def both(name: str) -> torch.Tensor:
        return torch.cat([getattr(first, name), getattr(later, name)])

    return States(
        *(both("hidden_SD"), both("role_S"), both("label_S"), both("successes_S"), both("trials_S")),
        first.prompts + later.prompts,
        first.roles,
    )


def _rows(pool: ReferencePool) -> dict[tuple[str, int], _Row]:
    names = ("prompt_id", "sample_index", "completion_ids", "finish_reason", "outcome", "reward")
    table = pool.read(names)
    columns = [table[name].to_pylist() for name in names]
    return {
        (prompt_id, index): _Row(token_ids, reason == "length", outcome, reward)
        for prompt_id, index, token_ids, reason, outcome, reward in zip(*columns, strict=True)
    }


def _add_episode(
    prompt_id: str,
    context: list[int],
    episode: Sequence[_Row | None],
    kind: EpisodeKind,
    follow_ups: FollowUps,
    sequences: list[list[int]],
    states: list[_State],
) -> None:
    """The states in which the later turns of an episode begin."""
    first = episode[0]
    if first is None or first.reward is None:
        return
    label, end = int(first.reward > 0), follow_ups.end_of_turn
    assert end is not None
    sequence, last = [*context, *first.token_ids], first
    for number, (role, row) in enumerate(zip(kind.roles[1:], episode[1:], strict=True), start=1):
        if row is None or row.outcome == NOT_REACHED.outcome:
            continue
        sequence += [*((end,) if last.is_truncated else ()), *follow_ups.by_role[role]]
        if row.reward is not None:
            states.append(_State(len(sequences), len(sequence) - 1, number, label, int(row.reward > 0), 1, prompt_id))
        sequence, last = [*sequence, *row.token_ids], row
    sequences.append(sequence)


def _gathered(
    sequences: list[list[int]], states: list[_State], hidden: Hidden | None, roles: tuple[str, ...]
) -> States:
    if hidden is None:
        hidden_SD = torch.empty(len(states), 0)
    else:
        positions: list[list[int]] = [[] for _ in sequences]
        for state in states:
            positions[state.sequence].append(state.position)
        # Nothing after the last position is looked at, so it need not be computed.
        shortened = [ids[: max(at) + 1] if at else ids[:1] for ids, at in zip(sequences, positions, strict=True)]
        parts = hidden(shortened, positions)
        hidden_SD = torch.cat([part for part in parts if len(part)])  # states stand in the order of their sequences
    return States(
        hidden_SD,
        torch.tensor([state.role for state in states], dtype=torch.long),
        torch.tensor([state.label for state in states], dtype=torch.long),
        torch.tensor([state.successes for state in states], dtype=torch.long),
        torch.tensor([state.trials for state in states], dtype=torch.long),
        tuple(state.prompt for state in states),
        roles,
    )
