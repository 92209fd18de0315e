"""Evaluation: avg@k, pass@k and maj@k with 95 % intervals, and what the kind of episode adds."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
class Estimate:
    """A mean over problems, and its 95 % interval over the choice of problems."""

    value: float
    ci95: tuple[float, float]


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
        pass_at (`dict[int, Estimate]`):
            pass@j for every j up to k, without bias: the chance that one of j of the k samples is correct.
        maj_at_k (`Estimate`):
            Chance that the answer which most samples give is correct; a tie is decided by lot, and truncated answers do not vote.
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
    pass_at: "dict[int, Estimate]"
    maj_at_k: "Estimate"
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

    def to_json(self, evaluated: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The report as plain data, samples included. The kind's fingerprint and metrics stand at the top level.

        Args:
            evaluated (`Mapping[str, Any]`, *optional*):
                What was evaluated and how, see [`evaluated_with`].
        """
        content = asdict(self)
        content["pass_at"] = {str(k): one for k, one in content["pass_at"].items()}
        kind, metrics, samples = (content.pop(name) for name in ("kind", "metrics", "samples"))
        if not kind:
            for sample in samples:
                del sample["turns"]  # the one turn is the sample
        header = {} if evaluated is None else {"evaluated": dict(evaluated)}
        return {**header, **kind, "accuracy": self.accuracy, **metrics, **content, "samples": samples}


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
    by_problem = [samples[start : start + num_samples] for start in range(0, len(samples), num_samples)]
    right = [sum(sample.correct for sample in some) for some in by_problem]
    rates = [count / num_samples for count in right]
    votes = majority_chances(by_problem, grader if isinstance(grader, Verifier) else None, require_eos)
    return EvaluationReport(
        avg_at_k=fmean(rates),
        pass_at_k=fmean(rate > 0 for rate in rates),
        ci95=confidence_interval(rates, num_samples),
        pass_at={
            k: _estimate([pass_at_k(num_samples, count, k) for count in right]) for k in range(1, num_samples + 1)
        },
        maj_at_k=_estimate(votes),
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


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of k samples is correct, drawn without replacement from `num_samples` (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_chances(
    problems: Sequence[Sequence[EvaluatedSample]], verifier: Verifier | None, require_eos: bool = False
) -> list[float]:
    """For each problem the chance that the answer which most of its samples give is correct.

    Correct answers are one answer. Wrong ones are one where their text is the same, or where the verifier says so.

    Args:
        problems (`Sequence[Sequence[EvaluatedSample]]`):
            The samples of each problem.
        verifier ([`Verifier`], *optional*):
            Compares wrong answers; without, only their text counts.
        require_eos (`bool`, *optional*, defaults to `False`):
            Whether truncated answers have no vote.
    """
    if require_eos:
        problems = [[one for one in some if one.finish_reason != FinishReason.LENGTH] for some in problems]
    wrong = [
        Counter("".join(sample.answer.split()) for sample in some if not sample.correct and sample.answer)
        for some in problems
    ]
    pairs = [(place, *pair) for place, texts in enumerate(wrong) for pair in itertools.combinations(texts, 2)]
    same: dict[int, list[tuple[str, str]]] = defaultdict(list)
    if verifier is not None and pairs:
        grades = verifier.grade_batch([rf"\boxed{{{one}}}" for _, one, _ in pairs], [other for _, _, other in pairs])
        for (place, one, other), grade in zip(pairs, grades, strict=True):
            if grade.correct:
                same[place].append((one, other))
    chances = []
    for place, (some, texts) in enumerate(zip(problems, wrong, strict=True)):
        for one, other in same[place]:
            if one in texts and other in texts:
                texts[one] += texts.pop(other)
        correct = sum(sample.correct for sample in some)
        most = max([correct, *texts.values()])
        tied = sum(count == most for count in texts.values()) + (correct == most)
        chances.append(1 / tied if correct == most > 0 else 0.0)
    return chances


def _estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of values between 0 and 1, one a problem."""
    is_binary = all(value in (0, 1) for value in values)
    return Estimate(fmean(values), confidence_interval(values, 1 if is_binary else 2))


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
