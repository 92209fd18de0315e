"""Rounds: training on completions that an earlier policy has sampled."""

import json
import math
from typing import Any

import pytest
import torch
from helpers import LORA, move, toy_rows
from peft import LoraConfig
from train_run import parity

from astarpo.rollout import ReferencePool
from astarpo.rollout.values import optimal_values
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, RoundOptions, TurnOptions, ValueOptions
from astarpo.trainer.loss import turn_log_ratios
from astarpo.trainer.rounds import (
    STORED,
    effective_share,
    lagged_policy,
    prompts_of_round,
    save_adapter,
)


def rounds_trainer(model, folder, *, rows=None, reward=parity, engine=None, rounds: Any = None, lora=LORA, **settings):
    rounds = {"rounds": 3, "updates_per_round": 2, "least_effective_share": 0.0} | (rounds or {})
    turns, values = settings.pop("turns", TurnOptions()), settings.pop("values", ValueOptions())
    settings = {
        "bf16": False,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_vllm": engine is not None,
        "require_eos": False,
        **settings,
    }
    return AStarPOTrainer(
        model,
        reward,
        AStarPOConfig(str(folder), **settings),
        toy_rows() if rows is None else rows,
        peft_config=LoraConfig(**lora),
        engine=engine,
        episode_options=turns,
        value_options=values,
        round_options=RoundOptions(**rounds),
    )


def test_a_run_of_rounds(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rounds/number" in entry]
    assert [entry["rounds/number"] for entry in logs] == [0, 0, 1, 1, 2, 2]
    assert [entry["rounds/age"] for entry in logs] == [0, 1] * 3
    # At the first update of a round the policy is the one that sampled it.
    assert all(abs(entry["kl"]) < 1e-6 for entry in logs[::2]) and all(entry["kl"] > 1e-6 for entry in logs[1::2])
    assert all(entry["rounds/effective_share"] > 0.999 for entry in logs[::2])
    assert all(entry["engine/logp_gap"] < 1e-4 for entry in logs)
    for number in range(3):
        pool = ReferencePool.open(tmp_path / "rounds" / f"round-{number:04d}" / "pool")
        assert pool.is_complete and pool.manifest.fingerprint["round"] == number
        assert (pool.manifest.fingerprint["adapter"] is None) == (number == 0)
    assert trainer._engine is not None


# --- exactness, in float64


DOUBLE = {"model_init_kwargs": {"dtype": "float64"}}
ALL = ValueOptions(solved_between=[0, 4])
"""Keeps groups whose completions all earned the same, so that small pools fill an update."""


def gradients(trainer, batch):
    """Loss and gradients of a batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(found, wanted):
    (loss, grads), (other_loss, other_grads) = found, wanted
    torch.testing.assert_close(loss, other_loss, rtol=1e-10, atol=0)
    scale = max(float(grad.abs().max()) for grad in other_grads.values())
    assert scale > 1e-6
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-10, atol=1e-10 * scale)


@pytest.fixture(scope="module")
def double_run(tiny_model, tmp_path_factory):
    """A finished run of three rounds in float64."""
    folder = tmp_path_factory.mktemp("double")
    trainer = rounds_trainer(tiny_model, folder, values=ALL, **DOUBLE)
    trainer.train()
    return folder


@pytest.mark.parametrize("is_moved", [False, True])
def test_round_0_is_todays_loss_on_the_same_episodes(tiny_model, tmp_path, double_run, is_moved):
    pool = str(double_run / "rounds" / "round-0000" / "pool")
    trainer = rounds_trainer(tiny_model, tmp_path / "rounds", values=ALL, pool=pool, **DOUBLE)
    rows = trainer._rows_of_round(4)
    episodes = [row[STORED].episode for row in rows]
    today = AStarPOTrainer(
        tiny_model,
        parity,
        AStarPOConfig(**{**trainer.args.to_dict(), "output_dir": str(tmp_path / "today"), "pool": None, "num_value_samples": 3}),
        type(trainer.train_dataset).from_list([{n: v for n, v in row.items() if n not in (STORED, "v_star")} for row in rows]),
        peft_config=LoraConfig(**LORA),
    )

    def sample(prompts, seeds, on_turn):
        return [
            type(episode)(tuple(prompt), episode.turns) for prompt, episode in zip(prompts, episodes, strict=True)
        ]

    today.sampler.sample = sample
    if is_moved:
        move(trainer.model), move(today.model)
    same = [today.train_dataset[row] for row in range(4)]
    assert_equal(
        gradients(trainer, trainer.make_batch(rows, "train")), gradients(today, today.make_batch(same, "train"))
    )


def round_of(model, folder, run, number):
    """A trainer that stands at the beginning of a round of a finished run, with the policy that sampled it; and the rows of an update."""
    trainer = rounds_trainer(model, folder, values=ALL, rounds={"rounds_dir": str(run / "rounds")}, **DOUBLE)
    trainer.round_progress.number = number
    rows = trainer._rows_of_round(4)
    from astarpo.rollout.engines.inline import LiveLora
    from astarpo.rollout.engines.policy_link import SavedLora

    saved = SavedLora.open(str(trainer._round.adapter)).layers()
    for name, live in LiveLora(trainer.model).layers().items():
        live.a.copy_(saved[name].a)
        live.b.copy_(saved[name].b)
    return trainer, rows


def log_probs(trainer, batch):
    return trainer.scorer(trainer.model, batch, 4, compute_entropy=False)[0]


def test_the_first_update_of_a_later_round_is_the_policy_gradient(tiny_model, tmp_path, double_run):
    trainer, rows = round_of(tiny_model, tmp_path, double_run, 2)
    batch = trainer.make_batch(rows, "train")
    found = gradients(trainer, batch)
    logps = log_probs(trainer, batch)
    ratios = turn_log_ratios(logps, batch["ref_logps"], batch["turn_ids"], 1)
    assert ratios.dtype == torch.float64 and ratios.abs().max() < 1e-12
    # The gradient of Σ (V̂ - r)·log π, by the definition of both.
    log_pi = torch.where(batch["turn_ids"] > 0, logps, 0.0).sum(1)
    rewards = torch.tensor([row[STORED].grades[0].reward for row in rows])
    rest = torch.tensor([row["reference_rewards"] for row in rows], dtype=torch.float64)
    values = optimal_values(rest, trainer.args.beta1).float()  # V̂ is kept in float32
    trainer.model.zero_grad()
    ((values.double() - rewards) * log_pi).mean().backward()
    wanted = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert_equal((torch.zeros(()), found[1]), (torch.zeros(()), wanted))


def test_the_second_update_of_a_round_is_the_regression_on_the_lagged_policy(tiny_model, tmp_path, double_run):
    trainer, rows = round_of(tiny_model, tmp_path, double_run, 2)
    before = log_probs(trainer, trainer.make_batch(rows, "train")).detach()
    move(trainer.model)  # what the first update did
    batch = trainer.make_batch(rows, "train")
    torch.testing.assert_close(batch["ref_logps"], before, rtol=1e-12, atol=1e-12)
    found = gradients(trainer, batch)
    beta2, written = trainer.args.beta2, batch["turn_ids"] > 0
    log_ratio = torch.where(written, log_probs(trainer, batch) - before, 0.0).sum(1)
    assert log_ratio.abs().min() > 1e-4
    loss = ((beta2 * log_ratio + batch["values"][:, 0] - batch["rewards"][:, 0]) ** 2 / (2 * beta2)).mean()
    trainer.model.zero_grad()
    loss.backward()
    assert_equal(found, (loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}))
    # What the engine's log-probs would change, which it computed in another order (and in float32 where it is vLLM).
    deviation = float(torch.where(written, batch["sampling_logps"] - before, 0.0).abs().max())
    assert deviation < 1e-5


def test_the_policy_is_back_after_the_lagged_one_was_used(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path)
    save_adapter(trainer.model, tmp_path / "adapter")
    move(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), lagged_policy(trainer.model, tmp_path / "adapter"):
        changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed and all("lora" in name for name in changed)
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_effective_share():
    assert effective_share(torch.zeros(8)) == pytest.approx(1)
    assert effective_share(torch.tensor([0.0, -60, -60, -60])) == pytest.approx(1 / 4)
    # Of weights 1, 1, 2: 16 / (3 · 6).
    assert effective_share(torch.tensor([0.0, 0.0, math.log(2)])) == pytest.approx(16 / 18)
    assert effective_share(torch.empty(0)) == 1


def test_prompts_of_rounds_follow_permutations():
    rounds = [prompts_of_round(number, 4, 10, seed=3) for number in range(5)]
    assert all(len(set(chosen)) == 4 for chosen in rounds)
    assert sorted(rounds[0] + rounds[1])[:1] and len(set(rounds[0] + rounds[1])) == 8
    assert set(rounds[2][:2]) == set(range(10)) - set(rounds[0] + rounds[1])
    assert prompts_of_round(7, 10, 10, seed=3) == list(range(10))
