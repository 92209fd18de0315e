"""The training set: V* from a reference pool as a `v_star` column, prompts as token ids, and the order of the rows."""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Sampler

from ..rollout.data import Problem
from ..rollout.episode import sample_seed
from ..rollout.pool import ReferencePool, fingerprint_of_dataset, rewards_tensor
from ..rollout.values import optimal_values
from ..verifier import extract_gold

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import AStarPOConfig, ValueOptions

logger = logging.getLogger(__name__)

REWARDS = "reference_rewards"
VALUE = "v_star"


def training_set(dataset: "Dataset | None", args: "AStarPOConfig", values: "ValueOptions") -> "Dataset":
    """The training set with V*, if its reference rewards are known yet.

    They are those in the data set, or those that the pool named in `args.pool` has for its problems. A data set without
    either is returned as it is: the trainer then does stage 1, unless V is a critic's.

    Args:
        dataset ([`~datasets.Dataset`], *optional*):
            The caller's training set; the pool's own problems when not given.
        args ([`AStarPOConfig`]):
            `pool`, `beta1`, `num_value_samples`.
        values ([`ValueOptions`]):
            What V is made of.

    Raises:
        ValueError: If there is nothing to train on, or the pool does not fit; the message names the fix.
    """
    if dataset is None:
        if args.pool is None:
            raise ValueError(
                "There is nothing to train on: pass a `train_dataset`, or name a reference pool with --pool."
            )
        dataset = ReferencePool.open(str(args.pool)).to_dataset()
    if not hasattr(dataset, "select"):
        raise ValueError(
            f"`train_dataset` is a {type(dataset).__name__}, which cannot be indexed: pass a `datasets.Dataset`, since V* is "
            "looked up row by row."
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"The training set has no `prompt` column, only {', '.join(dataset.column_names)}. Rename the one with the prompts."
        )
    if len(dataset) == 0:
        raise ValueError("The training set is empty. Check --limit, the pool and any filter before it.")
    if values.value == "critic":
        return dataset.remove_columns([REWARDS]) if REWARDS in dataset.column_names else dataset
    if REWARDS in dataset.column_names:
        return with_values(dataset, args, values)
    if args.pool is None:
        return dataset
    joined = _joined(dataset, ReferencePool.open(args.pool), is_partial=values.kappa != 0)
    return with_values(joined, args, values)


def problem_set(dataset: "Dataset | None", args: "AStarPOConfig") -> "Dataset":
    """The training set of a run in rounds: its problems alone, since V comes from what each round samples.

    Args:
        dataset ([`~datasets.Dataset`], *optional*):
            The caller's training set; the problems of the pool in `args.pool` when not given.
        args ([`AStarPOConfig`]):
            `pool`.

    Raises:
        ValueError: If there is nothing to train on.
    """
    if dataset is None:
        if args.pool is None:
            raise ValueError(
                "There is nothing to train on: pass a `train_dataset`, or name a reference pool with --pool."
            )
        dataset = ReferencePool.open(str(args.pool)).to_dataset()
    if "prompt" not in dataset.column_names or len(dataset) == 0:
        raise ValueError("The training set needs a `prompt` column and at least one row.")
    return dataset.remove_columns([name for name in (REWARDS, VALUE) if name in dataset.column_names])


def _joined(dataset: "Dataset", pool: ReferencePool, is_partial: bool) -> "Dataset":
    """Look the data set's problems up in a pool, by their ids."""
    rewards = pool.rewards()
    ids = [problem_of(row).prompt_id for row in dataset.to_list()]
    missing = [row for row, prompt_id in enumerate(ids) if prompt_id not in rewards]
    if is_partial and 0 < len(missing) < len(ids):
        logger.warning("%d of %d prompts have no reference samples; V is that of the prior.", len(missing), len(ids))
        unknown: list[float | None] = [None] * pool.manifest.num_samples
        return dataset.add_column(REWARDS, [rewards.get(prompt_id, unknown) for prompt_id in ids])  # pyright: ignore[reportCallIssue]
    if missing:
        raise ValueError(
            f"The pool in `{pool.folder}` has no samples for {len(missing)} of {len(ids)} rows of the training set, the first is "
            f"row {missing[0]}. Messages (system prompt included) and gold answer must be those that were sampled. Train on "
            "`ReferencePool.open(...).to_dataset()`, leave the pool out and stage 1 is done anew, or set value_prior=network (or "
            "value_kappa) to value rows that were not sampled by the prior."
        )
    return dataset.add_column(REWARDS, [rewards[prompt_id] for prompt_id in ids])  # pyright: ignore[reportCallIssue]


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of a row of a training set, under the same id that `astarpo-rollout` gives it."""
    prompt = row["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    gold = row.get("solution")
    return Problem(tuple(dict(message) for message in messages), "" if gold is None else extract_gold(str(gold)))


def pool_fingerprints(dataset: Any, args: "AStarPOConfig") -> dict[str, dict[str, Any]]:
    """What the pools behind a training set say of themselves, by how messages name them: the pool that was named, and the one that a
    data set was made of."""
    found: dict[str, dict[str, Any]] = {}
    if args.pool is not None:
        found[f"The pool in `{args.pool}`"] = ReferencePool.open(args.pool).manifest.fingerprint
    made = fingerprint_of_dataset(dataset)
    if made is not None and made not in found.values():
        found["The pool that the data set was made of"] = made
    return found


def with_values(dataset: "Dataset", args: "AStarPOConfig", values: "ValueOptions") -> "Dataset":
    """Add V* to a training set, from each row's own reference samples.

    Args:
        dataset ([`~datasets.Dataset`]):
            A data set with a `reference_rewards` column: at least `num_value_samples` rewards per row.
        args ([`AStarPOConfig`]):
            `beta1`, `num_value_samples`.
        values ([`ValueOptions`]):
            What V is made of.

    Raises:
        ValueError: If the rows have too few rewards, if no prompt was ever solved, or if the rewards do not suit the options.
    """
    rewards = _rewards(dataset, args)
    shortest = min(len(row) for row in rewards)
    if shortest < args.num_value_samples:
        raise ValueError(
            f"V* is set to use {args.num_value_samples} reference samples, a prompt has {shortest}. Set "
            f"--num_value_samples {shortest}, or sample more with `astarpo-rollout --num_samples`."
        )
    if not any(reward is not None and reward > 0 for row in rewards for reward in row):
        raise ValueError(
            f"The reference never solved any of the {len(rewards)} prompts, so there is nothing to reinforce: every reward "
            "would stay 0. Use easier problems, a stronger model, longer completions, or check the gold answers with "
            "`astarpo-verify`."
        )
    if values.reads_chances and not are_successes(rewards):
        raise ValueError(
            "value_prior, value_kappa and value_tracking reckon with chances of success, but the rewards of the reference are not all 0 "
            "or 1: leave them out, and V is that of each prompt's own samples."
        )
    v_star = optimal_values(rewards_tensor(rewards), values.temperature(args.beta1)).tolist()
    return dataset.add_column(VALUE, v_star)  # pyright: ignore[reportCallIssue]


def kept_rows(dataset: "Dataset", args: "AStarPOConfig", values: "ValueOptions") -> "Dataset":
    """The rows of a training set that are trained on: those that the reference solved as often as `solved_between` asks for, and those
    without any sample with a signal where the prior values them.

    Raises:
        ValueError: If none is left.
    """
    if REWARDS not in dataset.column_names:
        return dataset
    low, high = values.solved_range(args)
    has_prior, kept = values.kappa != 0, []
    for row, rewards in enumerate(_rewards(dataset, args)):
        known = [reward for reward in rewards if reward is not None]
        if low <= sum(reward > 0 for reward in known) <= high if known else has_prior:
            kept.append(row)
    if not kept:
        raise ValueError(
            f"No prompt was solved between {low} and {high} times in {args.num_value_samples}: widen solved_between."
        )
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def are_successes(rewards: Sequence[Sequence[float | None]]) -> bool:
    """Whether all rewards are 0 or 1."""
    return all(reward in (None, 0.0, 1.0) for row in rewards for reward in row)


def success_counts(rows: Sequence[dict[str, Any]], num_samples: int) -> tuple[list[int], list[int]]:
    """k and N of rows: successes, and reference samples with a signal."""
    known = [[reward for reward in (row.get(REWARDS) or ())[:num_samples] if reward is not None] for row in rows]
    return [int(sum(rewards)) for rewards in known], [len(rewards) for rewards in known]


def with_eval_values(dataset: Any, args: "AStarPOConfig", values: "ValueOptions") -> Any:
    """Add V* to an evaluation set (or a dictionary of them) that has reference rewards; nothing is left out."""
    if isinstance(dataset, dict):
        return {name: with_eval_values(part, args, values) for name, part in dataset.items()}
    if dataset is None or REWARDS not in dataset.column_names or values.value == "critic":
        return dataset
    v_star = optimal_values(rewards_tensor(_rewards(dataset, args)), values.temperature(args.beta1)).tolist()
    return dataset.add_column(VALUE, v_star)


def _rewards(dataset: "Dataset", args: "AStarPOConfig") -> list[list[float | None]]:
    return [list(row[: args.num_value_samples]) for row in dataset[REWARDS]]


def prompt_ids(prompts: Sequence[Any], tokenizer: Any, chat_template_kwargs: dict[str, Any]) -> list[list[int]]:
    """Token ids of prompts, generation prompt included.

    Args:
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Texts, or conversations for the tokenizer's chat template.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        chat_template_kwargs (`dict[str, Any]`):
            Further arguments of the chat template.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    rendered = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **chat_template_kwargs
    )
    return rendered["input_ids"]


def prompt_seeds(prompts: Sequence[Sequence[int]], *parts: str | int) -> list[int]:
    """A seed for each prompt of a batch that depends neither on its place in the batch nor on the process that has it.

    Args:
        prompts (`Sequence[Sequence[int]]`):
            Token ids of this process's prompts.
        *parts (`str` or `int`):
            What else the seeds follow from: mode, run seed, update.
    """
    seen = _counts_on_lower_ranks(prompts)
    seeds = []
    for prompt in prompts:
        key = tuple(prompt)
        seeds.append(sample_seed(*parts, ",".join(map(str, key)), seen[key]))
        seen[key] += 1  # a prompt that appears twice in the global batch gets two seeds
    return seeds


def _counts_on_lower_ranks(prompts: Sequence[Sequence[int]]) -> Counter[tuple[int, ...]]:
    state = PartialState()
    if state.num_processes == 1:
        return Counter()
    keys = gather_object([(state.process_index, tuple(prompt)) for prompt in prompts])
    return Counter(prompt for rank, prompt in keys if rank < state.process_index)


def longest_prompt(datasets: Sequence["Dataset"], tokenize: Callable[[list[Any]], list[list[int]]]) -> int:
    """Tokens of the longest prompt of some data sets."""
    return max(len(ids) for dataset in datasets for ids in tokenize(list(dataset["prompt"])))


def permutations(count: int, position: int, *parts: str | int) -> Iterator[int]:
    """Permutations of `count` numbers that follow one another without a gap, from a position on.

    Args:
        count (`int`):
            How many numbers.
        position (`int`):
            How many to pass over; there is no generator state that would have to be kept.
        *parts (`str` or `int`):
            What the permutations follow from.
    """
    number, offset = divmod(position, count)
    while True:
        yield from permutation(count, *parts, number)[offset:]
        number, offset = number + 1, 0


def permutation(count: int, *parts: str | int) -> list[int]:
    """A permutation of `count` numbers that follows from `parts`."""
    generator = torch.Generator().manual_seed(sample_seed(*parts))
    return torch.randperm(count, generator=generator).tolist()


class PromptOrder(Sampler[int]):
    """Yields row numbers, update after update, from permutations that follow one another without a gap.

    The stream is divided into updates wherever a permutation happens to end, so no row is ever dropped, no batch is ever
    short, and every row comes up exactly once in each permutation. An epoch is the least number of updates that holds all
    rows. There is no generator state: where the stream stands follows from the step, so a resumed run goes on with the rows
    that the uninterrupted one would have taken, in the second epoch as in the first.

    Args:
        num_rows (`int`):
            Rows of the training set.
        update_rows (`int`):
            Rows of one update, over all processes.
        seed (`int`):
            Run seed.
        step (`Callable[[], int]`):
            Updates done so far.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to permute; without, every pass is in the data set's order.
    """

    def __init__(
        self,
        num_rows: int,
        update_rows: int,
        seed: int,
        step: Callable[[], int],
        shuffle: bool = True,
    ):
        self._num_rows, self._update_rows = num_rows, update_rows
        self._seed, self._step, self._shuffle = seed, step, shuffle

    @property
    def updates_per_epoch(self) -> int:
        """The least number of updates that holds all rows."""
        return math.ceil(self._num_rows / self._update_rows)

    def __len__(self) -> int:
        return self.updates_per_epoch * self._update_rows

    def __iter__(self) -> Iterator[int]:
        # The loader skips the updates that a resumed epoch has behind it, so an epoch always begins at its beginning.
        epoch_rows = self.updates_per_epoch * self._update_rows
        begin = self._step() // self.updates_per_epoch * epoch_rows
        yield from itertools.islice(self._rows_from(begin), epoch_rows)

    def _rows_from(self, position: int) -> Iterator[int]:
        if not self._shuffle:
            return itertools.islice(itertools.cycle(range(self._num_rows)), position % self._num_rows, None)
        return permutations(self._num_rows, position, "order", self._seed)
