"""A third kind of episode, defined outside the package: a pool, its continuation, grading again, evaluation, the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import SMALL, run
from pag_model import problem
from second_try import KIND
from transformers import AutoTokenizer

from astarpo.rollout import (
    SINGLE,
    EngineOptions,
    EpisodeSampler,
    ModelOptions,
    Pag,
    ReferencePool,
    SampleOptions,
    SamplingSettings,
    evaluate,
    pool_fingerprint,
    sample_pool,
)
from astarpo.rollout.engines.interface import EngineError
from astarpo.rollout.episode import TurnGrade, load_kind
from astarpo.rollout.options import EpisodeOptions
from astarpo.rollout.pag import episode_kind, kind_of_pool
from astarpo.rollout.page import print_report, write_page
from astarpo.rollout.pool import check_pool, regrade_pool
from astarpo.rollout.prompts import tokenize_prompts
from astarpo.verifier import Verifier

PROBLEMS = [problem(number) for number in range(6)]


class Judge:
    """An expensive judge: it counts what it is asked, and finds an answer right that boxes the gold one."""

    def __init__(self):
        self.calls = 0

    def __call__(self, answers):
        self.calls += len(answers)
        right = [f"boxed{{{answer.problem.gold}}}" in answer.text for answer in answers]
        return [TurnGrade("right" if r else "not_right", float(r)) for r in right]


def sampled(folder, guesser, engine, kind, grader, seed=0):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    options = SampleOptions(str(folder), num_samples=3, max_completion_length=16, shard_rows=8, seed=seed)
    fingerprint = pool_fingerprint(ModelOptions(guesser), EngineOptions(), tokenizer, PROBLEMS, options)
    return sample_pool(engine, tokenizer, PROBLEMS, options, fingerprint, grader, kind=kind)


def rows_of(pool):
    return sorted(pool.samples.to_pylist(), key=lambda row: (row["prompt_id"], row["sample_index"]))


class Stopping:
    """The real engine, which breaks down in its third stream."""

    def __init__(self, engine):
        self.engine, self.streams = engine, 0
        self.max_model_len, self.max_num_seqs, self.kv_cache_tokens = engine.max_model_len, 16, None

    def stream(self, *arguments):
        self.streams += 1
        for number, item in enumerate(self.engine.stream(*arguments)):
            if self.streams == 3 and number == 2:
                raise EngineError("out of luck", (item[0],))
            yield item


def test_a_kind_of_ones_own_is_sampled_continued_and_graded_again(guesser, guessing_engine, tmp_path):
    judge = Judge()
    pool = sampled(tmp_path / "whole", guesser, guessing_engine, KIND, judge)
    assert pool.is_complete and pool.manifest.turns == 2 and pool.num_rows == judge.calls == 6 * 3 * 2
    assert pool.manifest.fingerprint["episode"] == "second_try"
    assert {row["role"] for row in rows_of(pool)} == {"attempt", "second"}
    assert check_pool(pool.folder) == []
    assert pool.summary()["later_turns"]["second"]["graded"] == 18
    # What is in a state of the first turn does not depend on what follows.
    single = sampled(tmp_path / "single", guesser, guessing_engine, SINGLE, Judge())
    assert (pool.reward_matrix() == single.reward_matrix()).all()

    with pytest.raises(EngineError, match="out of luck"):
        sampled(tmp_path / "broken", guesser, Stopping(guessing_engine), KIND, Judge())
    broken = ReferencePool.open(tmp_path / "broken")
    assert 0 < broken.num_rows < 36 and broken.num_rows % 2 == 0 and len(broken.manifest.failures) == 2
    again = sampled(tmp_path / "broken", guesser, guessing_engine, KIND, Judge())
    assert again.is_complete and rows_of(again) == rows_of(pool)
    with pytest.raises(ValueError, match="episode: 'second_try' in the pool, None asked for"):
        sampled(tmp_path / "broken", guesser, guessing_engine, SINGLE, Judge())

    with Verifier() as verifier:
        with pytest.raises(ValueError, match=r"episodes of the kind `second_try`.*--episode module:KIND"):
            regrade_pool(pool.folder, verifier, "new")
        with pytest.raises(ValueError, match="another kind of episode than `single`"):
            regrade_pool(pool.folder, verifier, "new", SINGLE)
        regrade_pool(pool.folder, verifier, "new", KIND)
    graded = ReferencePool.open(pool.folder)
    assert (graded.turn_rewards() == again.turn_rewards()).all()
    assert {row["outcome"] for row in rows_of(graded)} <= {"correct", "wrong", "no_answer"}


def test_the_command_grades_a_pool_of_ones_own_kind_again(guesser, guessing_engine, tmp_path):
    sampled(tmp_path / "pool", guesser, guessing_engine, KIND, Judge())
    words = [sys.executable, "-m", "astarpo.rollout", "regrade", str(tmp_path / "pool")]
    refused = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "Pass it with --episode module:KIND" in refused.stderr
    words += ["--episode", "second_try:KIND"]
    finished = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "36 samples graded again" in finished.stdout


def test_a_kind_of_ones_own_is_evaluated_and_shown(guesser, guessing_engine, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    sampler = EpisodeSampler(guessing_engine, tokenizer, KIND, SamplingSettings(16, 1.0))
    judge = Judge()
    report = evaluate(sampler, PROBLEMS, tokenize_prompts(PROBLEMS, tokenizer), judge, num_samples=2)
    assert judge.calls == 6 * 2 * 2  # each answer once
    right = [[turn.correct for turn in sample.turns] for sample in report.samples]
    assert report.metrics == {
        "accuracy_attempt": pytest.approx(sum(first for first, _ in right) / 12),
        "accuracy_second": pytest.approx(sum(second for _, second in right) / 12),
    }
    assert report.accuracy == report.metrics["accuracy_second"]
    assert sum(report.outcomes.values()) == 12
    written = json.loads(json.dumps(report.to_json()))
    assert (written["episode"], written["accuracy_second"]) == ("second_try", report.accuracy)
    assert [turn["role"] for turn in written["samples"][0]["turns"]] == ["attempt", "second"]
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article ") == 12 and page.count("Second: ") == 12 and "Check your answer." in page
    print_report(report, "x.json", show=1)


@pytest.mark.slow
def test_the_commands_take_a_kind_of_ones_own(guesser, tmp_path):
    (tmp_path / "second_try.py").write_text(Path(__file__).with_name("second_try.py").read_text())
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"question": f"Guess {i}", "answer": "1"}) + "\n" for i in "12")
    )
    words = ["--model_name_or_path", guesser, "--dataset_name", "d.jsonl", "--episode", "second_try:KIND", *SMALL]
    words += ["--system_prompt", "", "--num_samples", 2, "--temperature", 1]
    run("rollout", *words, "--output_dir", "pool", cwd=tmp_path)
    assert ReferencePool.open(tmp_path / "pool").num_rows == 8
    shown = run("rollout.evaluate_cli", *words, "--output", "eval.json", "--show", 1, cwd=tmp_path).stdout
    assert "accuracy_second" in shown and "Second: " in shown
    assert (tmp_path / "eval.html").read_text().count("<article ") == 4


@pytest.mark.parametrize("beta1", [0.3, 1.0])
def test_v_of_a_kind_is_that_of_many_episodes(beta1):
    """V = beta1 ln E exp(R / beta1), the expectation over the reference's turns from a state."""
    chances, generator = torch.tensor([0.0, 0.2, 0.7, 1.0]), torch.Generator().manual_seed(0)
    success = (torch.rand(200_000, 4, generator=generator) < chances).double()
    for role in KIND.roles:
        for label in (0, 1) if role == "second" else (0,):
            rewards = torch.tensor([KIND.reward(role, 0.0, label), KIND.reward(role, 1.0, label)], dtype=torch.float64)
            sampled_V = beta1 * (rewards[success.long()] / beta1).exp().mean(0).log()
            value = KIND.value(role, chances, torch.full((4,), label), beta1)
            torch.testing.assert_close(value, sampled_V, rtol=0, atol=1e-2)


def test_one_call_of_the_judge_for_each_answer_of_pag(guesser, guessing_engine, tmp_path):
    judge, kind = Judge(), Pag("Right?", "Again.")
    pool = sampled(tmp_path / "pool", guesser, guessing_engine, kind, judge)
    answers = [row for row in rows_of(pool) if row["role"] != "verify" and row["finish_reason"] != "none"]
    assert judge.calls == len(answers) < 36
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    sampler, judge = EpisodeSampler(guessing_engine, tokenizer, kind, SamplingSettings(16, 1.0)), Judge()
    report = evaluate(sampler, PROBLEMS, tokenize_prompts(PROBLEMS, tokenizer), judge, num_samples=2)
    assert judge.calls == sum(turn.role != "verify" for sample in report.samples for turn in sample.turns)
    assert report.accuracy == report.metrics["acc_final"]


def test_kinds_by_name(tmp_path, monkeypatch):
    assert episode_kind(EpisodeOptions()) is SINGLE
    pag = episode_kind(EpisodeOptions("pag", verify_prompt="Right?", verdict_parser="lenient"), alpha=2.0)
    assert pag == Pag("Right?", verdict_parser="lenient", alpha=2.0)
    assert kind_of_pool(pag.fingerprint()) == Pag("Right?", verdict_parser="lenient")
    assert kind_of_pool({}) is SINGLE
    with pytest.raises(ValueError, match="which astarpo does not know"):
        kind_of_pool({"episode": "second_try:KIND"})  # a pool says nothing that is imported
    assert load_kind("second_try:KIND", Pag) is KIND
    for name, message in {
        "PAG": "no kind of episode `PAG`. Choose single or pag",
        "nowhere:KIND": "could not be imported",
        "second_try:OTHER": "could not be imported",
        "second_try:SecondTry": "is a type, not an instance",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_kind(name, Pag)
