"""Stage 1 on PAG episodes: N reference episodes per prompt in a pool, a row for each turn.

A turn that was not reached has a row too (`not_reached`, without reward), so that a pool is complete when all rows are there. The
rows of an episode are committed together.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...verifier import Verifier
from ..data import Problem
from ..engines.interface import EngineError, Failure
from ..pool import PoolWriter, ReferencePool, Sample
from ..pool.manifest import final_reward
from ..progress import JobProgress
from ..prompts import sample_seed
from ..stage1 import Drawn, GradeFunction, Wanted, grade_function, wanted_samples
from .episode import ROLES, Episode, EpisodeSampler, Role, Turn, episodes_at_once
from .rewards import refuse_partial, turn_rewards
from .verdict import Verdict

if TYPE_CHECKING:
    from ..options import SampleOptions

TURNS = len(ROLES)
NOT_REACHED = "not_reached"
VERDICT = "verdict_"
"""How the outcome of a verification begins; its verdict follows."""

Grade = tuple[str, float | None]


def fill_episodes(
    writer: PoolWriter,
    sampler: EpisodeSampler,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    options: "SampleOptions",
    grader: Verifier | GradeFunction,
) -> ReferencePool:
    """Sample and grade the episodes that an open pool is missing. Ctrl-C costs at most the episodes being sampled.

    Args:
        writer ([`PoolWriter`]):
            A pool opened with `turns=3`.
        sampler ([`EpisodeSampler`]):
            Samples the reference (or an adapter).
        problems (`Sequence[Problem]`):
            All problems of the pool.
        prompts (`Sequence[list[int]]`):
            Their token ids.
        options ([`SampleOptions`]):
            Number of episodes per prompt, seed, shards.
        grader ([`Verifier`] or `GradeFunction`):
            Grades attempts and revisions.

    Raises:
        EngineError: If the engine broke down. What was sampled is committed, what it was working on is recorded.
        ValueError: If a grade is neither 0, 1 nor none: the values of the turns are those of chances of success.
    """
    fresh, again = wanted_samples(writer, problems, prompts, options)
    longest = sampler.longest(max(map(len, prompts), default=0))
    step = min(options.shard_rows, episodes_at_once(sampler.engine, longest) or options.shard_rows)
    parts = [fresh[start : start + step] for start in range(0, len(fresh), step)] + again
    grade = grade_function(grader)
    total = TURNS * sum(map(len, parts))
    with JobProgress("stage 1", total, done=writer.manifest.num_rows) as progress:
        observed = sampler.observed(lambda: progress.add(1, 0))
        recorder = _Recorder(writer, observed, grade, options, progress)
        try:
            for part in parts:
                recorder.sample(part)
        finally:
            recorder.commit()
    return ReferencePool(writer.folder, writer.manifest)


@dataclass
class _Recorder:
    """Samples episodes part by part, has them graded, and commits them shard by shard."""

    writer: PoolWriter
    sampler: EpisodeSampler
    grade: GradeFunction
    options: "SampleOptions"
    progress: JobProgress

    def __post_init__(self):
        self._graded: list[Sample] = []
        self._shard_began = time.monotonic()

    def sample(self, part: Sequence[Wanted]) -> None:
        try:
            drawn = self.sampler.try_sample(
                [wanted.prompt_ids for wanted in part],
                lambda number, role: _seed(part[number], role, self.options.seed),
            )
        except EngineError as error:
            self._record([(part[number], str(error)) for number in error.in_flight])
            raise
        pairs = list(zip(part, drawn, strict=True))
        self._record([(wanted, result.reason) for wanted, result in pairs if isinstance(result, Failure)])
        episodes = [(wanted, result) for wanted, result in pairs if isinstance(result, Episode)]
        self._add([wanted for wanted, _ in episodes], [episode for _, episode in episodes])

    def _record(self, failed: Sequence[tuple[Wanted, str]]) -> None:
        slots = [
            (wanted.problem.prompt_id, TURNS * wanted.index + turn, reason)
            for wanted, reason in failed
            for turn in range(TURNS)
        ]
        if slots:
            self.writer.record_failures(slots)
            self.progress.add(0, 0, failed=len(slots))

    def _add(self, wanted: Sequence[Wanted], episodes: Sequence[Episode]) -> None:
        for one, episode, grades in zip(wanted, episodes, self._grades(wanted, episodes), strict=True):
            rows = _rows(one, episode, grades, self.options)
            self._graded += rows
            self.progress.add(TURNS - len(episode.turns), sum(row.num_tokens for row in rows))
        due = time.monotonic() - self._shard_began > self.options.shard_seconds
        if due or len(self._graded) >= self.options.shard_rows:
            self.commit()

    def _grades(self, wanted: Sequence[Wanted], episodes: Sequence[Episode]) -> list[list[Grade]]:
        """Grades of attempts and revisions."""
        answers = [
            Drawn(one.problem, turn.text, turn.completion.token_ids)
            for one, episode in zip(wanted, episodes, strict=True)
            for turn in episode.turns[::2]
        ]
        grades = iter(self.grade(answers) if answers else [])
        graded = [[next(grades) for _ in episode.turns[::2]] for episode in episodes]
        refuse_partial([reward for pair in graded for _, reward in pair])
        return graded

    def commit(self) -> None:
        self.writer.commit(self._graded)
        self._graded, self._shard_began = [], time.monotonic()


def _rows(wanted: Wanted, episode: Episode, grades: Sequence[Grade], options: "SampleOptions") -> list[Sample]:
    answers = [
        (outcome, final_reward(reward, turn.completion.finish_reason.value, options.require_eos))
        for (outcome, reward), turn in zip(grades, episode.turns[::2], strict=True)
    ]
    first = answers[0][1]
    verdict = f"{VERDICT}{episode.verdict}"
    second = answers[1] if len(answers) > 1 else (NOT_REACHED, None)
    results = (answers[0], (verdict, verdict_reward(verdict, first)), second)
    return [
        _row(wanted, role, episode.turn(role), result, options.seed)
        for role, result in zip(ROLES, results, strict=True)
    ]


def _seed(wanted: Wanted, role: Role, seed: int) -> int:
    """The seed of a turn; an attempt's is that of the same sample in a pool of completions."""
    parts = () if role is Role.ATTEMPT else (role,)
    return sample_seed(seed, wanted.problem.prompt_id, wanted.index, *parts)


def _row(wanted: Wanted, role: Role, turn: Turn | None, result: Grade, seed: int) -> Sample:
    first, number = TURNS * wanted.index, ROLES.index(role)
    completion: Any = None if turn is None else turn.completion
    ids = () if completion is None else completion.token_ids
    return Sample(
        prompt_id=wanted.problem.prompt_id,
        sample_index=first + number,
        seed=_seed(wanted, role, seed),
        completion_ids=ids,
        text="" if turn is None else turn.text,
        finish_reason="none" if completion is None else completion.finish_reason.value,
        num_tokens=len(ids),
        outcome=result[0],
        reward=result[1],
        role=role.value,
        turn=number + 1,
        parent=None if number == 0 else first + number - 1,
    )


def verdict_reward(outcome: str, attempt: float | None) -> float | None:
    """Reward of a verification with this outcome, after an attempt with that reward; None where that has no signal."""
    if attempt is None:
        return None
    return turn_rewards(attempt > 0, Verdict(outcome.removeprefix(VERDICT)), None, 0.0)[1]
