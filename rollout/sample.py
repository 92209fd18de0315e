"""Stage 1: sample the frozen reference N times per prompt, grade the samples, and keep them in a pool."""

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
from .engines.interface import Engine, EngineError, Failure, PolicyLink, SamplingSettings
from .episode import (
    NO_TURN,
    SINGLE,
    Episode,
    EpisodeKind,
    EpisodeSampler,
    TurnGrade,
    final_reward,
    grade_turns,
    sample_seed,
)
from .pool import PoolWriter, ReferencePool, Sample
from .progress import JobProgress
from .prompts import tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .options import SampleOptions

GRADE_BATCH = 32
"""Episodes that are sent to the grader together."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a problem, not graded yet."""

    problem: Problem
    text: str
    token_ids: tuple[int, ...]


GradeFunction = Callable[[Sequence[Answer]], Sequence[TurnGrade]]
"""Grades answers, each once and in their order."""


@dataclass(frozen=True, slots=True)
class MissingSample:
    """A completion or an episode that the pool does not have yet."""

    problem: Problem
    index: int
    prompt_ids: tuple[int, ...]


def sample_pool(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    options: "SampleOptions",
    fingerprint: dict[str, Any],
    grader: Verifier | GradeFunction,
    policy: PolicyLink | None = None,
    kind: EpisodeKind = SINGLE,
) -> ReferencePool:
    """Sample and grade whatever the pool in `options.output_dir` is missing.

    The grader works in a thread of its own while the engine samples. Ctrl-C commits what is finished.

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
            From [`pool_fingerprint`]; the kind's own is added to it.
        grader ([`Verifier`] or `GradeFunction`):
            Grades the answers.
        policy ([`PolicyLink`], *optional*):
            A trained adapter, to sample that instead of the model.
        kind ([`EpisodeKind`], *optional*):
            What an episode is; a completion by default.

    Returns:
        [`ReferencePool`]: The pool. It is complete, but for samples on which the engine failed (`manifest.failures`).

    Raises:
        EngineError: If the engine broke down. What was sampled is committed, what it was working on is recorded.
        ValueError: If the folder holds another pool, or an answer of an episode of several turns earned neither 0 nor 1.
    """
    settings = SamplingSettings(options.max_completion_length, options.temperature, logprobs=options.logprobs)
    sampler = EpisodeSampler(engine, tokenizer, kind, settings, policy)
    with PoolWriter(
        Path(options.output_dir), problems, options.num_samples, fingerprint | kind.fingerprint(), len(kind.roles)
    ) as writer:
        return fill_pool(writer, sampler, problems, tokenize_prompts(problems, tokenizer), options, grader)


def fill_pool(
    writer: PoolWriter,
    sampler: EpisodeSampler,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    options: "SampleOptions",
    grader: Verifier | GradeFunction,
    title: str = "stage 1",
) -> ReferencePool:
    """Sample and grade what an open pool is missing; `prompts` are the problems' token ids. See [`sample_pool`]."""
    turns = len(sampler.kind.roles)
    fresh, again = missing_samples(writer, problems, prompts, options.num_samples)
    if not fresh and not again:
        return ReferencePool(writer.folder, writer.manifest)
    step = len(fresh)
    if turns > 1:
        # A part goes through all its turns before the next one begins: what a kill costs is one part.
        longest = sampler.longest(max(map(len, prompts)))
        step = min(options.shard_rows, sampler.at_once(longest) or options.shard_rows)
    parts = [fresh[start : start + step] for start in range(0, len(fresh), max(1, step))] + again
    total = turns * sum(map(len, parts))
    with (
        JobProgress(title, total, "samples" if turns == 1 else "turns", writer.manifest.num_rows) as progress,
        _Recorder(writer, sampler.kind, grade_function(grader), options, progress) as recorder,
    ):
        for part in parts:
            _sample_part(sampler, part, options.seed, recorder, progress)
    return ReferencePool(writer.folder, writer.manifest)


def missing_samples(
    writer: PoolWriter, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], num_samples: int
) -> tuple[list[MissingSample], list[list[MissingSample]]]:
    """Samples that were not tried yet, and those that failed before, one prompt at a time, the least tried first.

    One at a time, because a prompt that takes the whole engine down would take down those beside it at every attempt.
    """
    turns = writer.manifest.turns
    attempts = {(f.prompt_id, f.sample_index): f.attempts for f in writer.manifest.failures}
    fresh: list[MissingSample] = []
    again: list[tuple[int, list[MissingSample]]] = []
    for problem, prompt in zip(problems, prompts, strict=True):
        ids = tuple(prompt)
        missing = [
            MissingSample(problem, index, ids)
            for index in range(num_samples)
            if not writer.has(problem.prompt_id, index * turns)
        ]
        fresh += [one for one in missing if (problem.prompt_id, one.index * turns) not in attempts]
        if failed := [one for one in missing if (problem.prompt_id, one.index * turns) in attempts]:
            again.append((max(attempts[problem.prompt_id, one.index * turns] for one in failed), failed))
    return fresh, [failed for _, failed in sorted(again, key=lambda item: item[0])]


def _sample_part(
    sampler: EpisodeSampler,
    part: Sequence[MissingSample],
    seed: int,
    recorder: "_Recorder",
    progress: JobProgress,
) -> None:
    """Sample one episode for each of `part` and hand them to the recorder as they finish."""

    def seeds(number: int, role: str) -> int:
        return turn_seed(sampler.kind, part[number], role, seed)

    prompts = [missing.prompt_ids for missing in part]
    try:
        for number, episode in sampler.stream(prompts, seeds, lambda: progress.add(1)):
            if isinstance(episode, Failure):
                recorder.add_failures([part[number]], episode.reason)
            else:
                recorder.add(part[number], episode)
    except EngineError as error:
        recorder.add_failures([part[number] for number in error.in_flight], str(error))
        raise


def turn_seed(kind: EpisodeKind, missing: MissingSample, role: str, seed: int) -> int:
    """The seed of a turn. That of a first turn is the same in every kind of pool: all of them hold the same first turns."""
    parts = () if role == kind.roles[0] else (role,)
    return sample_seed(seed, missing.problem.prompt_id, missing.index, *parts)


Batch = list[tuple[MissingSample, Episode]]


class _Recorder:
    """Takes finished episodes, has them graded in the background, and commits them shard by shard."""

    def __init__(
        self,
        writer: PoolWriter,
        kind: EpisodeKind,
        grade: GradeFunction,
        options: "SampleOptions",
        progress: JobProgress,
    ):
        self._writer, self._kind, self._grade, self._options = writer, kind, grade, options
        self._progress = progress
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="astarpo-grading")
        self._ungraded: Batch = []
        self._grading: deque[Future[list[Sample]]] = deque()
        self._graded: list[Sample] = []
        self._shard_began = time.monotonic()

    def __enter__(self) -> "_Recorder":
        return self

    def add(self, missing: MissingSample, episode: Episode) -> None:
        """Take an episode; grading it does not keep the engine waiting."""
        written = sum(len(turn.completion.token_ids) for turn in episode.turns)
        self._progress.add(len(self._kind.roles) - len(episode.turns), written)
        self._ungraded.append((missing, episode))
        if len(self._ungraded) >= min(GRADE_BATCH, self._options.shard_rows):
            self._send()
        self._collect(wait=False)

    def add_failures(self, failed: Sequence[MissingSample], reason: str) -> None:
        """Record samples on which the engine failed, every turn of them."""
        turns = len(self._kind.roles)
        self._writer.record_failures(
            [(one.problem.prompt_id, turns * one.index + turn, reason) for one in failed for turn in range(turns)]
        )
        self._progress.add(failed=len(failed))

    def _send(self) -> None:
        batch, self._ungraded = self._ungraded, []
        if batch:
            self._grading.append(self._thread.submit(graded_rows, self._kind, batch, self._grade, self._options))

    def _collect(self, wait: bool) -> None:
        """Take what is graded, and commit a shard when it is full or due."""
        while self._grading and (wait or self._grading[0].done()):
            rows = self._grading.popleft().result()
            self._graded += rows
            first = [row.reward or 0.0 for row in rows if row.turn == 1]
            self._progress.add_grades(len(first), sum(first))
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


def graded_rows(kind: EpisodeKind, batch: Batch, grade: GradeFunction, options: "SampleOptions") -> list[Sample]:
    """Grade a batch of episodes and return their rows, K for each episode."""
    grades = iter(grade_answers(kind, [(missing.problem, episode) for missing, episode in batch], grade))
    rows: list[Sample] = []
    for missing, episode in batch:
        answers = []
        for turn in episode.turns:
            if turn.role in kind.answers:
                given = next(grades)
                reward = final_reward(given.reward, turn.is_truncated, options.require_eos)
                answers.append(TurnGrade(given.outcome, reward))
        grades_K = grade_turns(kind, episode, answers)
        rows += episode_rows(kind, missing, episode, grades_K, options.seed, options.logprobs)
    return rows


def grade_answers(
    kind: EpisodeKind, episodes: Sequence[tuple[Problem, Episode]], grade: GradeFunction
) -> Sequence[TurnGrade]:
    """Grade the answers of many episodes, each once: those of an episode after one another, in the order of its turns."""
    answers = [
        Answer(problem, turn.text, turn.completion.token_ids)
        for problem, episode in episodes
        for turn in episode.turns
        if turn.role in kind.answers
    ]
    grades = grade(answers) if answers else []
    if len(grades) != len(answers):
        raise ValueError(
            f"The grader returned {len(grades)} grades for {len(answers)} answers. It must return one each."
        )
    return grades


def episode_rows(
    kind: EpisodeKind,
    missing: MissingSample,
    episode: Episode,
    grades: Sequence[TurnGrade],
    seed: int,
    keeps_logprobs: bool = False,
) -> list[Sample]:
    """The rows of an episode, one for each role: also for a turn that was not reached, so that a complete pool has all rows."""
    rows: list[Sample] = []
    first, parent = len(kind.roles) * missing.index, None
    for number, (role, grade) in enumerate(zip(kind.roles, grades, strict=True)):
        turn = episode.turn(role)
        ids = () if turn is None else turn.completion.token_ids
        rows.append(
            Sample(
                prompt_id=missing.problem.prompt_id,
                sample_index=first + number,
                seed=turn_seed(kind, missing, role, seed),
                completion_ids=ids,
                text="" if turn is None else turn.text,
                finish_reason=NO_TURN if turn is None else turn.completion.finish_reason.value,
                num_tokens=len(ids),
                outcome=grade.outcome,
                reward=grade.reward,
                role=role,
                turn=number + 1,
                parent=parent,
                logprobs=(() if turn is None else turn.completion.logprobs) if keeps_logprobs else None,
            )
        )
        if turn is not None:
            parent = first + number
    return rows


def grade_function(grader: Verifier | GradeFunction) -> GradeFunction:
    """A verifier as a function, and a function as it is."""
    if not isinstance(grader, Verifier):
        return grader

    def grade(answers: Sequence[Answer]) -> list[TurnGrade]:
        grades = grader.grade_batch([a.text for a in answers], [a.problem.gold for a in answers])
        return [TurnGrade(grade.outcome.value, reward_of(grade.outcome), grade.answer) for grade in grades]

    return grade
