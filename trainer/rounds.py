"""Rounds: what an update trains on when its completions were sampled beforehand, by an earlier policy.

The loss is that of [`astarpo_loss`] with the sampling policy in the reference's place (OAPL, arXiv 2602.19362): β2·ln π/π_lag is regressed on
r − V̂, and V̂ comes from the other completions of the prompt. Leaving the completion itself out keeps V̂ independent of it, without which
the gradient would be biased.

A round's rows are those of a training set with one thing more, a [`StoredEpisode`]; from there on an update is any other update.
"""

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..rollout.engines.inline import ADAPTER, LiveLora, LoraFactors
from ..rollout.engines.policy_link import SavedLora, save_lora
from ..rollout.episode import Episode, EpisodeKind, FollowUps, TurnGrade, episode_from_rows
from ..rollout.files import folder_at_once
from ..rollout.pool import ReferencePool, rewards_tensor
from ..rollout.rewards import Rewards
from ..rollout.values import optimal_values
from .dataset import REWARDS, VALUE, permutation, permutations

if TYPE_CHECKING:
    from .config import AStarPOConfig, RoundOptions, ValueOptions

logger = logging.getLogger(__name__)

STORED = "stored_episode"
LOW_BETA2 = 0.05
"""Below, a round of several updates destroys the policy (docs/rounds.md, which β2)."""


@dataclass(frozen=True, slots=True)
class StoredEpisode:
    """An episode of a pool with its grades, one a role."""

    episode: Episode
    grades: tuple[TurnGrade, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What a round trains on.

    Attributes:
        number (`int`):
            From 0.
        rows (`list[dict[str, Any]]`):
            A row for each episode: the columns of its problem, the rewards of the prompt's other episodes, V̂, and the episode.
        prompts (`list[dict[str, Any]]`):
            A row for each prompt, with the rewards of all its episodes.
        pool ([`ReferencePool`]):
            Where they come from.
        adapter (`Path`, *optional*):
            The policy that sampled them; None is the reference.
        updates (`int`):
            Most updates of the round.
    """

    number: int
    rows: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    pool: ReferencePool
    adapter: Path | None
    updates: int

    def rows_of_update(self, update: int, count: int, seed: int) -> list[dict[str, Any]]:
        """The `count` rows of an update, from permutations that follow one another without a gap."""
        order = permutations(len(self.rows), update * count, "round", seed, self.number)
        return [self.rows[row] for row in itertools.islice(order, count)]


@dataclass
class Progress:
    """Where a run stands in its rounds.

    Attributes:
        number (`int`):
            The present round; -1 before the first.
        began (`int`):
            The update before which it began.
        is_over (`bool`):
            Whether the guard has ended it.
    """

    number: int = -1
    began: int = 0
    is_over: bool = False


class EndOfRound(TrainerCallback):
    """Saves a checkpoint when a round is over: what follows is waiting or sampling, which a kill should not make dearer.

    Where the guard ended the round, the update that it judged is not made: by then the completions say little about the policy, and
    regressing on them is what destroys it.

    Args:
        is_over (`Callable[[int], bool]`):
            Whether the round is over after so many updates of the run.
        is_stopped (`Callable[[], bool]`):
            Whether the guard has ended the round.
    """

    def __init__(self, is_over: Callable[[int], bool], is_stopped: Callable[[], bool]):
        self._is_over, self._is_stopped = is_over, is_stopped

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradients away: the optimizer leaves a parameter without one as it is, and its moments too.

        (Zeros would not do: Adam would go on by what it remembers.)
        """
        if self._is_stopped():
            for parameter in kwargs["model"].parameters():
                parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the checkpoint."""
        if args.save_strategy != "no" and self._is_over(state.global_step):
            control.should_save = True


def prompts_of_round(number: int, count: int, num_rows: int, seed: int) -> list[int]:
    """The rows of the training set that are asked in a round: the next `count` of permutations of all rows, each once.

    Args:
        number (`int`):
            The round.
        count (`int`):
            Prompts of a round; all rows where there are no more.
        num_rows (`int`):
            Rows of the training set.
        seed (`int`):
            Run seed.
    """
    if count >= num_rows:
        return list(range(num_rows))
    chosen: dict[int, None] = {}
    turn, offset = divmod(number * count, num_rows)
    while len(chosen) < count:
        # A round that begins near the end of one permutation goes on with the next, where a prompt may come again.
        left = permutation(num_rows, "prompts", seed, turn)[offset:]
        chosen |= dict.fromkeys(left[: count - len(chosen)])
        turn, offset = turn + 1, 0
    return list(chosen)


def load_round(
    number: int,
    pool: ReferencePool,
    adapter: Path | None,
    problems: dict[str, dict[str, Any]],
    kind: EpisodeKind,
    follow_ups: FollowUps,
    temperature: float,
    solved_between: Sequence[int] | None,
    most_updates: int,
    rows_per_update: int,
    num_iterations: int,
) -> Round:
    """The rows of a round from its pool.

    Groups without a difference are left out: where all completions of a prompt earned the same, r − V̂ is 0 for each of them. (In episodes
    of several turns the later ones differ; there only `solved_between` leaves prompts out.)

    Args:
        number (`int`):
            The round.
        pool ([`ReferencePool`]):
            Its pool, with all samples.
        adapter (`Path`, *optional*):
            The policy that sampled it.
        problems (`dict[str, dict[str, Any]]`):
            Rows of the training set by prompt id; prompts of the pool that are not among them are left out.
        kind ([`EpisodeKind`]):
            What an episode is.
        follow_ups ([`FollowUps`]):
            The kind's follow-up prompts.
        temperature (`float`):
            β1, or infinity for the mean reward.
        solved_between (`Sequence[int]`, *optional*):
            Train only on prompts that were solved that often.
        most_updates, rows_per_update, num_iterations (`int`):
            How many updates the round has at most, of how many rows, and how often a row is used.
    """
    groups = _groups(pool, kind, follow_ups)
    rows: list[dict[str, Any]] = []
    prompts: list[dict[str, Any]] = []
    for prompt_id, group in groups.items():
        if prompt_id not in problems:
            continue
        rewards = [stored.grades[0].reward for stored in group]
        problem = problems[prompt_id]
        prompts.append({**problem, REWARDS: rewards})
        if not _has_difference(rewards, kind, solved_between):
            continue
        others = [rewards[:index] + rewards[index + 1 :] for index in range(len(group))]
        values = optimal_values(rewards_tensor(others), temperature).tolist()
        for stored, rest, value in zip(group, others, values, strict=True):
            if stored.grades[0].reward is not None:
                rows.append({**problem, REWARDS: rest, VALUE: value, STORED: stored})
    updates = min(most_updates, -(-len(rows) * num_iterations // rows_per_update))
    return Round(number, rows, prompts, pool, adapter, updates)


def _has_difference(rewards: Sequence[float | None], kind: EpisodeKind, solved_between: Sequence[int] | None) -> bool:
    known = [reward for reward in rewards if reward is not None]
    if solved_between is not None:
        return solved_between[0] <= sum(reward > 0 for reward in known) <= solved_between[1]
    return len(set(known)) > 1 or (len(kind.roles) > 1 and bool(known))


def _groups(pool: ReferencePool, kind: EpisodeKind, follow_ups: FollowUps) -> dict[str, list[StoredEpisode]]:
    """The episodes of each prompt, in the order of the pool; samples that failed are not among them."""
    names = ("prompt_id", "sample_index", "completion_ids", "text", "finish_reason", "outcome", "reward", "logprobs")
    table = pool.read(names)
    columns = [table[name].to_pylist() for name in names]
    by_key: dict[tuple[str, int], dict[str, Any]] = {
        (values[0], values[1]): dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)
    }
    turns = len(kind.roles)
    groups: dict[str, list[StoredEpisode]] = {}
    for prompt_id in pool.prompt_ids:
        group = groups.setdefault(prompt_id, [])
        for sample in range(pool.manifest.num_samples):
            found = [by_key.get((prompt_id, turns * sample + turn)) for turn in range(turns)]
            rows = [row for row in found if row is not None]
            if len(rows) == turns:
                episode = episode_from_rows(kind, rows, (), follow_ups)
                group.append(StoredEpisode(episode, tuple(TurnGrade(row["outcome"], row["reward"]) for row in rows)))
    return groups


def without_stored(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[StoredEpisode]]:
    """Rows as reward functions and metrics know them, and the episodes that they came with."""
    return [{name: row[name] for name in row if name != STORED} for row in rows], [row[STORED] for row in rows]


def stored_rewards(stored: Sequence[StoredEpisode], kind: EpisodeKind, functions: int) -> Rewards:
    """What stored answers earned, as if they had just been graded; what single functions gave is known where there is one."""
    weighted_N = torch.tensor(
        [
            torch.nan if grade.reward is None else grade.reward
            for one in stored
            for grade, role in zip(one.grades, kind.roles, strict=True)
            if role in kind.answers and one.episode.turn(role) is not None
        ],
        dtype=torch.float32,
    )
    known = weighted_N if functions == 1 else torch.full_like(weighted_N, torch.nan)
    return Rewards(known[:, None].repeat(1, functions), weighted_N, {}, {})


def save_adapter(model: Any, folder: Path) -> None:
    """Save the policy with which a round begins, in one step; one that is there already stays, since a round may have been sampled by it."""
    if not PartialState().is_main_process:
        return
    layers = LiveLora(model).layers()
    if folder.is_dir():
        saved = SavedLora.open(str(folder)).layers()
        if saved.keys() != layers.keys() or not all(_equal(saved[name], layers[name]) for name in saved):
            logger.warning(
                "`%s` holds another policy than the one in training. It is used as the policy that sampled its round. If it is left over "
                "from another run, delete the folder of the rounds, or choose another --output_dir (--rounds_dir).",
                folder,
            )
        return
    with folder_at_once(folder) as scratch:
        on_cpu = {name: replace(one, a=one.a.cpu(), b=one.b.cpu()) for name, one in layers.items()}
        save_lora(on_cpu, model.peft_config[ADAPTER], scratch)


def _equal(one: LoraFactors, other: LoraFactors) -> bool:
    return torch.equal(one.a, other.a.to(one.a)) and torch.equal(one.b, other.b.to(one.b))


def with_rounds(
    args: "AStarPOConfig", options: "RoundOptions", values: "ValueOptions", peft_config: Any
) -> "AStarPOConfig":
    """The configuration of a run in rounds: as many updates as its rounds have at most, where no number is given.

    Raises:
        ValueError: If an option has no meaning in rounds; the message names it.
    """
    reasons = {
        "use_peft": (peft_config is None, "a round's policy is kept as a LoRA adapter: pass a `peft_config`"),
        "value=critic": (values.value == "critic", "V comes from the other completions of a prompt"),
        "value_prior=network": (
            values.value_prior == "network",
            "a network would be fitted anew to every round's samples",
        ),
        "value_tracking": (
            values.value_tracking and options.num_iterations > 1,
            "at its second use a completion would be compared with a V that knows its own reward: set num_iterations=1",
        ),
        "max_grad_norm=0": (
            args.fp16 and not args.max_grad_norm,
            "under fp16 an update that the guard takes back must have been unscaled, as clipping does: leave it at 1",
        ),
        "mismatch_correction": (args.mismatch_correction != "off", "the loss has no importance weights here"),
        "filter_all_incorrect": (
            args.filter_all_incorrect,
            "prompts whose completions all earned the same are left out anyway",
        ),
    }
    for name, (is_given, reason) in reasons.items():
        if is_given:
            raise ValueError(f"`{name}` is refused in rounds: {reason}.")
    if args.beta2 < LOW_BETA2 and options.updates_per_round > 1:
        logger.warning(
            "beta2=%g is too little to hold the policy near the one that sampled a round, over %d updates of it: set --beta2 0.3 "
            "(docs/rounds.md).",
            *(args.beta2, options.updates_per_round),
        )
    args = copy.copy(args)
    args.num_value_samples = max(args.num_value_samples, options.num_samples)  # V reads all of a group
    if args.max_steps <= 0:
        args.max_steps = options.most_updates
    if args.save_total_limit is None:
        args.save_total_limit = 2  # the end of every round is saved
    return args


@contextmanager
def lagged_policy(model: Any, adapter: Path) -> Iterator[None]:
    """Inside, the model computes with an earlier adapter.

    The factors are exchanged in place, so that whatever wraps the model, or samples with its tensors, need not know.

    Args:
        model ([`~peft.PeftModel`]):
            The policy, without accelerate's wrappers.
        adapter (`Path`):
            A folder that [`save_adapter`] has written.
    """
    live, saved = LiveLora(model).layers(), SavedLora.open(str(adapter)).layers()
    if live.keys() != saved.keys():
        raise ValueError(
            f"The adapter in `{adapter}` is on other layers than the one in training, so it is of another run."
        )
    pairs = [(getattr(live[name], one), getattr(saved[name], one)) for name in live for one in ("a", "b")]
    kept = [tensor.clone() for tensor, _ in pairs]
    with torch.no_grad():
        for tensor, earlier in pairs:
            tensor.copy_(earlier)
    try:
        yield
    finally:
        with torch.no_grad():
            for (tensor, _), present in zip(pairs, kept, strict=True):
                tensor.copy_(present)


def effective_share(log_ratio_B: torch.Tensor) -> float:
    """(Σw)²/(n·Σw²) of the weights w = π/π_lag: 1 where the policy is the one that sampled, 1/n where one completion is all that counts.

    Args:
        log_ratio_B (`torch.Tensor`):
            ln π/π_lag of episodes.
    """
    if len(log_ratio_B) == 0:
        return 1.0
    log_ratio_B = log_ratio_B.double()
    share = torch.exp(2 * log_ratio_B.logsumexp(0) - (2 * log_ratio_B).logsumexp(0)) / len(log_ratio_B)
    return float(share)
