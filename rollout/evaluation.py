"""Evaluation: avg@k and pass@k with a 95 % interval."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any

from ..verifier import Grade, Outcome, Verifier
from .data import Problem
from .engines.interface import Completion, Engine, EngineError, Failure, FinishReason, PolicyLink, SamplingSettings
from .progress import JobProgress
from .prompts import sample_seed, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class EvaluatedSample:
    """One completion of an evaluation."""

    question: str
    gold: str
    text: str
    answer: str
    outcome: Outcome
    finish_reason: FinishReason
    correct: bool


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        avg_at_k (`float`):
            Mean accuracy over all samples.
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
            Share of samples cut at the length limit.
        mean_tokens (`float`):
            Mean length of a completion in tokens.
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
    samples: tuple[EvaluatedSample, ...]

    @property
    def accuracy(self) -> float:
        """The same as `avg_at_k`."""
        return self.avg_at_k

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, samples included."""
        return {"accuracy": self.accuracy, **asdict(self)}


def evaluate(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    settings: SamplingSettings,
    verifier: Verifier,
    *,
    num_samples: int = 1,
    require_eos: bool = True,
    seed: int = 0,
    policy: PolicyLink | None = None,
) -> EvaluationReport:
    """Sample k completions per problem and grade them.

    Args:
        engine ([`Engine`]):
            The engine.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        problems (`Sequence[Problem]`):
            The problems.
        settings ([`SamplingSettings`]):
            Temperature (0 is greedy) and length.
        verifier ([`Verifier`]):
            Grades the completions.
        num_samples (`int`, *optional*, defaults to `1`):
            k.
        require_eos (`bool`, *optional*, defaults to `True`):
            Whether a completion cut at the length limit counts as wrong.
        seed (`int`, *optional*, defaults to `0`):
            Run seed.
        policy ([`PolicyLink`], *optional*):
            The policy to evaluate; the engine's own weights when not given.
    """
    if settings.temperature == 0 and num_samples > 1:
        raise ValueError(
            f"Greedy decoding gives the same completion {num_samples} times. Set a temperature above 0 (say 1.0) to draw "
            "several samples, or num_samples=1."
        )
    repeated = [problem for problem in problems for _ in range(num_samples)]
    prompts = [p for p in tokenize_prompts(problems, tokenizer) for _ in range(num_samples)]
    seeds = [sample_seed("evaluate", seed, p.prompt_id, i % num_samples) for i, p in enumerate(repeated)]
    finished: dict[int, Completion] = {}
    with JobProgress("evaluation", len(prompts)) as progress:
        for index, completion in engine.stream(prompts, seeds, settings, policy):
            if isinstance(completion, Failure):
                raise EngineError(
                    f"The engine could not sample {problems[index // num_samples].question[:60]!r}: {completion.reason}"
                )
            finished[index] = completion
            progress.add(1, len(completion.token_ids))
    completions = [finished[index] for index in range(len(prompts))]
    texts = [str(tokenizer.decode(list(c.token_ids), skip_special_tokens=True)) for c in completions]
    grades = verifier.grade_batch(texts, [problem.gold for problem in repeated])
    samples = [
        _evaluated(problem, completion, text, grade, require_eos)
        for problem, completion, text, grade in zip(repeated, completions, texts, grades, strict=True)
    ]
    return _report(samples, completions, len(problems), num_samples)


def _evaluated(
    problem: Problem, completion: Completion, text: str, grade: Grade, require_eos: bool
) -> EvaluatedSample:
    cut = require_eos and completion.finish_reason is FinishReason.LENGTH
    return EvaluatedSample(
        question=problem.question,
        gold=problem.gold,
        text=text,
        answer=grade.answer,
        outcome=grade.outcome,
        finish_reason=completion.finish_reason,
        correct=grade.correct and not cut,
    )


def _report(
    samples: list[EvaluatedSample], completions: list[Completion], num_problems: int, num_samples: int
) -> EvaluationReport:
    correct = [sample.correct for sample in samples]
    rates = [fmean(correct[i : i + num_samples]) for i in range(0, len(correct), num_samples)]
    return EvaluationReport(
        avg_at_k=fmean(rates),
        pass_at_k=fmean(rate > 0 for rate in rates),
        ci95=confidence_interval(rates, num_samples),
        num_problems=num_problems,
        num_samples=num_samples,
        outcomes=dict(Counter(sample.outcome.value for sample in samples)),
        truncated=fmean(c.finish_reason is FinishReason.LENGTH for c in completions),
        mean_tokens=fmean(len(c.token_ids) for c in completions),
        samples=tuple(samples),
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
