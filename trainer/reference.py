"""Stage 1 by the trainer itself, when neither the training set nor a pool brings reference rewards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from ..rollout.engines.interface import Engine
from ..rollout.engines.starting import start_engine
from ..rollout.fingerprint import pool_fingerprint
from ..rollout.options import EngineOptions, ModelOptions, SampleOptions
from ..rollout.pool import PoolWriter
from ..rollout.pool.regrading import REWARD_FUNCTIONS
from ..rollout.stage1 import Drawn, GradeFunction, fill_pool
from ..verifier import math_reward
from ..verifier.verifier import shared_verifier
from .dataset import REWARDS, problem_of, with_values

if TYPE_CHECKING:
    from datasets import Dataset

    from .trainer import AStarPOTrainer

POOL = "reference_pool"


def add_reference_values(trainer: "AStarPOTrainer", options: EngineOptions) -> None:
    """Give the trainer's training set V*, from samples of its engine (or of transformers where it has none)."""
    if trainer.accelerator.num_processes > 1 and not _is_ours(trainer.reward_funcs):
        raise ValueError(
            "The training set has no `reference_rewards`, and with several processes the trainer samples them only for "
            "`math_reward` (TRL's loop over other reward functions needs as many samples in every process). Train one update "
            "with one process (`max_steps=1`): it leaves the samples in `output_dir/reference_pool`, to be passed as `pool`. "
            "Or put a `reference_rewards` column into the training set."
        )
    if trainer.accelerator.num_processes > 1 and trainer.turns.options.is_pag:
        raise ValueError(
            "Reference episodes are sampled by one process: make a pool with `astarpo-rollout --episode pag`, and pass it as `pool`."
        )
    if trainer.use_vllm:
        sampled = sample_reference(trainer, trainer.vllm_generation.engine, options)
    else:
        options = replace(options, engine="transformers")
        model = _model_options(trainer)
        engine, _ = start_engine(model, options, [[0] * trainer.longest_prompt()], trainer.max_completion_length)
        sampled = sample_reference(trainer, engine, options)
        engine.close()
    trainer.train_dataset = with_values(sampled, trainer.args)
    for metrics in trainer._metrics.values():  # what reward functions logged belongs to no update
        metrics.clear()
    trainer._pending_metrics.clear()


def sample_reference(trainer: "AStarPOTrainer", engine: Engine, engine_options: EngineOptions) -> "Dataset":
    """Sample and grade the reference on the trainer's training set, into `output_dir/reference_pool`.

    A pool that is there already is continued, so that a run that was interrupted or is resumed samples nothing twice. Several
    processes share the problems out and have a pool each, in folders of that folder.

    Args:
        trainer ([`AStarPOTrainer`]):
            The trainer, whose reward functions grade the samples.
        engine ([`Engine`]):
            An engine that holds the reference.
        engine_options ([`EngineOptions`]):
            What it was made with.

    Returns:
        [`~datasets.Dataset`]: The training set with a `reference_rewards` column.
    """
    args, rows = trainer.args, trainer.train_dataset.to_list()
    by_id = {problem_of(row).prompt_id: row for row in rows[::-1]}
    ids = [problem_of(row).prompt_id for row in rows]
    process, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    unique = list(dict.fromkeys(ids))[process::count]
    folder = Path(str(args.output_dir)) / POOL
    problems = [problem_of(by_id[prompt_id]) for prompt_id in unique]
    texts = [by_id[prompt_id]["prompt"] for prompt_id in unique]
    prompts = trainer._tokenize_prompts(texts)[0] if texts else []
    options = SampleOptions(
        str(folder if count == 1 else folder / f"process-{process + 1}-of-{count}"),
        num_samples=args.num_value_samples,
        max_completion_length=trainer.max_completion_length,
        temperature=trainer.temperature,
        require_eos=args.require_eos,
        seed=args.seed,
    )
    model = _model_options(trainer)
    fingerprint = pool_fingerprint(model, engine_options, trainer._tokenizer, problems, options)
    episodes = trainer.turns.options
    fingerprint |= episodes.fingerprint() | {
        "chat_template_kwargs": trainer.chat_template_kwargs,
        "text_prompts": isinstance(rows[0]["prompt"], str),
    }
    if _is_ours(trainer.reward_funcs):
        grader: Any = shared_verifier()
    else:
        grader = _by_reward_functions(trainer, by_id)
        names = ", ".join(trainer.reward_func_names)
        fingerprint["verifier"] = f"{REWARD_FUNCTIONS} {names}, {trainer.reward_weights.tolist()}"

    def sample() -> dict[str, list[float | None]]:
        if not problems:
            return {}
        with PoolWriter(
            Path(options.output_dir), problems, options.num_samples, fingerprint, episodes.turns
        ) as writer:
            pool = fill_pool(writer, engine, trainer._tokenizer, problems, prompts, options, grader, episodes=episodes)
            return pool.rewards()

    rewards = sample() if count == 1 else _gathered(sample)
    return trainer.train_dataset.add_column(REWARDS, [rewards[prompt_id] for prompt_id in ids])


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


def _model_options(trainer: "AStarPOTrainer") -> ModelOptions:
    config = trainer.model.config
    return ModelOptions(config._name_or_path, trainer.model_revision, dtype=str(config.dtype).split(".")[-1])


def _is_ours(reward_funcs: Sequence[Any]) -> bool:
    return list(reward_funcs) == [math_reward]


def _by_reward_functions(trainer: "AStarPOTrainer", rows: dict[str, dict[str, Any]]) -> GradeFunction:
    def grade(drawn: Sequence[Drawn]) -> list[tuple[str, float | None]]:
        inputs = [rows[d.problem.prompt_id] for d in drawn]
        rewards = trainer.score_completions(inputs, [d.text for d in drawn], [list(d.token_ids) for d in drawn])
        return [("no_signal", None) if reward != reward else ("rewarded", reward) for reward in rewards.tolist()]

    return grade
