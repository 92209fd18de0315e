"""The states of a reference pool, and what the reference made of them: what constants and networks learn from."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..rollout.episodes.rewards import turn_rewards
from ..rollout.episodes.stage1 import NOT_REACHED, TURNS, VERDICT
from ..rollout.episodes.templates import FollowUps
from ..rollout.episodes.verdict import Verdict
from ..rollout.pool import ReferencePool
from .value_network import States

Hidden = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], list[torch.Tensor]]
"""Sequences and positions to hidden states, one tensor of shape (positions, D) for each sequence."""


@dataclass(frozen=True, slots=True)
class _State:
    """A state: where it ends, and the outcomes that followed it."""

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
    is_cut: bool
    outcome: str
    reward: float | None


def pool_states(
    pool: ReferencePool,
    tokenize: Callable[[list[Any]], list[list[int]]],
    follow_ups: FollowUps | None,
    hidden: Hidden | None = None,
) -> States:
    """All states of a pool that have an outcome.

    An attempt's state is its prompt, with as many trials as there are samples; each verification and each revision is a state of
    its own.

    Args:
        pool ([`ReferencePool`]):
            The pool, of completions or of episodes.
        tokenize (`Callable`):
            Prompts to token ids, generation prompt included: messages, or texts where the pool was sampled from texts.
        follow_ups ([`FollowUps`], *optional*):
            What stands between the turns; None for completions.
        hidden (`Hidden`, *optional*):
            Gives hidden states; without it they are empty, which is enough for constants.
    """
    pool.turn_rewards()  # an unfinished pool is refused
    if follow_ups is not None and pool.manifest.turns != TURNS:
        raise ValueError(
            f"The pool in `{pool.folder}` holds completions, no episodes. Sample one with `astarpo-rollout --episode pag`."
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
        _add_attempts(prompt_id, context, rows, pool, sequences, states)
        if follow_ups is not None:
            for sample in range(pool.manifest.num_samples):
                turns = [rows.get((prompt_id, TURNS * sample + turn)) for turn in range(TURNS)]
                _add_episode(prompt_id, context, turns, follow_ups, sequences, states)
    return _gathered(sequences, states, hidden)


def _rows(pool: ReferencePool) -> dict[tuple[str, int], _Row]:
    names = ("prompt_id", "sample_index", "completion_ids", "finish_reason", "outcome", "reward")
    table = pool.read(names)
    columns = [table[name].to_pylist() for name in names]
    return {
        (prompt_id, index): _Row(token_ids, reason == "length", outcome, reward)
        for prompt_id, index, token_ids, reason, outcome, reward in zip(*columns, strict=True)
    }


def _add_attempts(
    prompt_id: str,
    context: list[int],
    rows: dict[tuple[str, int], _Row],
    pool: ReferencePool,
    sequences: list[list[int]],
    states: list[_State],
) -> None:
    found = [rows.get((prompt_id, pool.manifest.turns * sample)) for sample in range(pool.manifest.num_samples)]
    rewards = [row.reward for row in found if row is not None and row.reward is not None]
    if any(reward not in (0.0, 1.0) for reward in rewards):
        raise ValueError(
            "Values of states without samples come from chances of success, so rewards must be 0 or 1; the pool has others. Sample "
            "every prompt (value=table), or use a reward that says right or wrong."
        )
    if rewards:
        solved = sum(reward > 0 for reward in rewards)
        states.append(_State(len(sequences), len(context) - 1, 0, 0, solved, len(rewards), prompt_id))
        sequences.append(context)


def _add_episode(
    prompt_id: str,
    context: list[int],
    turns: Sequence[_Row | None],
    follow_ups: FollowUps,
    sequences: list[list[int]],
    states: list[_State],
) -> None:
    attempt, verification, revision = turns
    if attempt is None or verification is None or attempt.reward is None or verification.reward is None:
        return
    label = int(attempt.reward > 0)
    closing = (follow_ups.end_of_turn,)
    sequence = [*context, *attempt.token_ids, *(closing if attempt.is_cut else ()), *follow_ups.verify]
    here = [(len(sequence) - 1, 1, verification.reward)]
    if revision is not None and revision.outcome != NOT_REACHED and revision.reward is not None:
        sequence += [*verification.token_ids, *(closing if verification.is_cut else ()), *follow_ups.revise]
        here.append((len(sequence) - 1, 2, revision.reward))
    for position, role, reward in here:
        states.append(_State(len(sequences), position, role, label, int(reward > 0), 1, prompt_id))
    sequences.append(sequence)


def _gathered(sequences: list[list[int]], states: list[_State], hidden: Hidden | None) -> States:
    if hidden is None:
        hidden_SD = torch.empty(len(states), 0)
    else:
        wanted: list[list[int]] = [[] for _ in sequences]
        for state in states:
            wanted[state.sequence].append(state.position)
        parts = hidden(sequences, wanted)
        hidden_SD = torch.cat([part for part in parts if len(part)])  # states stand in the order of their sequences
    return States(
        hidden_SD,
        torch.tensor([state.role for state in states], dtype=torch.long),
        torch.tensor([state.label for state in states], dtype=torch.long),
        torch.tensor([state.successes for state in states], dtype=torch.long),
        torch.tensor([state.trials for state in states], dtype=torch.long),
        tuple(state.prompt for state in states),
    )


def episode_returns(pool: ReferencePool, alpha: float, num_samples: int) -> dict[str, list[float | None]]:
    """Σ_k R_k of the first reference episodes of each prompt; None where the attempt has no signal, or the revision has none."""
    rows = _rows(pool)
    returns: dict[str, list[float | None]] = {}
    for prompt_id in pool.prompt_ids:
        returns[prompt_id] = [
            _return([rows.get((prompt_id, TURNS * sample + turn)) for turn in range(TURNS)], alpha)
            for sample in range(min(num_samples, pool.manifest.num_samples))
        ]
    return returns


def _return(turns: Sequence[_Row | None], alpha: float) -> float | None:
    attempt, verification, revision = turns
    if attempt is None or verification is None or revision is None or attempt.reward is None:
        return None
    is_revised = revision.outcome != NOT_REACHED
    if is_revised and revision.reward is None:
        return None
    second = revision.reward is not None and revision.reward > 0 if is_revised else None
    verdict = Verdict(verification.outcome.removeprefix(VERDICT))
    rewards = turn_rewards(attempt.reward > 0, verdict, second, alpha)
    return sum(reward for reward in rewards if reward is not None)
