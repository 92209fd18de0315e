"""Evaluation of PAG episodes: how good are the attempts, the verdicts, and what revising makes of it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ...verifier import Grade, Verifier
from ..data import Problem
from ..evaluation import confidence_interval
from ..progress import JobProgress
from ..prompts import sample_seed
from .episode import Episode, EpisodeSampler, Role
from .verdict import Verdict, chance_of_correct


@dataclass(frozen=True, slots=True)
class EvaluatedEpisode:
    """One episode, for people to read and to count.

    Attributes:
        question (`str`):
            The problem.
        gold (`str`):
            Its answer.
        attempt, verification, revision (`str`):
            What the model wrote; the revision is empty where there is none.
        verdict ([`Verdict`]):
            What the verification says.
        confidence (`float`):
            How sure the model is that the attempt is correct, from the word that says so; 0 without a verdict.
        first_answer, second_answer (`str`):
            The answers that were judged; empty where there is none, or where it was cut and therefore does not count.
        first_right, second_right (`bool`):
            Whether they are right; the second is False where there is none.
        is_revised (`bool`):
            Whether the verdict was "wrong".
        is_revised_officially (`bool`):
            Whether it was not "correct", which is the gate in PAG's own evaluation.
    """

    question: str
    gold: str
    attempt: str
    verification: str
    revision: str
    verdict: Verdict
    confidence: float
    first_answer: str
    second_answer: str
    first_right: bool
    second_right: bool
    is_revised: bool
    is_revised_officially: bool

    @property
    def final_right(self) -> bool:
        """Whether the answer that stands in the end is right."""
        return self.second_right if self.is_revised else self.first_right

    @property
    def verdict_right(self) -> bool:
        """Whether the verdict is true; no verdict never is."""
        return self.verdict is not Verdict.NONE and (self.verdict is Verdict.CORRECT) == self.first_right


@dataclass(frozen=True, slots=True)
class EpisodeReport:
    """What an evaluation of episodes found; all but the counts are shares of all episodes unless said otherwise.

    Attributes:
        acc_t1 (`float`):
            Attempts that are right.
        acc_final (`float`):
            Episodes whose last answer is right: the revision's where the verdict was "wrong".
        acc_final_official (`float`):
            The same under PAG's own evaluation gate, which also revises where there is no verdict.
        ci95 (`tuple[float, float]`):
            95 % interval of `acc_final` over the choice of problems.
        improved, spoiled (`float`):
            Episodes that go from wrong to right, and from right to wrong.
        revise_rate (`float`):
            Episodes with the verdict "wrong".
        answer_change (`float`, *optional*):
            Share of the revised ones whose answer differs from the first; two right ones are the same in any notation.
        verifier_accuracy (`float`):
            Verdicts that are true.
        correct_recall, wrong_recall (`float`, *optional*):
            Share of the right attempts called correct, and of the wrong ones called wrong.
        no_verdict (`float`):
            Verifications without a verdict.
        best_of_n, majority_vote (`float`):
            Accuracy of the attempt among a problem's samples that the verifier calls correct, the surest of several; and of the
            most frequent answer, where right ones are the same in any notation.
        verdict_parser (`str`):
            The parser; figures of different ones cannot be compared.
        num_problems, num_samples (`int`):
            Problems, and episodes per problem.
        episodes (`tuple[EvaluatedEpisode, ...]`):
            Every episode, those of a problem after one another.
    """

    acc_t1: float
    acc_final: float
    acc_final_official: float
    ci95: tuple[float, float]
    improved: float
    spoiled: float
    revise_rate: float
    answer_change: float | None
    verifier_accuracy: float
    correct_recall: float | None
    wrong_recall: float | None
    no_verdict: float
    best_of_n: float
    majority_vote: float
    verdict_parser: str
    num_problems: int
    num_samples: int
    episodes: tuple[EvaluatedEpisode, ...]

    def __post_init__(self):
        recalled = self.acc_t1 * (self.correct_recall or 0.0) + (1 - self.acc_t1) * (self.wrong_recall or 0.0)
        identities = {
            "Acc@final = Acc@t1 + improved - spoiled": (self.acc_final, self.acc_t1 + self.improved - self.spoiled),
            "verifier accuracy = Acc@t1 x CR + (1 - Acc@t1) x WR": (self.verifier_accuracy, recalled),
        }
        for name, (left, right) in identities.items():
            if not math.isclose(left, right, abs_tol=1e-9):
                raise RuntimeError(
                    f"The report contradicts itself: {name}, but {left} and {right}. Please report this."
                )

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, episodes included."""
        return {"episode": "pag", "accuracy": self.acc_final, **asdict(self)}


def evaluate_episodes(
    sampler: EpisodeSampler,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    verifier: Verifier,
    *,
    num_samples: int = 1,
    require_eos: bool = True,
    seed: int = 0,
) -> EpisodeReport:
    """Sample k episodes per problem and judge them.

    Args:
        sampler ([`EpisodeSampler`]):
            Engine, policy, templates and parser.
        problems (`Sequence[Problem]`):
            The problems.
        prompts (`Sequence[Sequence[int]]`):
            Their token ids.
        verifier ([`Verifier`]):
            Grades attempts and revisions.
        num_samples (`int`, *optional*, defaults to `1`):
            k.
        require_eos (`bool`, *optional*, defaults to `True`):
            Whether an answer cut at the length limit counts as wrong.
        seed (`int`, *optional*, defaults to `0`):
            Run seed.
    """
    if sampler.settings.temperature == 0 and num_samples > 1:
        raise ValueError(
            f"Greedy decoding gives the same episode {num_samples} times. Set --temperature or --num_samples 1."
        )
    repeated = [problem for problem in problems for _ in range(num_samples)]
    contexts = [prompt for prompt in prompts for _ in range(num_samples)]

    def seeds(number: int, role: Role) -> int:
        return sample_seed("evaluate", seed, repeated[number].prompt_id, number % num_samples, role)

    with JobProgress("evaluation", 2 * len(contexts)) as progress:  # revisions come on top
        episodes = sampler.observed(lambda: progress.add(1, 0)).sample(contexts, seeds, (Verdict.WRONG, Verdict.NONE))
    judged = judge_episodes(episodes, repeated, verifier, sampler, require_eos)
    return report_episodes(judged, num_samples, sampler.parser)


def judge_episodes(
    episodes: Sequence[Episode],
    problems: Sequence[Problem],
    verifier: Verifier,
    sampler: EpisodeSampler,
    require_eos: bool,
) -> list[EvaluatedEpisode]:
    """Grade attempts and revisions."""
    revised = [number for number, episode in enumerate(episodes) if episode.turn(Role.REVISE) is not None]
    firsts = verifier.grade_batch(
        [episode.turns[0].text for episode in episodes], [problem.gold for problem in problems]
    )
    seconds: dict[int, Grade] = dict(
        zip(
            revised,
            verifier.grade_batch(
                [episodes[number].turns[2].text for number in revised], [problems[number].gold for number in revised]
            ),
            strict=True,
        )
    )
    return [
        _judged(episode, problem, first, seconds.get(number), sampler, require_eos)
        for number, (episode, problem, first) in enumerate(zip(episodes, problems, firsts, strict=True))
    ]


def _judged(
    episode: Episode,
    problem: Problem,
    first: Grade,
    second: Grade | None,
    sampler: EpisodeSampler,
    require_eos: bool,
) -> EvaluatedEpisode:
    attempt, verification, revision = (episode.turn(role) for role in Role)
    assert attempt is not None and verification is not None
    first_counts_not = require_eos and attempt.is_cut
    second_counts_not = require_eos and revision is not None and revision.is_cut
    return EvaluatedEpisode(
        question=problem.question,
        gold=problem.gold,
        attempt=attempt.text,
        verification=verification.text,
        revision="" if revision is None else revision.text,
        verdict=episode.verdict,
        confidence=chance_of_correct(verification.completion, episode.verdict, sampler.decode),
        first_answer="" if first_counts_not else first.answer,
        second_answer="" if second is None or second_counts_not else second.answer,
        first_right=first.correct and not first_counts_not,
        second_right=second is not None and second.correct and not second_counts_not,
        is_revised=episode.verdict is Verdict.WRONG,
        is_revised_officially=episode.verdict is not Verdict.CORRECT,
    )


def report_episodes(episodes: Sequence[EvaluatedEpisode], num_samples: int, parser: str) -> EpisodeReport:
    """Count."""
    groups = [episodes[start : start + num_samples] for start in range(0, len(episodes), num_samples)]
    finals = [fmean(episode.final_right for episode in group) for group in groups]
    revised = [episode for episode in episodes if episode.is_revised]
    return EpisodeReport(
        acc_t1=fmean(episode.first_right for episode in episodes),
        acc_final=fmean(episode.final_right for episode in episodes),
        acc_final_official=fmean(
            episode.second_right if episode.is_revised_officially else episode.first_right for episode in episodes
        ),
        ci95=confidence_interval(finals, num_samples),
        improved=fmean(not episode.first_right and episode.final_right for episode in episodes),
        spoiled=fmean(episode.first_right and not episode.final_right for episode in episodes),
        revise_rate=len(revised) / len(episodes),
        answer_change=_share([_answers_differ(episode) for episode in revised]),
        verifier_accuracy=fmean(episode.verdict_right for episode in episodes),
        correct_recall=_share([episode.verdict_right for episode in episodes if episode.first_right]),
        wrong_recall=_share([episode.verdict_right for episode in episodes if not episode.first_right]),
        no_verdict=fmean(episode.verdict is Verdict.NONE for episode in episodes),
        best_of_n=fmean(max(group, key=_trust).first_right for group in groups),
        majority_vote=fmean(_majority_is_right(group) for group in groups),
        verdict_parser=parser,
        num_problems=len(groups),
        num_samples=num_samples,
        episodes=tuple(episodes),
    )


def _share(hits: Sequence[bool]) -> float | None:
    return fmean(hits) if hits else None


def _answers_differ(episode: EvaluatedEpisode) -> bool:
    both_right = episode.first_right and episode.second_right
    return not both_right and episode.second_answer != episode.first_answer


def _trust(episode: EvaluatedEpisode) -> tuple[bool, float]:
    return episode.verdict is Verdict.CORRECT, episode.confidence


def _majority_is_right(group: Sequence[EvaluatedEpisode]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones that of the earlier sample."""
    votes = [(episode.first_right, "" if episode.first_right else episode.first_answer) for episode in group]
    counts = Counter(vote for vote in votes if vote != (False, ""))  # no answer is no vote
    return counts.most_common(1)[0][0][0] if counts else False
