"""Stage 1: sample the frozen reference N times per prompt, grade, and keep the result as a pool."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verifier import Verifier
from ..verifier.reward import reward_of
from .data import Problem
from .engines.interface import Completion, Engine, EngineError, Failure, PolicyLink, SamplingSettings
from .pool import PoolWriter, ReferencePool, Sample
from .pool.manifest import final_reward
from .progress import JobProgress
from .prompts import sample_seed, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .episodes.options import EpisodeOptions
    from .options import SampleOptions

GRADE_BATCH = 32


@dataclass(frozen=True, slots=True)
class Drawn:
    """A completion of a problem, not graded yet."""

    problem: Problem
    text: str
    token_ids: tuple[int, ...]


GradeFunction = Callable[[Sequence[Drawn]], Sequence[tuple[str, float | None]]]
"""Grades completions: for each the outcome's name and the reward, `None` for no signal."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A completion or an episode that the pool does not have yet."""

    problem: Problem
    index: int
    prompt_ids: list[int]
    seed: int


def sample_pool(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    options: "SampleOptions",
    fingerprint: dict[str, Any],
    grader: Verifier | GradeFunction,
    policy: PolicyLink | None = None,
    episodes: "EpisodeOptions | None" = None,
) -> ReferencePool:
    """Sample and grade whatever the pool in `options.output_dir` is missing.

    The verifier works in a thread of its own while the engine decodes. Ctrl-C commits what is finished.

    Args:
        engine ([`Engine`]):
            The engine.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        problems (`Sequence[Problem]`):
            All problems of the pool.
        options ([`SampleOptions`]):
            Number of samples, lengths, folder.
        fingerprint (`dict[str, Any]`):
            From [`pool_fingerprint`].
        grader ([`Verifier`] or `GradeFunction`):
            Grades the samples.
        policy ([`PolicyLink`], *optional*):
            A trained adapter, to sample that instead of the model.
        episodes ([`EpisodeOptions`], *optional*):
            What an episode is; completions when not given. Its `fingerprint()` must be part of the fingerprint.

    Returns:
        [`ReferencePool`]: The complete pool, but for samples that the engine could not draw (`manifest.failures`).

    Raises:
        EngineError: If the engine broke down. What was sampled is committed, what it was working on is recorded.
    """
    turns = episodes.turns if episodes else 1
    with PoolWriter(Path(options.output_dir), problems, options.num_samples, fingerprint, turns) as writer:
        prompts = tokenize_prompts(problems, tokenizer)
        return fill_pool(writer, engine, tokenizer, problems, prompts, options, grader, policy, episodes)


def fill_pool(
    writer: PoolWriter,
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    options: "SampleOptions",
    grader: Verifier | GradeFunction,
    policy: PolicyLink | None = None,
    episodes: "EpisodeOptions | None" = None,
) -> ReferencePool:
    """Sample and grade what an open pool is missing; `prompts` are the problems' token ids. See [`sample_pool`]."""
    settings = SamplingSettings(options.max_completion_length, options.temperature, logprobs=False)
    if episodes is not None and episodes.is_pag:
        from .episodes.stage1 import fill_episodes

        sampler = episodes.sampler(engine, tokenizer, settings, policy)
        return fill_episodes(writer, sampler, problems, prompts, options, grader)
    fresh, again = wanted_samples(writer, problems, prompts, options)
    if fresh or again:
        with _Recorder(
            writer, tokenizer, grade_function(grader), options, len(fresh) + sum(map(len, again))
        ) as recorder:
            for part in [fresh, *again]:
                if part:
                    _sample_part(engine, part, settings, policy, recorder)
    return ReferencePool(writer.folder, writer.manifest)


def wanted_samples(
    writer: PoolWriter, problems: Sequence[Problem], prompts: Sequence[list[int]], options: "SampleOptions"
) -> tuple[list[Wanted], list[list[Wanted]]]:
    """What is missing: samples not tried yet, and those that failed before, one prompt at a time, the least tried first.

    One at a time, because a prompt that takes the whole engine down would take down those beside it at every attempt.
    """
    turns = writer.manifest.turns
    attempts = {(f.prompt_id, f.sample_index): f.attempts for f in writer.manifest.failures}
    fresh: list[Wanted] = []
    again: list[tuple[int, list[Wanted]]] = []
    for problem, prompt_ids in zip(problems, prompts, strict=True):
        missing = [
            Wanted(problem, index, prompt_ids, sample_seed(options.seed, problem.prompt_id, index))
            for index in range(options.num_samples)
            if not writer.has(problem.prompt_id, index * turns)
        ]
        fresh += [w for w in missing if (problem.prompt_id, w.index * turns) not in attempts]
        if failed := [w for w in missing if (problem.prompt_id, w.index * turns) in attempts]:
            again.append((max(attempts[problem.prompt_id, w.index * turns] for w in failed), failed))
    return fresh, [failed for _, failed in sorted(again, key=lambda item: item[0])]


def _sample_part(
    engine: Engine, part: list[Wanted], settings: SamplingSettings, policy: PolicyLink | None, recorder: "_Recorder"
) -> None:
    try:
        for index, completion in engine.stream([w.prompt_ids for w in part], [w.seed for w in part], settings, policy):
            recorder.add(part[index], completion)
    except EngineError as error:
        recorder.add_failures([part[index] for index in error.in_flight], str(error))
        raise


class _Recorder:
    """Takes finished completions, has them graded in the background and commits them shard by shard."""

    def __init__(
        self,
        writer: PoolWriter,
        tokenizer: "PreTrainedTokenizerBase",
        grade: GradeFunction,
        options: "SampleOptions",
        total: int,
    ):
        self._writer, self._tokenizer, self._grade_all, self._options = writer, tokenizer, grade, options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="astarpo-grading")
        self._ungraded: list[tuple[Wanted, Completion, str]] = []
        self._grading: deque[Future[list[Sample]]] = deque()
        self._graded: list[Sample] = []
        self._shard_began = time.monotonic()
        self._progress = JobProgress("stage 1", total, done=writer.manifest.num_rows)

    def __enter__(self) -> "_Recorder":
        self._progress.__enter__()
        return self

    def add(self, wanted: Wanted, completion: Completion | Failure) -> None:
        if isinstance(completion, Failure):
            self.add_failures([wanted], completion.reason)
            return
        text = str(self._tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))
        self._ungraded.append((wanted, completion, text))
        if len(self._ungraded) >= min(GRADE_BATCH, self._options.shard_rows):
            self._send()
        self._collect(wait=False)

    def add_failures(self, wanted: Sequence[Wanted], reason: str) -> None:
        self._writer.record_failures([(w.problem.prompt_id, w.index, reason) for w in wanted])
        self._progress.add(0, 0, failed=len(wanted))

    def _send(self) -> None:
        batch, self._ungraded = self._ungraded, []
        if batch:
            self._grading.append(self._thread.submit(self._grade, batch))

    def _grade(self, batch: list[tuple[Wanted, Completion, str]]) -> list[Sample]:
        drawn = [Drawn(wanted.problem, text, completion.token_ids) for wanted, completion, text in batch]
        grades = self._grade_all(drawn)
        return [
            _sample(wanted, completion, text, grade, self._options.require_eos)
            for (wanted, completion, text), grade in zip(batch, grades, strict=True)
        ]

    def _collect(self, wait: bool) -> None:
        while self._grading and (wait or self._grading[0].done()):
            samples = self._grading.popleft().result()
            self._graded += samples
            self._progress.add(len(samples), sum(s.num_tokens for s in samples), sum(s.reward or 0.0 for s in samples))
        due = time.monotonic() - self._shard_began > self._options.shard_seconds
        if len(self._graded) >= self._options.shard_rows or (self._graded and (due or wait)):
            self._writer.commit(self._graded)
            self._graded, self._shard_began = [], time.monotonic()

    def __exit__(self, *error: Any) -> None:
        # Also after Ctrl-C: what was sampled is graded and committed, and the next run continues from there.
        try:
            self._send()
            self._collect(wait=True)
        finally:
            self._thread.shutdown()
            self._progress.__exit__(*error)


def _sample(
    wanted: Wanted, completion: Completion, text: str, grade: tuple[str, float | None], require_eos: bool
) -> Sample:
    outcome, reward = grade
    return Sample(
        prompt_id=wanted.problem.prompt_id,
        sample_index=wanted.index,
        seed=wanted.seed,
        completion_ids=completion.token_ids,
        text=text,
        finish_reason=completion.finish_reason.value,
        num_tokens=len(completion.token_ids),
        outcome=outcome,
        reward=final_reward(reward, completion.finish_reason.value, require_eos),
    )


def grade_function(grader: Verifier | GradeFunction) -> GradeFunction:
    """A verifier as a function, and a function as it is."""
    if not isinstance(grader, Verifier):
        return grader

    def grade(drawn: Sequence[Drawn]) -> list[tuple[str, float | None]]:
        grades = grader.grade_batch([d.text for d in drawn], [d.problem.gold for d in drawn])
        return [(grade.outcome.value, reward_of(grade.outcome)) for grade in grades]

    return grade
