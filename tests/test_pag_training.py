"""Training on PAG episodes: the real engine, the real verifier and the real trainer on a tiny model that knows their form."""

import json
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from pag_run import PAG, PROBLEMS, batches, make_pool
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from astarpo.rollout import SINGLE, ReferencePool
from astarpo.rollout.episode import FollowUps
from astarpo.rollout.pag import Verdict
from astarpo.trainer import values
from astarpo.trainer.dataset import problem_of
from astarpo.trainer.residuals import LaggedResiduals, residual_moments
from astarpo.trainer.states import ConstantChances, later_states
from astarpo.trainer.values import prompt_key

pytestmark = pytest.mark.pag

TURNS = ("attempt", "verify", "revise")


def test_the_batch_is_what_the_formula_says(make, pool, tmp_path):
    """docs/algorithm.md, PAG: masks of what was sampled, and at θ = θ_ref L is the mean of Σ_k (V_k − R_k)²."""
    trainer = make(tmp_path)
    seen = batches(trainer)
    trainer.train()
    constants = ConstantChances.of(later_states(pool, PAG, trainer.sampler.follow_ups, trainer.tokenize))
    phi = lambda p: 0.5 * math.log(1 + p * (math.exp(1 / 0.5) - 1))  # noqa: E731
    table = pool.values(0.5)
    for batch, episodes, inputs in seen:
        for row, (episode, x) in enumerate(zip(episodes, inputs, strict=True)):
            ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            assert tuple(ids.tolist()) == episode.token_ids
            turn_ids = batch["turn_ids"][row]
            assert tuple(turn_ids[: len(ids)].tolist()) == episode.turn_ids and not turn_ids[len(ids) :].any()
            assert (turn_ids > 0).sum() == sum(len(turn.completion.token_ids) for turn in episode.turns)
            revised, verdict = episode.turn("revise"), PAG.verdict(episode.turns[1])
            assert (revised is not None) == (verdict is Verdict.WRONG)
            first = f"boxed{{{x['solution']}}}" in episode.turns[0].text and not episode.turns[0].is_truncated
            second = (
                None if revised is None else f"boxed{{{x['solution']}}}" in revised.text and not revised.is_truncated
            )
            z, chance = int(first), constants.table
            says_right = verdict is Verdict.CORRECT
            rewards = [
                z,
                verdict is not Verdict.NONE and says_right == first,
                None if second is None else 2 * second - z,
            ]
            assert batch["weights"][row].tolist() == [float(reward is not None) for reward in rewards]
            assert batch["rewards"][row].tolist() == [float(reward or 0) for reward in rewards]
            wanted = [table[x["prompt_id"]], phi(chance[1][z]), 2 * phi(chance[2][z]) - z]
            assert batch["values"][row].tolist() == pytest.approx(wanted, abs=1e-5)
    batch = seen[0][0]
    square = (batch["weights"] * (batch["values"] - batch["rewards"]) ** 2).sum(1).mean() / (2 * 1e-3)
    first_log = trainer.state.log_history[0]
    assert first_log["loss"] == pytest.approx(square.item(), rel=1e-4)
    assert first_log["kl"] == pytest.approx(0.0, abs=1e-6)
    trainer.close()


def test_metrics_by_role(make, tmp_path):
    trainer = make(tmp_path)
    seen = batches(trainer)
    trainer.train()
    batch, episodes, inputs = seen[0]
    log = trainer.state.log_history[0]
    for turn, name in enumerate(TURNS):
        here = batch["weights"][:, turn] > 0
        assert log[f"{name}/reward"] == pytest.approx(batch["rewards"][here, turn].mean().item())
        target = (batch["values"] - batch["rewards"])[here, turn].mean().item()
        assert log[f"residual/{name}"] == pytest.approx(target, abs=1e-4)  # ℓ = 0
    right = batch["rewards"][:, 0] == 1
    assert log["verify/correct_recall"] == pytest.approx(batch["rewards"][right, 1].mean().item())
    assert log["verify/wrong_recall"] == pytest.approx(batch["rewards"][~right, 1].mean().item())
    assert log["revise/rate"] == pytest.approx(sum(len(e.turns) == 3 for e in episodes) / len(episodes))
    golds = [x["solution"] for x in inputs]
    final = [e.turns[-1] if len(e.turns) == 3 else e.turns[0] for e in episodes]
    right = [
        f"boxed{{{gold}}}" in turn.text and not turn.is_truncated for turn, gold in zip(final, golds, strict=True)
    ]
    assert log["reward"] == pytest.approx(sum(right) / 8)
    trainer.close()


class KillAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "options",
    [
        {
            "centre_residuals": True,
            "role_weighting": True,
            "balance_labels": True,
            "alpha": 0.5,
            "turn_weights": [1.0, 0.5, 2.0],
        },
        {"value_prior": "network", "value_tracking": True, "centre_residuals": True},
        {"value": "critic"},
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(make, tmp_path, options):
    settings: dict[str, Any] = dict(max_steps=4, save_strategy="steps", save_steps=2)
    settings |= {name: options[name] for name in options if name.startswith("value")}
    options = {name: options[name] for name in options if not name.startswith("value")}
    whole = make(tmp_path / "whole", options, **settings)
    whole.train()
    part = make(tmp_path / "part", options, **settings)
    part.add_callback(KillAfter(2))
    part.train()
    part.close()
    again = make(tmp_path / "part", options, **settings)
    again.train(resume_from_checkpoint=True)
    for trainer in (whole, again):
        trainer.close()
    name = "checkpoint-4/adapter_model.safetensors"
    one, two = (load_file(tmp_path / run / name) for run in ("whole", "part"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    keys = [k for k in whole.state.log_history[3] if k.startswith((*TURNS, "residual", "loss", "kl", "value/"))]
    assert len(keys) > 5
    assert {k: whole.state.log_history[3][k] for k in keys} == {k: again.state.log_history[3][k] for k in keys}
    other = make(tmp_path / "part", {"alpha": 0.25}, **settings)
    with pytest.raises(ValueError, match="episode"):
        other.train(resume_from_checkpoint=True)
    other.close()


def test_options_change_values_and_weights_as_documented(make, tmp_path):
    def first_batches(name, **options):
        trainer = make(tmp_path / name, options, learning_rate=0.0, max_steps=2)
        seen = batches(trainer)
        trainer.train()
        trainer.close()
        return [batch for batch, _, _ in seen]

    plain = first_batches("plain")
    weighted = first_batches("weighted", turn_weights=[1.0, 0.0, 2.0])
    torch.testing.assert_close(weighted[0]["weights"], plain[0]["weights"] * torch.tensor([1.0, 0.0, 2.0]))
    centred = first_batches("centred", centre_residuals=True, role_weighting=True)
    torch.testing.assert_close(centred[0]["values"], plain[0]["values"])  # nothing was seen before the first update
    before = LaggedResiduals(PAG)
    moments = residual_moments(plain[0]["rewards"] - plain[0]["values"], plain[0]["labels"], plain[0]["weights"] > 0)
    before.add(moments)
    torch.testing.assert_close(
        centred[1]["values"], plain[1]["values"] + before.centre(plain[1]["labels"]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(centred[1]["weights"], plain[1]["weights"] * before.weights(True), atol=1e-4, rtol=1e-4)
    unshaped = first_batches("unshaped", alpha=0.0)
    assert set(unshaped[0]["rewards"][:, 2].tolist()) <= {0.0, 1.0}


def test_states_are_those_that_were_sampled(pool, guesser, monkeypatch):
    """A pool of texts has no chat around them, and constants need no tokens at all."""
    seen = []

    def tokenize(prompts):
        seen.extend(prompts)
        return [[1, 2]] * len(prompts)

    def hidden(sequences, positions):
        return [torch.zeros(len(places), 4) for places in positions]

    follow_ups = FollowUps.render(AutoTokenizer.from_pretrained(guesser), PAG)
    constants = later_states(pool, PAG, follow_ups, tokenize)
    assert not seen
    states = later_states(pool, PAG, follow_ups, tokenize, hidden)
    assert seen == [list(problem.messages) for problem in PROBLEMS]
    assert ConstantChances.of(states) == ConstantChances.of(constants)
    monkeypatch.setitem(pool.manifest.fingerprint, "text_prompts", True)
    later_states(pool, PAG, follow_ups, tokenize, hidden)
    assert seen[len(PROBLEMS) :] == [problem.messages[0]["content"] for problem in PROBLEMS]


def test_the_trainer_samples_reference_episodes_itself(make, tmp_path):
    rows = [{"prompt": list(p.messages), "solution": p.gold, "extra": number} for number, p in enumerate(PROBLEMS[:8])]
    trainer = make(tmp_path, pool=None, train_dataset=Dataset.from_list(rows), max_steps=1)
    trainer.train()
    own = ReferencePool.open(tmp_path / "reference_pool")
    assert own.is_complete and own.manifest.turns == 3
    assert trainer.state.log_history[0]["verify/reward"] >= 0
    trainer.close()


def test_one_grader_for_both_stages(make, tmp_path):
    """docs/algorithm.md, What is unbiased: the same reward function grades reference episodes and the policy's."""
    graded: list[tuple[str, int]] = []

    def boxes_one(prompts, completions, trainer_state=None, **kwargs):
        step = -1 if trainer_state is None else trainer_state.global_step
        graded.extend((text[0]["content"], step) for text in completions)
        return [float("{1}" in text[0]["content"]) for text in completions]

    rows = Dataset.from_list([{"prompt": list(p.messages), "solution": p.gold} for p in PROBLEMS[:8]])
    trainer = make(tmp_path, pool=None, train_dataset=rows, reward_funcs=boxes_one, max_steps=1)
    seen = batches(trainer)
    trainer.train()
    made = ReferencePool.open(tmp_path / "reference_pool")
    answers = [row["text"] for row in made.samples.to_pylist() if row["role"] != "verify" and row["num_tokens"]]
    assert sorted(answers) == sorted(text for text, _ in graded[: len(answers)])
    own = [turn.text for episode in seen[0][1] for turn in episode.turns if turn.role != "verify"]
    assert own == [text for text, _ in graded[len(answers) :]]  # each answer of the update once
    assert not [text for text, _ in graded if text.startswith("The answer is")]  # verdicts are nobody's answers
    trainer.close()


@pytest.mark.value_network
def test_a_network_is_used_only_where_it_wins(make, tmp_path, monkeypatch):
    trainer = make(tmp_path, value_prior="network", max_steps=1)
    trainer.train()
    report = json.loads((tmp_path / "value_network.json").read_text())
    assert (tmp_path / "value_network.png").read_bytes()[:4] == b"\x89PNG"
    assert [role["is_better"] for role in report["by_role"]] == list(trainer.state_values.trusted)
    trainer.close()
    for trusted in ((False, False, False), (True, True, True)):
        inner = values.StateValues.fit

        def fit(*args, chosen=trusted, inner=inner):
            fitted = inner(*args)
            fitted.trusted = chosen
            return fitted

        monkeypatch.setattr(values.StateValues, "fit", fit)
        trainer = make(tmp_path / str(trusted), value_prior="network", max_steps=1)
        seen = batches(trainer)
        trainer.train()
        trainer.close()
        monkeypatch.setattr(values.StateValues, "fit", inner)
        distinct = len({round(v, 4) for v in seen[0][0]["values"][:, 1].tolist()})
        assert distinct <= 2 if not any(trusted) else distinct > 2


@pytest.mark.value_network
def test_a_network_that_was_trained_is_loaded_again_by_training_and_evaluation(make, tmp_path, monkeypatch):
    inner = values.StateValues.fit

    def fit(*args):
        fitted = inner(*args)
        fitted.trusted = (True, True, True)
        return fitted

    monkeypatch.setattr(values.StateValues, "fit", fit)
    first = make(tmp_path / "one", value_prior="network", max_steps=1)
    first.train()
    first.save_model()
    first.close()
    monkeypatch.setattr(values.StateValues, "fit", inner)
    unsampled = Dataset.from_list([{"prompt": list(p.messages), "solution": p.gold} for p in PROBLEMS[:8]])
    kept = {"value_prior": "network", "value_network": str(tmp_path / "one")}
    again = make(tmp_path / "two", **kept, max_steps=1, eval_dataset=unsampled)
    found = again.evaluate()
    assert 0 <= found["eval_v_star"] <= 1  # nobody sampled these prompts: their V is the network's
    again.train()
    one, two = first.state_values.network.state_dict(), again.state_values.network.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "two" / "value_network.json").exists()  # it was not trained anew
    again.close()
    with pytest.raises(ValueError, match="name the output_dir of a run with value_prior=network"):
        make(tmp_path / "three", **(kept | {"value_network": str(tmp_path)}))
    with pytest.raises(ValueError, match=r"32 hidden features and 3 roles|another model or kind"):
        make(tmp_path / "four", {"episode": "single"}, **kept)


@pytest.mark.value_network
@pytest.mark.parametrize("prior", [{"value_prior": "network"}, {"value_kappa": 2.0}])
def test_single_turn_on_a_partly_sampled_set(make, guesser, guessing_engine, tmp_path, prior):
    part = make_pool(tmp_path / "part", guesser, guessing_engine, SINGLE, PROBLEMS[:15])
    rows = Dataset.from_list([{"prompt": list(p.messages), "solution": p.gold} for p in PROBLEMS])
    trainer = make(tmp_path, {"episode": "single"}, pool=str(part.folder), train_dataset=rows, max_steps=3, **prior)
    assert sum(not any(r is not None for r in row) for row in trainer.train_dataset["reference_rewards"]) == 5
    seen = batches(trainer)
    trainer.train()
    fitted, sampled = trainer.state_values, part.rewards()
    overall = fitted.constants.table[0][0]
    for batch, _, inputs in seen:
        assert batch["weights"].shape == (8, 1) and (batch["weights"] > 0).all()
        for row, x in enumerate(inputs):
            prompt = problem_of(x).prompt_id
            mean = fitted.first.get(prompt_key(prompt), overall)
            rewards = sampled.get(prompt, [])
            chance = (sum(reward or 0.0 for reward in rewards) + fitted.kappa * mean) / (len(rewards) + fitted.kappa)
            wanted = 0.5 * math.log(1 + chance * (math.exp(1 / 0.5) - 1))
            assert batch["values"][row, 0].item() == pytest.approx(wanted, abs=1e-5)
    trainer.close()
    with pytest.raises(ValueError, match=r"no samples for 5 of 20 rows.*value_prior=network"):
        make(tmp_path, {"episode": "single"}, pool=str(part.folder), train_dataset=rows)


def test_completions_take_the_attempts_of_a_pool_of_episodes(make, tmp_path):
    trainer = make(tmp_path, {"episode": "single"}, max_steps=1)
    seen = batches(trainer)
    trainer.train()
    assert seen[0][0]["values"].shape == (8, 1)
    trainer.close()
