"""Evaluation: avg@k and pass@k with a 95 % interval, and what the kind of episode adds."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from ..verifier import Verifier
from .data import Problem
from .engines.interface import EngineError, Failure, FinishReason
from .episode import (
    Episode,
    EpisodeKind,
    EpisodeSampler,
    GradedEpisode,
    TurnGrade,
    final_reward,
    grade_turns,
    sample_seed,
)
from .progress import JobProgress
from .sample import GradeFunction, grade_answers, grade_function

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class EvaluatedTurn:
    """One turn of an evaluated episode.

    Attributes:
        role (`str`):
            Its role.
        text (`str`):
            What the model wrote.
        answer (`str`):
            The answer that was graded; empty where there is none.
        outcome (`str`):
            The grader's outcome.
        finish_reason (`str`):
            `stop` or `length`.
        correct (`bool`):
            Whether it succeeded.
        counts (`bool`):
            Whether the kind comes to this turn in training too. Other turns are only in the kind's own metrics.
    """

    role: str
    text: str
    answer: str
    outcome: str
    finish_reason: str
    correct: bool
    counts: bool


@dataclass(frozen=True, slots=True)
class EvaluatedSample:
    """One sample of an evaluation. All but `turns` is about the answer that stands in the end."""

    question: str
    gold: str
    text: str
    answer: str
    outcome: str
    finish_reason: str
    correct: bool
    turns: tuple[EvaluatedTurn, ...]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        avg_at_k (`float`):
            Mean accuracy over all samples, of the answer that stands in the end.
        pass_at_k (`float`):
            Share of problems with at least one correct sample among k.
        ci95 (`tuple[float, float]`):
            95 % interval of `avg_at_k` over the choice of problems.
        num_problems (`int`):
            Number of problems.
        num_samples (`int`):
            Samples per problem, k.
        outcomes (`dict[str, int]`):
            How many samples had each outcome.
        truncated (`float`):
            Share of samples with a turn that was truncated at the length limit.
        mean_tokens (`float`):
            Mean number of tokens that the model wrote in a sample.
        metrics (`dict[str, float | None]`):
            What the kind of episode adds; see [`EpisodeKind.report`].
        kind (`dict[str, Any]`):
            The kind's fingerprint; empty for completions.
        samples (`tuple[EvaluatedSample, ...]`):
            Every sample, k after one another for each problem.
    """

    avg_at_k: float
    pass_at_k: float
    ci95: tuple[float, float]
    num_problems: int
    num_samples: int
    outcomes: dict[str, int]
    truncated: float
    mean_tokens: float
    metrics: dict[str, float | None]
    kind: dict[str, Any]
    samples: tuple[EvaluatedSample, ...]

    @property
    def accuracy(self) -> float:
        """The same as `avg_at_k`."""
        return self.avg_at_k

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, samples included. The kind's fingerprint and metrics stand at the top level."""
        content = asdict(self)
        kind, metrics, samples = (content.pop(name) for name in ("kind", "metrics", "samples"))
        if not kind:
            for sample in samples:
                del sample["turns"]  # the one turn is the sample
        return {**kind, "accuracy": self.accuracy, **metrics, **content, "samples": samples}


def evaluate(
    sampler: EpisodeSampler,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    grader: Verifier | GradeFunction,
    *,
    num_samples: int = 1,
    require_eos: bool = True,
    seed: int = 0,
) -> EvaluationReport:
    """Sample k episodes per problem and grade each of their answers once.

    Args:
        sampler ([`EpisodeSampler`]):
            Samples the episodes of its `kind.for_evaluation()`. A temperature of 0 is greedy.
        problems (`Sequence[Problem]`):
            The problems.
        prompts (`Sequence[Sequence[int]]`):
            Their token ids.
        grader ([`Verifier`] or `GradeFunction`):
            Grades the answers. Only a verifier says which answer it graded.
        num_samples (`int`, *optional*, defaults to `1`):
            k.
        require_eos (`bool`, *optional*, defaults to `True`):
            Whether an answer that was truncated at the length limit counts as wrong.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the run.

    Raises:
        ValueError: If several samples are asked of greedy decoding.
        EngineError: If the engine cannot sample a problem.
    """
    if sampler.settings.temperature == 0 and num_samples > 1:
        raise ValueError(
            f"Greedy decoding gives the same sample {num_samples} times. Set a temperature above 0 (say 1.0) to draw several "
            "samples, or num_samples=1."
        )
    kind, sampled_kind = sampler.kind, sampler.kind.for_evaluation()
    repeated = [problem for problem in problems for _ in range(num_samples)]
    contexts = [ids for prompt in prompts for ids in [tuple(prompt)] * num_samples]
    episodes = _sample(sampler.with_kind(sampled_kind), repeated, contexts, num_samples, seed)
    grades = iter(grade_answers(sampled_kind, list(zip(repeated, episodes, strict=True)), grade_function(grader)))
    graded, samples = [], []
    for problem, episode in zip(repeated, episodes, strict=True):
        said = {turn.role: next(grades) for turn in episode.turns if turn.role in sampled_kind.answers}
        counted = [
            _counted(said[turn.role], turn.is_truncated, require_eos) for turn in episode.turns if turn.role in said
        ]
        one = GradedEpisode(episode, grade_turns(sampled_kind, episode, counted))
        graded.append(one)
        samples.append(_evaluated(kind, problem, one, said))
    rates = [
        fmean(sample.correct for sample in samples[start : start + num_samples])
        for start in range(0, len(samples), num_samples)
    ]
    return EvaluationReport(
        avg_at_k=fmean(rates),
        pass_at_k=fmean(rate > 0 for rate in rates),
        ci95=confidence_interval(rates, num_samples),
        num_problems=len(problems),
        num_samples=num_samples,
        outcomes=dict(Counter(sample.outcome for sample in samples)),
        truncated=fmean(any(turn.is_truncated for turn in episode.turns) for episode in episodes),
        mean_tokens=fmean(sum(len(turn.completion.token_ids) for turn in episode.turns) for episode in episodes),
        metrics=kind.report(graded, num_samples, sampler.decode),
        kind=kind.fingerprint(),
        samples=tuple(samples),
    )


def _sample(
    sampler: EpisodeSampler,
    problems: Sequence[Problem],
    contexts: Sequence[tuple[int, ...]],
    num_samples: int,
    seed: int,
) -> list[Episode]:
    turns = len(sampler.kind.roles)

    def seeds(number: int, role: str) -> int:
        parts = () if turns == 1 else (role,)
        return sample_seed("evaluate", seed, problems[number].prompt_id, number % num_samples, *parts)

    finished: dict[int, Episode] = {}
    unit = "samples" if turns == 1 else "turns"
    with JobProgress("evaluation", turns * len(contexts), unit) as progress:
        for number, episode in sampler.stream(contexts, seeds, lambda: progress.add(1)):
            if isinstance(episode, Failure):
                raise EngineError(f"The engine could not sample {problems[number].question[:60]!r}: {episode.reason}")
            finished[number] = episode
            written = sum(len(turn.completion.token_ids) for turn in episode.turns)
            progress.add(turns - len(episode.turns), written)
    return [finished[number] for number in range(len(contexts))]


def _counted(grade: TurnGrade, truncated: bool, require_eos: bool) -> TurnGrade:
    """The grade as it counts: an answer without signal is not right, and a truncated one is none where `require_eos` holds."""
    reward = final_reward(grade.reward or 0.0, truncated, require_eos)
    return TurnGrade(grade.outcome, reward, "" if truncated and require_eos else grade.answer)


def _evaluated(
    kind: EpisodeKind, problem: Problem, graded: GradedEpisode, said: dict[str, TurnGrade]
) -> EvaluatedSample:
    """For people to read: the outcomes and answers as the grader said them."""
    turns = graded.episode.turns
    in_training = len(kind.own_turns(turns))
    evaluated = {}
    for place, turn in enumerate(turns):
        counted = graded.grades[turn.number - 1]
        grade = said.get(turn.role, counted)
        reason: FinishReason = turn.completion.finish_reason
        evaluated[turn.role] = EvaluatedTurn(
            turn.role, turn.text, grade.answer, grade.outcome, reason.value, counted.is_right, place < in_training
        )
    last = evaluated[kind.last_answer(turns).role]
    return EvaluatedSample(
        question=problem.question,
        gold=problem.gold,
        text=last.text,
        answer=last.answer,
        outcome=last.outcome,
        finish_reason=last.finish_reason,
        correct=last.correct,
        turns=tuple(evaluated.values()),
    )


def confidence_interval(rates: Sequence[float], num_samples: int) -> tuple[float, float]:
    """95 % interval of the mean accuracy, problems being the random unit.

    Wilson's for one sample per problem (it stays honest near 0 and 1), the normal one of the problems' means else.

    Args:
        rates (`Sequence[float]`):
            Accuracy on each problem.
        num_samples (`int`):
            Samples per problem.
    """
    count, mean = len(rates), fmean(rates)
    spread = stdev(rates) if count > 1 else 0.0
    if num_samples > 1 and spread > 0:
        half = Z95 * spread / math.sqrt(count)
        return max(0.0, mean - half), min(1.0, mean + half)
    centre = (mean + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(mean * (1 - mean) / count + Z95**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
