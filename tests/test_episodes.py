"""Episodes from the real engine: follow-up prompts, masks, the loss over turns, and PAG's evaluation."""

import copy
import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import make_engine
from hypothesis import given
from hypothesis import strategies as st

from astarpo.rollout import EpisodeSampler, Pag, SamplingSettings, evaluate
from astarpo.rollout.data import Problem
from astarpo.rollout.engines.interface import Completion, FinishReason
from astarpo.rollout.episode import (
    NOT_REACHED,
    Episode,
    FollowUps,
    GradedEpisode,
    Turn,
    TurnGrade,
    episode_from_rows,
    sample_seed,
)
from astarpo.rollout.pag import Verdict, chance_of_correct, check_identities, verdict_reward
from astarpo.rollout.page import print_report, write_page
from astarpo.trainer.loss import astarpo_loss, sequence_log_ratio, turn_log_ratios
from astarpo.verifier import Verifier

pytestmark = pytest.mark.pag

ROLES = ("attempt", "verify", "revise")
PAG = Pag("Check it.", "Again.", "lenient")


def test_follow_ups_are_the_template_without_a_system_block(tokenizer):
    asks = FollowUps.render(tokenizer, PAG).by_role
    assert tokenizer.decode(asks["verify"]) == "\n\n<|im_start|>user\nCheck it.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(asks["revise"]) == "\n\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"follow-up prompt of the turn `verify` is empty.*--verify_prompt"):
        FollowUps.render(tokenizer, Pag(verify_prompt=" "))


class Scripted:
    """Wraps a real engine and puts texts in place of what it sampled in a role's turn."""

    def __init__(self, engine, tokenizer, texts):
        self.engine, self.tokenizer, self.texts, self.calls = engine, tokenizer, texts, []
        self.max_model_len, self.max_num_seqs, self.kv_cache_tokens = engine.max_model_len, 16, None

    def stream(self, prompts, seeds, settings, policy=None):
        self.calls.append(len(prompts))
        turn = len(self.calls) - 1
        for index, completion in self.engine.stream(prompts, seeds, settings, policy):
            texts = self.texts[turn] if turn < len(self.texts) else None
            text = texts[index] if texts else None
            if text is not None:
                ids = tuple(self.tokenizer(text + "<|im_end|>")["input_ids"])
                completion = type(completion)(ids, (-1.0,) * len(ids), type(completion.finish_reason).STOP)
            yield index, completion


def sampler(engine, tokenizer, tokens=12):
    return EpisodeSampler(engine, tokenizer, PAG, SamplingSettings(tokens, 1.0))


def verdict(episode):
    return PAG.verdict(episode.turn("verify"))


def seeds(number, role):
    return sample_seed("pag", number, role)


def test_masks_of_the_real_engines_output(engine, tokenizer):
    prompts = [tokenizer(f"What is {i}+1?")["input_ids"] for i in range(4)]
    said = [None, ["The answer is wrong.", "The answer is correct.", "Hm.", "The answer is wrong."]]
    scripted = Scripted(engine, tokenizer, said)
    episodes = sampler(scripted, tokenizer).sample(prompts, seeds)
    assert scripted.calls == [4, 4, 2]  # batched across episodes at each turn, revisions only where it said "wrong"
    assert [verdict(e) for e in episodes] == [Verdict.WRONG, Verdict.CORRECT, Verdict.NONE, Verdict.WRONG]
    for episode in episodes:
        assert (episode.turn("revise") is not None) == (verdict(episode) is Verdict.WRONG)
        assert len(episode.token_ids) == len(episode.turn_ids) == len(episode.logprobs)
        for number, role in enumerate(ROLES, start=1):
            turn = episode.turn(role)
            ids = [t for t, n in zip(episode.token_ids, episode.turn_ids, strict=True) if n == number]
            assert tuple(ids) == (turn.completion.token_ids if turn else ())
        written = sum(len(turn.completion.token_ids) for turn in episode.turns)
        assert sum(number > 0 for number in episode.turn_ids) == written
        template = [t for t, n in zip(episode.token_ids, episode.turn_ids, strict=True) if n == 0]
        assert len(template) == sum(len(turn.given) for turn in episode.turns)
        assert all(logprob == 0 for logprob, n in zip(episode.logprobs, episode.turn_ids, strict=True) if n == 0)


def test_a_truncated_turn_is_closed_and_gives_no_verdict(engine, tokenizer):
    prompt = tokenizer("What is 1+1?")["input_ids"]
    episode = next(
        e
        for number in range(50)
        for e in sampler(engine, tokenizer, tokens=3).sample([prompt], lambda n, role, k=number: seeds(k, role))
        if e.turns[0].is_truncated
    )
    assert episode.turns[1].given[0] == 2
    assert episode.turn_ids[3] == 0
    if episode.turns[1].is_truncated:
        assert verdict(episode) is Verdict.NONE
    rows = [
        {
            "completion_ids": list(t.completion.token_ids),
            "text": t.text,
            "finish_reason": t.completion.finish_reason.value,
        }
        for t in episode.turns
    ]
    rows += [{"completion_ids": [], "text": "", "finish_reason": "none"}] * (3 - len(rows))
    again = episode_from_rows(PAG, rows, prompt, FollowUps.render(tokenizer, PAG))
    assert (again.token_ids, again.turn_ids) == (episode.token_ids, episode.turn_ids)


def test_an_episode_longer_than_the_context_is_refused(engine, tokenizer):
    with pytest.raises(ValueError, match=r"may take \d+ tokens .* the engine's context has 512.*--max_model_len"):
        sampler(engine, tokenizer, tokens=300).sample([[1] * 10], seeds)


def test_earlier_turns_come_from_the_prefix_cache(tiny_model, tokenizer):
    engine = make_engine(tiny_model)
    prompt = tokenizer("The quick brown fox. " * 14)["input_ids"][:270]  # two blocks of 128 tokens and a bit
    computed = []
    inner = engine.llm.llm_engine.engine_core.engine_core.scheduler.schedule

    def schedule(*args, **kwargs):
        output = inner(*args, **kwargs)
        computed.extend(request.num_computed_tokens for request in output.scheduled_new_reqs)
        return output

    engine.llm.llm_engine.engine_core.engine_core.scheduler.schedule = schedule
    sampler(engine, tokenizer, tokens=8).sample([prompt], seeds)
    assert computed[0] == 0
    assert computed[1] >= 256  # the attempt's prompt was not computed again for the verifier
    engine.close()


def test_the_loss_of_an_episode_is_the_sum_over_its_turns():
    """One forward pass of the whole episode; each turn as if it stood alone, template tokens and absent turns without weight."""
    torch.manual_seed(0)
    turn_ids = torch.tensor([[1, 1, 0, 2, 2, 0, 3], [1, 0, 2, 2, 0, 0, 0]])
    logps, reference = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    ratios = turn_log_ratios(logps, reference, turn_ids, 3)
    for turn in (1, 2, 3):
        mask = turn_ids == turn
        torch.testing.assert_close(ratios[:, turn - 1], sequence_log_ratio(logps, reference, mask))
    assert ratios[1, 2] == 0
    values, rewards = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.5, 0.0]])
    losses = astarpo_loss(ratios, values, rewards, weights, 0.1)
    assert losses[1, 2] == 0
    expected = sum(
        weights[i, k] * (0.1 * ratios[i, k] + values[i, k] - rewards[i, k]) ** 2 for i in range(2) for k in range(3)
    )
    assert losses.sum().item() * 0.2 == pytest.approx(float(expected))


@pytest.mark.parametrize("value", [0.0, 0.4, 1.3])
def test_expected_gradient_of_two_turns(value):
    """docs/algorithm.md, Turns: each turn's gradient is that of its own regularised objective, weighted by λ; V moves nothing."""
    torch.manual_seed(1)
    first, second = (
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 2, requires_grad=True).double(),
    )
    second = second.detach().requires_grad_()
    references = [torch.randn(3).double().log_softmax(-1), torch.randn(3, 2).double().log_softmax(-1)]
    rewards = [torch.rand(3).double(), torch.rand(3, 2).double()]
    weights, beta2 = torch.tensor([1.0, 2.0]).double(), 0.1

    def objective():
        logps = [first.log_softmax(-1), second.log_softmax(-1)]
        visits = logps[0].exp().detach()  # the state visitation is not differentiated
        gains = [r - beta2 * (p - q) for r, p, q in zip(rewards, logps, references, strict=True)]
        return (
            weights[0] * (logps[0].exp() * gains[0]).sum()
            + weights[1] * (visits[:, None] * logps[1].exp() * gains[1]).sum()
        )

    expected = torch.autograd.grad(-objective(), (first, second))
    logps = [first.log_softmax(-1), second.log_softmax(-1)]
    total = torch.zeros((), dtype=torch.float64)
    for a in range(3):
        for b in range(2):
            ratios = torch.stack([logps[0][a] - references[0][a], logps[1][a, b] - references[1][a, b]])[None]
            earned = torch.stack([rewards[0][a], rewards[1][a, b]])[None]
            chance = (logps[0][a] + logps[1][a, b]).exp().detach()
            total = (
                total + chance * astarpo_loss(ratios, torch.full((1, 2), value), earned, weights[None], beta2).sum()
            )
    for got, wanted in zip(torch.autograd.grad(total, (first, second)), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-6)


def completion(tokenizer, text, logprob=-0.1):
    ids = tuple(tokenizer(text + "<|im_end|>")["input_ids"])
    return Completion(ids, (logprob,) * len(ids), FinishReason.STOP)


def test_the_verdict_s_probability_is_that_of_its_word(tokenizer):
    def decode(ids):
        return tokenizer.decode(list(ids), skip_special_tokens=True)

    said = completion(tokenizer, "Is the answer wrong? The answer is wrong.")
    wrong = chance_of_correct(said, Verdict.WRONG, decode)
    assert wrong == pytest.approx(1 - math.exp(-0.1 * len("wrong")))  # a token for each byte
    said = completion(tokenizer, "The answer is correct.")
    assert chance_of_correct(said, Verdict.CORRECT, decode) == pytest.approx(math.exp(-0.1 * len("correct")))
    assert chance_of_correct(said, Verdict.NONE, decode) == 0.0


def decode(ids):
    return bytes(ids).decode()


def graded(said, answer="", right=False, second=None, second_right=False, confidence=0.5):
    """An episode with a verdict, an attempt and perhaps a revision, without an engine."""

    def turn(number, text, logprobs=()):
        ids = tuple(text.encode())
        return Turn(ROLES[number], number + 1, (), Completion(ids, logprobs, FinishReason.STOP), text)

    text = "Hm." if said is Verdict.NONE else f"The answer is {said}."
    sure = confidence if said is Verdict.CORRECT else 1 - confidence
    # All the doubt is in the first letter of the word.
    at = text.find(str(said)) if said is not Verdict.NONE else 0
    logprobs = tuple(math.log(max(sure, 1e-300)) if place == at else 0.0 for place in range(len(text)))
    turns = [turn(0, answer), turn(1, text, logprobs)]
    grades = [TurnGrade("a", float(right), answer), TurnGrade(f"verdict_{said}", verdict_reward(said, int(right)))]
    if said is not Verdict.CORRECT:
        turns.append(turn(2, second or ""))
        grades.append(TurnGrade("b", float(second_right), second or ""))
    else:
        grades.append(NOT_REACHED)
    return GradedEpisode(Episode((), tuple(turns)), tuple(grades))


def report(episodes, num_samples):
    return PAG.report(episodes, num_samples, decode)


judged = st.builds(
    graded,
    st.sampled_from(list(Verdict)),
    answer=st.sampled_from(["", "1", "2"]),
    right=st.booleans(),
    second=st.sampled_from(["", "1", "2"]),
    second_right=st.booleans(),
    confidence=st.floats(0, 1),
)


@given(st.lists(judged, min_size=2, max_size=24), st.sampled_from([1, 2]))
def test_reports_keep_their_identities(episodes, num_samples):
    episodes = episodes[: len(episodes) // num_samples * num_samples]
    metrics: dict[str, Any] = report(episodes, num_samples)  # raises when an identity does not hold
    first = sum(e.grades[0].is_right for e in episodes) / len(episodes)
    assert metrics["acc_t1"] == pytest.approx(first)
    assert metrics["improved"] <= metrics["revise_rate"] and metrics["spoiled"] <= metrics["revise_rate"]
    for name in ("acc_final", "verifier_accuracy"):
        with pytest.raises(RuntimeError, match="contradicts itself"):
            check_identities(metrics | {name: metrics[name] + 0.01})


def test_choosing_among_samples():
    said = Verdict.CORRECT
    three = [graded(said, "7", False, confidence=0.2), graded(said, "8", True, confidence=0.9)]
    three.append(graded(said, "7", False, confidence=0.1))
    metrics = report(three, 3)
    assert (metrics["best_of_n"], metrics["majority_vote"]) == (1.0, 0.0)
    assert metrics["wrong_recall"] == 0.0 and metrics["correct_recall"] == 1.0


def test_evaluation_on_the_real_engine(engine, tokenizer, tmp_path):
    problems = [Problem(({"role": "user", "content": f"What is {i}+1?"},), str(i + 1)) for i in range(3)]
    prompts = [tokenizer(problem.question)["input_ids"] for problem in problems]
    answers = [r"\boxed{1}", r"\boxed{9}", "No idea."]
    said = ["The answer is correct.", "The answer is wrong.", "Hm."]
    scripted = Scripted(engine, tokenizer, [answers, said, [r"\boxed{2}", r"\boxed{3}"]])
    with Verifier() as verifier:
        found = evaluate(sampler(scripted, tokenizer), problems, prompts, verifier)
    metrics = found.metrics
    assert scripted.calls == [3, 3, 2]  # PAG's own gate revises where there is no verdict, too
    assert (metrics["acc_t1"], metrics["acc_final"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert found.accuracy == found.avg_at_k == metrics["acc_final"] and metrics["acc_final_official"] == 1.0
    assert [metrics[name] for name in ("improved", "spoiled", "revise_rate")] == pytest.approx([1 / 3, 0.0, 1 / 3])
    assert (metrics["verifier_accuracy"], metrics["no_verdict"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (metrics["correct_recall"], metrics["wrong_recall"], metrics["answer_change"]) == (1.0, 0.5, 1.0)
    assert [sample.answer for sample in found.samples] == ["1", "2", ""]
    assert [[turn.counts for turn in sample.turns] for sample in found.samples] == [
        [True] * 2,
        [True] * 3,
        [True] * 2 + [False],
    ]
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article ") == 3 and page.count("Revise:") == 2
    assert "Revise: 2 (answer changed)" in page and "Revise: 3 (not in training, not counted)" in page
    print_report(found, "x.json", show=3)


@pytest.mark.slow
def test_the_command_evaluates_episodes(tiny_model, tmp_path):
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(3))
    )
    words = [
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "d.jsonl",
        "--episode",
        "pag",
        "--output",
        "eval.json",
    ]
    words += [
        "--max_completion_length",
        "8",
        "--verdict_parser",
        "lenient",
        "--temperature",
        "1",
        "--num_samples",
        "2",
    ]
    words += ["--verify_prompt", "Right?", "--revise_prompt", "Again.", "--system_prompt", "", "--kv_cache_gb", "0.05"]
    command = [sys.executable, "-m", "astarpo.rollout.evaluate_cli", *words, "--show", "1"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "acc_final_official" in finished.stdout and "Verify: verdict_" in finished.stdout
    found = json.loads((tmp_path / "eval.json").read_text())
    assert (found["episode"], found["verdict_parser"], len(found["samples"])) == ("pag", "lenient", 6)
    assert found["accuracy"] == found["acc_final"] and len(found["samples"][0]["turns"]) in (2, 3)
    assert (tmp_path / "eval.html").read_text().count("<article ") == 6


def test_votes_are_of_answers_not_of_spellings():
    def votes(*pairs):
        return report([graded(Verdict.NONE, answer, right) for answer, right in pairs], len(pairs))["majority_vote"]

    assert votes(("1/2", True), ("0.50", True), ("0.5", True), ("7", False), ("7", False)) == 1.0
    assert votes(("", False), ("8", True), ("8", True), ("7", False)) == 1.0  # the first was truncated
    assert votes(("", False), ("", False)) == 0.0


def test_a_verdict_of_correct_is_trusted_above_a_doubtful_wrong():
    pair = [graded(Verdict.WRONG, "1", False, confidence=0.55), graded(Verdict.CORRECT, "1", True, confidence=0.5)]
    assert report(pair, 2)["best_of_n"] == 1.0


def test_the_template_says_what_ends_a_turn(tokenizer):
    """A base model's end of sequence is another token than its chat template's end of turn."""
    assert FollowUps.render(tokenizer, PAG).end_of_turn == 2
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    follow_ups = FollowUps.render(other, PAG)
    assert follow_ups.end_of_turn == 2
    asks = other.decode(follow_ups.by_role["verify"])
    assert asks == "\n\n<|im_start|>user\nCheck it.<|im_end|>\n<|im_start|>assistant\n"
