"""A fixed bank of attempts, half of them right, on which verifiers are compared.

Recalls in an evaluation are of the evaluated policy's own attempts: a better policy makes other mistakes, those of which it is
sure, so its verifier has a harder task. A bank is made once, of the reference's attempts, and every verifier judges the same ones.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..verifier import Verifier
from .data import Problem
from .episode import SINGLE, Episode, EpisodeSampler, FollowUps, sample_seed
from .pag import VERIFY, Pag, Verdict, chance_of_correct
from .sample import GradeFunction, grade_answers, grade_function


@dataclass(frozen=True, slots=True)
class BankedAttempt:
    """An attempt with what stands before its verification."""

    problem: Problem
    text: str
    is_right: bool
    context: tuple[int, ...]


def make_bank(
    sampler: EpisodeSampler,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    grader: Verifier | GradeFunction,
    *,
    size: int = 100,
    num_samples: int = 8,
    seed: int = 0,
) -> list[BankedAttempt]:
    """Sample attempts, and keep as many right ones as wrong ones, spread over the problems as far as they go.

    Args:
        sampler ([`EpisodeSampler`]):
            Samples the episodes of a [`Pag`]; only its attempts are sampled here.
        problems (`Sequence[Problem]`):
            The problems.
        prompts (`Sequence[Sequence[int]]`):
            Their token ids.
        grader ([`Verifier`] or `GradeFunction`):
            Says which attempts are right.
        size (`int`, *optional*, defaults to `100`):
            How many right ones, and how many wrong ones, at most.
        num_samples (`int`, *optional*, defaults to `8`):
            Attempts to sample for each problem.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `list[BankedAttempt]`: The right ones, then the wrong ones.

    Raises:
        ValueError: If no attempt is right, or none is wrong.
    """
    kind = sampler.kind
    assert isinstance(kind, Pag)
    contexts = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    repeated = [problem for problem in problems for _ in range(num_samples)]
    seeds = [sample_seed("bank", seed, p.prompt_id, n % num_samples) for n, p in enumerate(repeated)]
    episodes = sampler.with_kind(SINGLE).sample(contexts, lambda number, role: seeds[number])
    grades = grade_answers(SINGLE, list(zip(repeated, episodes, strict=True)), grade_function(grader))
    follow_ups = FollowUps.render(sampler.tokenizer, kind)
    found: dict[bool, list[BankedAttempt]] = {True: [], False: []}
    # By sample and then by problem: the first of every problem before the second of any.
    for place in sorted(range(len(episodes)), key=lambda number: number % num_samples):
        episode, grade = episodes[place], grades[place]
        if grade.reward is None:
            continue
        is_right = grade.is_right and not episode.turns[0].is_truncated
        given = follow_ups.before(episode.turns, VERIFY)
        context = (*episode.prompt, *episode.token_ids, *given)
        found[is_right].append(BankedAttempt(repeated[place], episode.turns[0].text, is_right, context))
    count = min(size, len(found[True]), len(found[False]))
    if count == 0:
        raise ValueError(
            f"A bank needs right and wrong attempts, of {len(episodes)} samples {len(found[True])} are right. Take other problems."
        )
    return found[True][:count] + found[False][:count]


def judge_bank(
    sampler: EpisodeSampler,
    bank: Sequence[BankedAttempt],
    agrees: Callable[[BankedAttempt, str], bool | None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Let a policy verify every attempt of a bank once.

    Args:
        sampler ([`EpisodeSampler`]):
            Samples with the policy; its kind is a [`Pag`].
        bank (`Sequence[BankedAttempt]`):
            From [`make_bank`].
        agrees (`Callable`, *optional*):
            Says whether the working in a verification agrees with the attempt; None where there is none to be seen.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        `dict[str, Any]`: `correct_recall` and `wrong_recall`; `youden_j`, their sum less 1, which is 0 for every verifier that does not
        look; `auc`, the chance that a right attempt gets a higher chance of "correct" than a wrong one, among those with a verdict;
        `no_verdict`; `attempts`; and `table`, how often each of "agrees/verdict/truth" came up.
    """
    kind = sampler.kind
    assert isinstance(kind, Pag)
    seeds = [sample_seed("judge", seed, number) for number in range(len(bank))]
    episodes = sampler.with_kind(SINGLE).sample(
        [list(attempt.context) for attempt in bank], lambda number, role: seeds[number]
    )
    verdicts = [kind.verdict(episode.turns[0]) for episode in episodes]
    table = Counter(
        f"{_word(agrees, attempt, episode)}/{verdict}/{'right' if attempt.is_right else 'wrong'}"
        for attempt, episode, verdict in zip(bank, episodes, verdicts, strict=True)
    )
    scores: dict[bool, list[float]] = {True: [], False: []}
    for attempt, episode, verdict in zip(bank, episodes, verdicts, strict=True):
        if verdict is not Verdict.NONE:
            completion = episode.turns[0].completion
            scores[attempt.is_right].append(chance_of_correct(completion, verdict, sampler.decode))
    right, wrong = (
        [v for v, attempt in zip(verdicts, bank, strict=True) if attempt.is_right == truth] for truth in (True, False)
    )
    recalls = right.count(Verdict.CORRECT) / len(right), wrong.count(Verdict.WRONG) / len(wrong)
    return {
        "correct_recall": recalls[0],
        "wrong_recall": recalls[1],
        "youden_j": sum(recalls) - 1,
        "auc": area_under_curve(scores[True], scores[False]) if scores[True] and scores[False] else None,
        "no_verdict": verdicts.count(Verdict.NONE) / len(verdicts),
        "attempts": len(bank),
        "table": dict(sorted(table.items())),
    }


def _word(agrees: Any, attempt: BankedAttempt, episode: Episode) -> str:
    said = None if agrees is None else agrees(attempt, episode.turns[0].text)
    return {True: "agrees", False: "differs", None: "no working"}[said]


def area_under_curve(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that one of the first scores is above one of the second, ties counting half; there must be both."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))
