"""Stage 1 by the trainer itself, when neither the training set nor a pool brings reference rewards."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from ..rollout.engines.interface import Engine, SamplingSettings
from ..rollout.episode import EpisodeKind, EpisodeSampler
from ..rollout.fingerprint import pool_fingerprint
from ..rollout.graders import pool_grader
from ..rollout.options import EngineOptions, ModelOptions, SampleOptions
from ..rollout.pool import PoolWriter
from ..rollout.rewards import RewardFunctions
from ..rollout.sample import fill_pool
from .dataset import REWARDS, problem_of

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import AStarPOConfig

POOL = "reference_pool"


def sample_reference(
    dataset: "Dataset",
    engine: Engine,
    tokenizer: Any,
    tokenize: Callable[[list[Any]], list[list[int]]],
    kind: EpisodeKind,
    reward_functions: RewardFunctions,
    args: "AStarPOConfig",
    engine_options: EngineOptions,
    *,
    model_name: str,
    model_revision: str | None,
    dtype: str,
    chat_template_kwargs: dict[str, Any],
    max_completion_length: int,
    trainer_state: Any,
    process: int,
    num_processes: int,
) -> "Dataset":
    """Sample and grade the reference on a training set, into `output_dir/reference_pool`.

    A pool that is there already is continued, so that a run that was interrupted or is resumed samples nothing twice. Several
    processes share the problems out and have a pool each, in folders of that folder.

    Args:
        dataset ([`~datasets.Dataset`]):
            The training set.
        engine ([`Engine`]):
            An engine that holds the reference.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        tokenize (`Callable`):
            Prompts to token ids.
        kind ([`EpisodeKind`]):
            What an episode is.
        reward_functions ([`RewardFunctions`]):
            Grade the answers, as they will the policy's.
        args ([`AStarPOConfig`]):
            Number of samples, temperature, seed, output folder.
        engine_options ([`EngineOptions`]):
            What the engine was made with.
        model_name, model_revision, dtype, chat_template_kwargs, max_completion_length:
            What else decides a sample.
        trainer_state ([`~transformers.TrainerState`]):
            For reward functions that look at it.
        process, num_processes (`int`):
            This process, and how many there are.

    Returns:
        [`~datasets.Dataset`]: The training set with a `reference_rewards` column.

    Raises:
        ValueError: If episodes of several turns are to be sampled by several processes.
    """
    if num_processes > 1 and len(kind.roles) > 1:
        raise ValueError(
            f"Reference episodes are sampled by one process: make a pool with `astarpo-rollout --episode {kind.name}`, and pass it "
            "as `pool`."
        )
    rows = dataset.to_list()
    by_id = {problem_of(row).prompt_id: row for row in rows[::-1]}
    ids = [problem_of(row).prompt_id for row in rows]
    own = list(dict.fromkeys(ids))[process::num_processes]
    folder = Path(str(args.output_dir)) / POOL
    options = SampleOptions(
        str(folder if num_processes == 1 else folder / f"process-{process + 1}-of-{num_processes}"),
        num_samples=args.num_value_samples,
        max_completion_length=max_completion_length,
        temperature=args.temperature,
        require_eos=args.require_eos,
        seed=args.seed,
    )
    problems = [problem_of(by_id[prompt_id]) for prompt_id in own]
    prompts = tokenize([by_id[prompt_id]["prompt"] for prompt_id in own])
    model = ModelOptions(model_name, model_revision, dtype=dtype)
    fingerprint = pool_fingerprint(model, engine_options, tokenizer, problems, options)
    fingerprint |= kind.fingerprint() | {
        "chat_template_kwargs": chat_template_kwargs,
        "text_prompts": isinstance(rows[0]["prompt"], str),
    }
    grader, said = pool_grader(reward_functions, lambda problem: by_id[problem.prompt_id], trainer_state)
    fingerprint |= said

    def sample() -> dict[str, list[float | None]]:
        if not problems:
            return {}
        settings = SamplingSettings(max_completion_length, args.temperature, logprobs=False)
        sampler = EpisodeSampler(engine, tokenizer, kind, settings)
        with PoolWriter(
            Path(options.output_dir), problems, options.num_samples, fingerprint, len(kind.roles)
        ) as writer:
            return fill_pool(writer, sampler, problems, prompts, options, grader).rewards()

    rewards = sample() if num_processes == 1 else _gathered(sample)
    return dataset.add_column(REWARDS, [rewards[prompt_id] for prompt_id in ids])  # pyright: ignore[reportCallIssue]


def _gathered(sample: Callable[[], dict[str, list[float | None]]]) -> dict[str, list[float | None]]:
    """The rewards of all processes. Where one fails all fail: the others would wait for it until they time out."""
    rewards, error = {}, None
    try:
        rewards = sample()
    except Exception as caught:
        error = caught
    parts = gather_object([(rewards, None if error is None else f"{type(error).__name__}: {error}")])
    if error is not None:
        raise error
    failed = [message for _, message in parts if message is not None]
    if failed:
        raise RuntimeError(f"Stage 1 failed in another process: {failed[0]}")
    return {prompt_id: row for part, _ in parts for prompt_id, row in part.items()}
