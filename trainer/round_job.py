"""Sampling a round: the same for the trainer that does it between its updates and for the part that does nothing else."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rollout.engines.interface import SamplingSettings
from ..rollout.engines.start import start_engine
from ..rollout.episode import EpisodeKind, EpisodeSampler, FollowUps, sample_seed
from ..rollout.files import text_hash
from ..rollout.fingerprint import model_identity, pool_fingerprint, tokenizer_identity, verifier_name
from ..rollout.graders import graded_by, pool_grader
from ..rollout.options import EngineOptions, ModelOptions, SampleOptions
from ..rollout.pool import PoolWriter, ReferencePool
from ..rollout.rewards import RewardFunctions
from ..rollout.rounds import RoundFolder, adapter_round, agree, wait_for
from ..rollout.sample import fill_pool
from .config import AStarPOConfig, RoundOptions, completion_length
from .dataset import problem_of
from .rounds import prompts_of_round

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundJob:
    """What a round is sampled from and how.

    Attributes:
        rows (`Sequence[dict[str, Any]]`):
            Rows of the training set.
        count (`int`):
            Prompts of a round.
        options ([`RoundOptions`]):
            Completions a prompt, and the lag.
        args ([`AStarPOConfig`]):
            Length, temperature, seed.
        model ([`ModelOptions`]):
            The reference.
        engine_options ([`EngineOptions`]):
            The engine.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        tokenize (`Callable`):
            Prompts to token ids.
        kind ([`EpisodeKind`]):
            What an episode is.
        rewards ([`RewardFunctions`]):
            Grade the answers.
        chat_template_kwargs (`dict[str, Any]`):
            Further arguments of the chat template.
    """

    rows: Sequence[dict[str, Any]]
    count: int
    options: RoundOptions
    args: AStarPOConfig
    model: ModelOptions
    engine_options: EngineOptions
    tokenizer: "PreTrainedTokenizerBase"
    tokenize: Callable[[list[Any]], list[list[int]]]
    kind: EpisodeKind
    rewards: RewardFunctions
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What all rounds of a run have in common, and both of its parts must agree on."""
        ids = [problem_of(row).prompt_id for row in self.rows]
        return {
            "model": model_identity(self.model.model_name_or_path, self.model.model_revision),
            "tokenizer": tokenizer_identity(self.tokenizer),
            "chat_template": text_hash(str(self.tokenizer.chat_template)),
            "chat_template_kwargs": self.chat_template_kwargs,
            "data": text_hash("".join(ids)),
            "prompts_per_round": self.count,
            "num_samples": self.options.num_samples,
            "lag": self.options.bound,
            "max_completion_length": completion_length(self.args),
            "temperature": self.args.temperature,
            "require_eos": self.args.require_eos,
            "seed": self.args.seed,
            "verifier": verifier_name(),
            **graded_by(self.rewards.functions, self.rewards.weights_F.tolist()),
            **self.kind.fingerprint(),
        }


def path_of_rounds(args: AStarPOConfig, options: RoundOptions) -> Path:
    """Where the rounds of a run are kept."""
    return Path(options.rounds_dir or Path(str(args.output_dir)) / "rounds")


def folder_of_rounds(args: AStarPOConfig, options: RoundOptions) -> RoundFolder:
    """The rounds of a run; a pool that was named is round 0's."""
    first = None if args.pool is None else ReferencePool.open(args.pool).folder
    return RoundFolder(path_of_rounds(args, options), first)


def sample_round(
    folder: RoundFolder, number: int, job: RoundJob, sampler: EpisodeSampler, trainer_state: Any = None
) -> ReferencePool:
    """Sample and grade what is missing of a round.

    Args:
        folder ([`RoundFolder`]):
            Where the rounds are kept.
        number (`int`):
            The round.
        job ([`RoundJob`]):
            What all rounds share.
        sampler ([`EpisodeSampler`]):
            Samples the policy that this round is sampled by.
        trainer_state ([`~transformers.TrainerState`], *optional*):
            For reward functions that look at it.
    """
    chosen = prompts_of_round(number, job.count, len(job.rows), job.args.seed)
    by_id = {problem_of(job.rows[row]).prompt_id: job.rows[row] for row in chosen[::-1]}
    problems = [problem_of(row) for row in by_id.values()]
    prompts = job.tokenize([row["prompt"] for row in by_id.values()])
    options = SampleOptions(
        str(folder.pool(number)),
        num_samples=job.options.num_samples,
        max_completion_length=completion_length(job.args),
        temperature=job.args.temperature,
        require_eos=job.args.require_eos,
        # Another seed every round, else a prompt that comes again would be sampled with the same noise.
        seed=job.args.seed if number == 0 else sample_seed("round", job.args.seed, number),
        logprobs=True,
    )
    fingerprint = pool_fingerprint(job.model, job.engine_options, job.tokenizer, problems, options)
    fingerprint |= job.kind.fingerprint() | folder.sampled_by(number, job.options.bound)
    fingerprint |= {
        "chat_template_kwargs": job.chat_template_kwargs,
        "text_prompts": isinstance(job.rows[0]["prompt"], str),
    }
    grader, said = pool_grader(job.rewards, lambda problem: by_id[problem.prompt_id], trainer_state)
    fingerprint |= said
    folder.pool(number).parent.mkdir(parents=True, exist_ok=True)
    with PoolWriter(folder.pool(number), problems, options.num_samples, fingerprint, len(job.kind.roles)) as writer:
        return fill_pool(writer, sampler, problems, prompts, options, grader, f"round {number}")


def sample_rounds(folder: RoundFolder, job: RoundJob) -> None:
    """Sample all rounds, one after another, as soon as the adapter is there that samples them: the sampler's part of a run.

    The engine of a round is ended after it: while this part waits for the trainer it holds nothing.
    """
    assert job.options.rounds is not None
    agree(folder, job.shared)
    for number in range(job.options.rounds):
        if folder.is_sampled(number):
            continue
        by = adapter_round(number, job.options.bound)
        if by > 0:
            wait_for(folder.adapter(by).is_dir, f"the adapter of round {by} in {folder.adapter(by)}")
        logger.warning("round %d: sampling %s", number, "the reference" if by == 0 else f"the adapter of round {by}")
        model = ModelOptions(
            job.model.model_name_or_path,
            job.model.model_revision,
            adapter=str(folder.adapter(by)) if by > 0 else None,
            dtype=job.model.dtype,
        )
        follow_ups = FollowUps.render(job.tokenizer, job.kind)
        length = completion_length(job.args)
        prompts = job.tokenize([row["prompt"] for row in job.rows])
        engine, policy = start_engine(model, job.engine_options, prompts, follow_ups.longest_after_prompt(length))
        try:
            settings = SamplingSettings(length, job.args.temperature)
            sample_round(folder, number, job, EpisodeSampler(engine, job.tokenizer, job.kind, settings, policy))
        finally:
            engine.close()
