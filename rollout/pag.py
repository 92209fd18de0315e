"""PAG (arXiv 2506.10406): the policy verifies its own attempt, and revises it where it says that it is wrong.

The only file that knows what "verify" and "revise" mean.
"""

import bisect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..verifier.answers.verdicts import ABOUT_AN_ANSWER, says_correct
from .engines.interface import Completion
from .episode import ATTEMPT, SINGLE, EpisodeKind, GradedEpisode, Turn, TurnGrade, load_kind
from .options import EpisodeOptions

if TYPE_CHECKING:
    import torch

VERIFY, REVISE = "verify", "revise"
VERIFY_PROMPT = (
    "Check the math solution step-by-step. If you find a mistake: state the wrong step, explain why it's wrong, and end your "
    "response with 'The answer is wrong.' If all steps are correct, end your response with 'The answer is correct.'"
)
REVISE_PROMPT = (
    "You indicated that your previous answer was wrong. Please provide the correct solution to the math problem."
)
PARSERS = ("strict", "official", "lenient")
VERDICT = "verdict_"
"""How the outcome of a verification begins in a pool; its verdict follows."""

_OFFICIAL = re.compile(r"The answer is (correct|wrong)\.$")
_SENTENCE = re.compile(r"The answer is (?:correct|wrong)")
_LENIENT = re.compile(rf"\b{ABOUT_AN_ANSWER}(?!\s*[-?])", re.IGNORECASE)
_SUPPOSED = re.compile(r"\b(?:if|whether|unless)\b[^.!?\n]*$", re.IGNORECASE)


class Verdict(StrEnum):
    """What a verification says of the attempt. The values double as metric names."""

    CORRECT = "correct"
    WRONG = "wrong"
    NONE = "none"
    """No verdict, or more than one."""


@dataclass(frozen=True)
class Pag(EpisodeKind):
    """An attempt, its verification by the same model, and a revision where the verdict was "wrong".

    Rewards (section 3 of the paper), with z = acc(attempt): R₁ = z, R_v = 1 where the verdict is true of the attempt (no verdict
    never is), R₂ = acc(revision) + α (acc(revision) − z).

    Args:
        verify_prompt (`str`, *optional*):
            Asks to check the attempt; PAG's own when not given.
        revise_prompt (`str`, *optional*):
            Asks for another solution; PAG's own when not given.
        verdict_parser (`str`, *optional*, defaults to `"strict"`):
            `strict`, `official` or `lenient`, see [`parse_verdict`].
        alpha (`float`, *optional*, defaults to `1.0`):
            α, at least 0.
        revise_on (`tuple[Verdict, ...]`, *optional*):
            Verdicts after which the model revises: "wrong" in training, and no verdict too in PAG's own evaluation.
    """

    verify_prompt: str = VERIFY_PROMPT
    revise_prompt: str = REVISE_PROMPT
    verdict_parser: str = "strict"
    alpha: float = 1.0
    revise_on: tuple[Verdict, ...] = (Verdict.WRONG,)

    name = "pag"
    roles = (ATTEMPT, VERIFY, REVISE)

    def __post_init__(self):
        if self.verdict_parser not in PARSERS:
            raise ValueError(f"There is no verdict_parser `{self.verdict_parser}`. Choose {', '.join(PARSERS)}.")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(
                f"alpha must be 0 or more, got {self.alpha}: it weighs acc2 − acc1 in the revision's reward."
            )

    @property
    def follow_ups(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The two follow-up prompts."""
        return {VERIFY: self.verify_prompt, REVISE: self.revise_prompt}

    @property
    def answers(self) -> tuple[str, ...]:
        """Attempt and revision; the verification answers another question."""
        return ATTEMPT, REVISE

    def next_role(self, turns: Sequence[Turn]) -> str | None:
        """A revision only where the verification called for it."""
        if len(turns) < 2:
            return (ATTEMPT, VERIFY)[len(turns)]
        return REVISE if len(turns) == 2 and self.verdict(turns[1]) in self.revise_on else None

    def verdict(self, verification: Turn) -> Verdict:
        """What a verification says; nothing where it was truncated, but for PAG's own parser, which does not ask."""
        if verification.is_truncated and self.verdict_parser != "official":
            return Verdict.NONE
        return parse_verdict(verification.text, self.verdict_parser)

    def judge(self, turn: Turn, label: int | None) -> TurnGrade:
        """Whether the verdict is true of the attempt."""
        verdict = self.verdict(turn)
        return TurnGrade(f"{VERDICT}{verdict}", verdict_reward(verdict, label))

    def reward(self, role: str, success: float, label: int) -> float:
        """acc, or whether the verdict is true; the revision's gain over the attempt counts α more."""
        return success + self.alpha * (success - label) if role == REVISE else success

    def value(self, role: str, chance_S: "torch.Tensor", label_S: "torch.Tensor", beta1: float) -> "torch.Tensor":
        """V* of the states of a role. A revision earns up to 1 + α more for success, so its temperature grows with it: at β₁ its
        V* would be near the best reward wherever it succeeds at all (0.93 at a chance of 0.1, for a mean of 0.2)."""
        return super().value(role, chance_S, label_S, beta1 * (1 + self.alpha) if role == REVISE else beta1)

    def for_evaluation(self) -> "Pag":
        """PAG's own evaluation also revises where there is no verdict."""
        return replace(self, revise_on=(Verdict.WRONG, Verdict.NONE))

    def metrics(self, grades: Sequence[Sequence[TurnGrade]]) -> dict[str, float | None]:
        """The verifier's recalls, how often it gave no verdict, and how often the model revised."""
        verdicts = [row[1].outcome.removeprefix(VERDICT) for row in grades]
        judged = [row for row in grades if row[0].reward is not None and row[1].reward is not None]
        recalls = {
            name: [bool(row[1].reward) for row in judged if (row[0].reward == 1) == is_right]
            for name, is_right in (("correct_recall", True), ("wrong_recall", False))
        }
        return {
            **{f"{VERIFY}/{name}": _share(hits) for name, hits in recalls.items()},
            f"{VERIFY}/no_verdict": _share([verdict == Verdict.NONE for verdict in verdicts]),
            f"{REVISE}/rate": _share([verdict == Verdict.WRONG for verdict in verdicts]),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What decides episodes besides what decides completions. α does not: it changes rewards, not samples."""
        return {
            "episode": self.name,
            "verify_prompt": self.verify_prompt,
            "revise_prompt": self.revise_prompt,
            "verdict_parser": self.verdict_parser,
        }

    def report(
        self, episodes: Sequence[GradedEpisode], num_samples: int, decode: Callable[[Sequence[int]], str]
    ) -> dict[str, float | None]:
        """How good the attempts and the verdicts are, and what the revisions make of the attempts.

        Shares of all episodes unless said otherwise:
            - `acc_t1`: the attempt is right.
            - `acc_final`: the last answer is right, the revision's where the verdict was "wrong".
            - `acc_final_official`: the same by PAG's own evaluation, which also revises where there is no verdict.
            - `improved`, `spoiled`: from a wrong attempt to a right last answer, and the other way.
            - `revise_rate`: the verdict is "wrong".
            - `answer_change`: share of the revised ones whose answer differs; two right ones are the same in any notation.
            - `verifier_accuracy`: the verdict is true.
            - `correct_recall`, `wrong_recall`: share of the right attempts called correct, and of the wrong ones called wrong.
            - `no_verdict`: the verification has no verdict.
            - `best_of_n`, `majority_vote`: accuracy over problems of one attempt among the problem's samples: the one that the
              verification trusts most, and the one with the most frequent answer (right ones are the same in any notation).
        """
        judged = [self._judged(graded, decode) for graded in episodes]
        groups = [judged[start : start + num_samples] for start in range(0, len(judged), num_samples)]
        revised = [one for one in judged if one.verdict in self.revise_on]
        metrics: dict[str, float | None] = {
            "acc_t1": fmean(one.attempt.is_right for one in judged),
            "acc_final": fmean(one.last_is_right for one in judged),
            "acc_final_official": fmean(
                (one.attempt if one.verdict is Verdict.CORRECT else one.revision).is_right for one in judged
            ),
            "improved": fmean(not one.attempt.is_right and one.last_is_right for one in judged),
            "spoiled": fmean(one.attempt.is_right and not one.last_is_right for one in judged),
            "revise_rate": len(revised) / len(judged),
            "answer_change": _share([one.changes_answer for one in revised]),
            "verifier_accuracy": fmean(one.verdict_is_true for one in judged),
            "correct_recall": _share([one.verdict_is_true for one in judged if one.attempt.is_right]),
            "wrong_recall": _share([one.verdict_is_true for one in judged if not one.attempt.is_right]),
            "no_verdict": fmean(one.verdict is Verdict.NONE for one in judged),
            "best_of_n": fmean(max(group, key=_Judged.trust).attempt.is_right for group in groups),
            "majority_vote": fmean(_majority_is_right(group) for group in groups),
        }
        check_identities(metrics)
        return metrics

    def _judged(self, graded: GradedEpisode, decode: Callable[[Sequence[int]], str]) -> "_Judged":
        verification = graded.episode.turns[1]
        verdict = self.verdict(verification)
        attempt, verified, revision = graded.grades
        return _Judged(
            attempt,
            verdict,
            chance_of_correct(verification.completion, verdict, decode),
            verified.is_right,
            revision,
            (revision if verdict in self.revise_on else attempt).is_right,
        )


@dataclass(frozen=True, slots=True)
class _Judged:
    """One episode, ready to be counted; a revision that is not there is not right."""

    attempt: TurnGrade
    verdict: Verdict
    confidence: float
    verdict_is_true: bool
    revision: TurnGrade
    last_is_right: bool

    @property
    def changes_answer(self) -> bool:
        both_right = self.attempt.is_right and self.revision.is_right
        return not both_right and self.revision.answer != self.attempt.answer

    def trust(self) -> tuple[bool, float]:
        """A verdict of "correct" counts more than any doubt about a "wrong"."""
        return self.verdict is Verdict.CORRECT, self.confidence


def check_identities(metrics: Mapping[str, float | None]) -> None:
    """Raise a `RuntimeError` if two ways of counting the same thing disagree."""

    def of(name: str) -> float:
        return metrics[name] or 0.0

    recall = of("acc_t1") * of("correct_recall") + (1 - of("acc_t1")) * of("wrong_recall")
    identities = {
        "acc_final = acc_t1 + improved - spoiled": (of("acc_final"), of("acc_t1") + of("improved") - of("spoiled")),
        "verifier_accuracy = acc_t1 x correct_recall + (1 - acc_t1) x wrong_recall": (of("verifier_accuracy"), recall),
    }
    for name, (left, right) in identities.items():
        if not math.isclose(left, right, abs_tol=1e-9):
            raise RuntimeError(f"The report contradicts itself: {name}, but {left} and {right}. Please report this.")


def _share(hits: Sequence[bool]) -> float | None:
    return fmean(hits) if hits else None


def _majority_is_right(group: Sequence[_Judged]) -> bool:
    """Whether the most frequent answer is right; of equally frequent ones that of the earlier sample."""
    votes = [(one.attempt.is_right, "" if one.attempt.is_right else one.attempt.answer) for one in group]
    counts = Counter(vote for vote in votes if vote != (False, ""))  # no answer is no vote
    return counts.most_common(1)[0][0][0] if counts else False


def episode_kind(options: EpisodeOptions, alpha: float = 1.0) -> EpisodeKind:
    """The kind of episode that a command's options name.

    Args:
        options ([`EpisodeOptions`]):
            The options.
        alpha (`float`, *optional*, defaults to `1.0`):
            α of PAG's rewards; nothing but training reads it.

    Raises:
        ValueError: If there is no such kind, or one of its settings is wrong.
    """

    def pag() -> Pag:
        return Pag(
            VERIFY_PROMPT if options.verify_prompt is None else options.verify_prompt,
            REVISE_PROMPT if options.revise_prompt is None else options.revise_prompt,
            options.verdict_parser,
            alpha,
        )

    return load_kind(options.episode, pag)


def kind_of_pool(fingerprint: Mapping[str, Any]) -> EpisodeKind:
    """The kind of episode that a pool holds, from its fingerprint.

    Raises:
        ValueError: If the pool holds a kind of the user's own; the message says what to pass.
    """
    name = str(fingerprint.get("episode", SINGLE.name))
    if name == Pag.name:
        return Pag(fingerprint["verify_prompt"], fingerprint["revise_prompt"], fingerprint["verdict_parser"])
    if name == SINGLE.name:
        return SINGLE
    # Whatever its name says, it is not imported: a pool may be a stranger's.
    raise ValueError(
        f"The pool holds episodes of the kind `{name}`, which astarpo does not know. Pass it with --episode module:KIND."
    )


def verdict_reward(verdict: Verdict, label: int | None) -> float | None:
    """1 for a true verdict, 0 for a false one or none at all; None where nobody knows whether the attempt is right."""
    if label is None:
        return None
    return float(verdict is not Verdict.NONE and (verdict is Verdict.CORRECT) == bool(label))


def parse_verdict(text: str, parser: str = "strict") -> Verdict:
    """Read the verdict of a verification.

    `official`: the text ends with "The answer is correct." or "The answer is wrong.", period included, as PAG's code has it
    (arXiv 2506.10406). `strict`: besides, it says such a thing only once. `lenient` takes any "answer is correct" (or right,
    wrong, incorrect, not correct) anywhere, in any case, as long as all of them agree; what is only supposed ("if the answer is
    ...") or asked does not count. It reads negations as the verifier does.

    Args:
        text (`str`):
            The turn's text, without special tokens.
        parser (`str`, *optional*, defaults to `"strict"`):
            `strict`, `official` or `lenient`.

    Raises:
        ValueError: If there is no such parser.
    """
    if parser in ("strict", "official"):
        found = _OFFICIAL.search(text)
        is_alone = parser == "official" or len(_SENTENCE.findall(text)) == 1
        return Verdict(found.group(1)) if found and is_alone else Verdict.NONE
    if parser != "lenient":
        raise ValueError(f"There is no verdict parser `{parser}`. Choose {', '.join(PARSERS)}.")
    said = {says_correct(found) for found in _statements(text)}
    if len(said) != 1:
        return Verdict.NONE
    return Verdict.CORRECT if said.pop() else Verdict.WRONG


def _statements(text: str) -> list[re.Match[str]]:
    """Where a text states that the answer is correct or wrong."""
    return [found for found in _LENIENT.finditer(text) if not _SUPPOSED.search(text[: found.start()])]


def chance_of_correct(completion: Completion, verdict: Verdict, decode: Callable[[Sequence[int]], str]) -> float:
    """How sure the model is that the attempt is correct: the probability of the word with which it said so, or what that of
    "wrong" leaves; 0 without a verdict.

    Args:
        completion ([`Completion`]):
            The verification, with log-probs.
        verdict ([`Verdict`]):
            What it says.
        decode (`Callable[[Sequence[int]], str]`):
            Token ids to text.
    """
    if verdict is Verdict.NONE or not completion.logprobs:
        return 0.0
    ids = completion.token_ids
    text = decode(ids)
    said = (_statements(text) or list(_LENIENT.finditer(text)))[-1]

    def decoded(count: int) -> int:
        return len(decode(ids[:count]))

    # The word may be several tokens: the first and last token whose text overlaps it.
    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, said.start("said"), key=decoded) - 1
    last = bisect.bisect_left(counts, said.end("said"), key=decoded)
    chance = math.exp(sum(completion.logprobs[first:last]))
    return chance if verdict is Verdict.CORRECT else 1.0 - chance
