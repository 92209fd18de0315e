"""Training on a kind of episode that is defined outside the package, which test_episode_kinds.py samples; and what holds for
every kind in training."""

import math
from typing import Any

import pytest
import torch
from pag_run import PROBLEMS, batches, make_pool
from safetensors.torch import load_file
from second_try import KIND
from test_resume import TIMES, launch, outcome
from transformers import TrainerCallback

from astarpo.rollout import EpisodeSampler, SamplingSettings, evaluate
from astarpo.rollout.page import print_report, write_page
from astarpo.rollout.prompts import tokenize_prompts
from astarpo.trainer.states import ConstantChances, later_states
from astarpo.verifier import Verifier, math_reward

OPTIONS = {"centre_residuals": True, "role_weighting": True, "turn_weights": [1.0, 0.5]}
SETTINGS: dict[str, Any] = dict(episode=KIND, max_steps=3, save_strategy="steps", save_steps=1, num_value_samples=4)
NOISE = (*TIMES, "engine/")
"""What may differ where one engine samples for several runs: its log-probs' last bit depends on what its cache holds."""


class Breakdown(TrainerCallback):
    """Breaks off when an update begins, as abruptly as Python can."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def second_pool(guesser, guessing_engine, tmp_path_factory):
    return make_pool(tmp_path_factory.mktemp("second") / "pool", guesser, guessing_engine, KIND)


@pytest.fixture(scope="module")
def trained(make, second_pool, tmp_path_factory):
    """Three updates: their folder, the trainer and the batches."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder, OPTIONS, pool=str(second_pool.folder), **SETTINGS)
    seen = batches(trainer)
    trainer.train()
    yield folder, trainer, seen
    trainer.close()


def test_its_batches_are_what_the_formulas_say(trained, second_pool):
    _, trainer, seen = trained
    constants = ConstantChances.of(later_states(second_pool, KIND, trainer.sampler.follow_ups, trainer.tokenize))
    table = second_pool.values(0.5)
    assert len(seen) == 3
    for batch, episodes, rows in seen:
        for place, (episode, row) in enumerate(zip(episodes, rows, strict=True)):
            assert [turn.role for turn in episode.turns] == ["attempt", "second"]
            given = trainer.tokenizer.decode(list(episode.turns[1].given))
            assert "<|im_start|>user\nCheck your answer.<|im_end|>" in given
            texts = [[{"role": "assistant", "content": turn.text}] for turn in episode.turns]
            right = math_reward([row["prompt"]] * 2, texts, [row["solution"]] * 2)
            first, second = (r == 1 and not t.is_truncated for r, t in zip(right, episode.turns, strict=True))
            assert batch["rewards"][place].tolist() == [float(first), second - 0.5 * first]
            chance = constants.table[1][int(first)]
            later = 0.5 * math.log(1 - chance + chance * math.exp(1 / 0.5)) - 0.5 * first
            before = (batch["values"] - batch["centres"])[place].tolist()
            assert before == pytest.approx([table[row["prompt_id"]], later], abs=1e-5)
    assert seen[0][0]["weights"].tolist() == [[1.0, 0.5]] * 8
    assert seen[2][0]["centres"].abs().sum() > 0
    log = trainer.state.log_history[0]
    assert {"attempt/reward", "second/reward", "residual/attempt", "residual/second"} <= log.keys()


def test_it_is_resumed_bit_for_bit(make, second_pool, trained, tmp_path):
    broken = make(tmp_path, OPTIONS, pool=str(second_pool.folder), callbacks=[Breakdown(2)], **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.close()
    again = make(tmp_path, OPTIONS, pool=str(second_pool.folder), **SETTINGS)
    seen = batches(again)
    again.train(resume_from_checkpoint=True)
    again.close()
    assert len(seen) == 1
    folder, whole, _ = trained
    one, two = (load_file(run / "checkpoint-3" / "adapter_model.safetensors") for run in (folder, tmp_path))
    assert any(tensor.abs().max() > 0 for name, tensor in one.items() if "lora_B" in name)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(whole.residuals.moments, again.residuals.moments)
    logs = [
        [{k: v for k, v in entry.items() if not any(word in k for word in NOISE)} for entry in run.state.log_history]
        for run in (whole, again)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.resume
def test_it_survives_kill_9(guesser, second_pool, tmp_path):
    options: dict[str, Any] = dict(model=guesser, pool=str(second_pool.folder), max_steps=3, episode="second_try:KIND")
    options |= {"max_completion_length": 32, "require_eos": True, "episode_options": OPTIONS}
    launch(output_dir=str(tmp_path / "whole"), **options)
    killed = launch(False, output_dir=str(tmp_path / "part"), kill_at=2, **options)
    assert killed.returncode == -9, killed.stderr[-3000:]
    launch(output_dir=str(tmp_path / "part"), resume=True, **options)
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")


def test_the_trained_policy_is_evaluated_and_shown(trained, tmp_path, capsys):
    _, trainer, _ = trained
    settings, policy = SamplingSettings(32, 1.0), trainer.sampler.policy.link
    reports = []
    for link in (policy, None):
        sampler = EpisodeSampler(trainer.engine, trainer.tokenizer, KIND, settings, link)
        with Verifier() as verifier:
            prompts = tokenize_prompts(PROBLEMS, trainer.tokenizer)
            reports.append(evaluate(sampler, PROBLEMS, prompts, verifier, num_samples=2))
    report = reports[0]
    texts = [[turn.text for sample in one.samples for turn in sample.turns] for one in reports]
    assert texts[0] != texts[1], "the reference was evaluated"
    assert all([turn.role for turn in sample.turns] == ["attempt", "second"] for sample in report.samples)
    right = [sample.turns[1].correct for sample in report.samples]
    assert report.accuracy == report.metrics["accuracy_second"] == sum(right) / len(right)
    write_page(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article ") == 40 and page.count("Second: ") == 40 and "second_try episodes" in page
    print_report(report, "x.json", show=1)
    assert "accuracy_second" in capsys.readouterr().out


@pytest.mark.pag
def test_every_answer_is_graded_once_by_every_function(make, tmp_path):
    """A revision that the episode did not come to costs nothing, and neither does an attempt that stands in the end."""
    calls: dict[str, list[list[str]]] = {"judge": [], "length": []}

    def judge(completions, **kwargs):
        calls["judge"].append([text[0]["content"] for text in completions])
        return [float("{1}" in text[0]["content"]) for text in completions]

    def length(completions, **kwargs):
        calls["length"].append([text[0]["content"] for text in completions])
        return [float(len(text[0]["content"])) for text in completions]

    trainer = make(tmp_path, reward_funcs=[judge, length], reward_weights=[1.0, 0.0])
    seen = batches(trainer)
    trainer.train()
    trainer.close()
    answers = [[t.text for e in episodes for t in e.turns if t.role != "verify"] for _, episodes, _ in seen]
    assert len(answers) == 2 and any(len(part) > 8 for part in answers)
    assert calls == {"judge": answers, "length": answers}
