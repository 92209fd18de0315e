"""Rates, the entropy bonus, what is said of a run that gets worse, and the mismatch between engine and trainer."""

import logging
import math
from typing import Any

import pytest
import torch
from helpers import LORA, move
from peft import LoraConfig
from trl_helpers import chat_rows, make

from astarpo.rollout import VLLMEngine
from astarpo.trainer.callbacks import WATCHED_UPDATES, ReferenceWatch
from astarpo.trainer.loss import astarpo_loss, mismatch_weights


def lora() -> dict[str, LoraConfig]:
    return {"peft_config": LoraConfig(**LORA)}


def on(engine: VLLMEngine) -> dict[str, Any]:
    """A LoRA policy that is sampled with an engine."""
    return {"trainer": lora() | {"engine": engine}, "use_vllm": True}


@pytest.mark.parametrize(("settings", "rate"), [({}, 1e-6), (lora(), 1e-5)], ids=["all weights", "LoRA"])
def test_the_learning_rate_follows_what_is_trained(tiny_model, tmp_path, engine, settings, rate):
    trainer = make(tiny_model, tmp_path, trainer=settings, learning_rate=None)
    assert trainer.args.learning_rate == rate
    chosen = make(tiny_model, tmp_path, trainer=settings, learning_rate=3e-4)
    assert chosen.args.learning_rate == 3e-4


def test_no_update_is_made_at_rate_0(tiny_model, tmp_path):
    trainer = make(
        tiny_model,
        tmp_path,
        trainer=lora(),
        max_steps=4,
        lr_scheduler_type="linear",
        warmup_steps=2,
        learning_rate=0.1,
    )
    trainer.train()
    rates = [float(log["learning_rate"]) for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])
    assert any(parameter.abs().sum() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name)


def test_a_run_that_falls_below_its_reference_says_so_once_and_what_to_change(caplog):
    watch = ReferenceWatch(speaks=True)
    with caplog.at_level(logging.WARNING):
        for update in range(1, WATCHED_UPDATES + 1):
            watch.add(update, 0.1 - 0.05 * (update % 2), kl=0.0)
        assert not caplog.records
        for update in range(7, 12):
            watch.add(update, -0.2 - 0.01 * (update % 3), kl=1.5)
        watch.add(12, -0.3, kl=1.6)
    assert len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "earns less than the reference" in said and "--learning_rate" in said and "KL of 1." in said


def test_an_update_logs_how_it_compares_with_the_reference_and_whether_it_was_clipped(tiny_model, tmp_path, caplog):
    trainer = make(
        tiny_model,
        tmp_path,
        rewards=lambda completions, **kwargs: [0.25] * len(completions),
        trainer=lora(),
        max_steps=WATCHED_UPDATES + 1,
        max_grad_norm=1e-9,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["reward/over_reference"] == pytest.approx(0.25 - 0.5)  # the reference's samples earn 1, 0, 0, 1
    assert log["clipped"] == 1.0
    assert "earns less than the reference" in caplog.text


def test_the_entropy_bonus_is_the_mean_over_the_tokens_of_an_update(tiny_model, tmp_path, engine):
    """Against the gradient of the loss without it, in one pass and in micro-batches."""
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    bonus: dict[str, torch.Tensor] = {}
    for name, coefficient, accumulation in (("without", 0.0, 1), ("with", 0.5, 1), ("pieces", 0.5, 2)):
        trainer = make(
            tiny_model,
            tmp_path / name,
            chat_rows(4),
            **on(engine),
            entropy_coef=coefficient,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=4 // accumulation,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1.0,
        )
        move(trainer.model, scale=0.02, seed=3)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        rows = [trainer.train_dataset[i] for i in range(4)]
        batch = trainer.make_batch(rows, "train")
        trainer.train()
        gradients[name] = {n: before[n] - p.detach() for n, p in trainer.model.named_parameters() if n in before}
        if name == "without":
            policy = trainer.model
            with torch.no_grad():
                for n, p in policy.named_parameters():
                    if n in before:
                        p.copy_(before[n])
            policy.zero_grad()
            _, entropies = trainer.scorer(policy, batch, 4, compute_entropy=True)
            written = batch["turn_ids"] > 0
            (-0.5 * entropies[written].mean()).backward()
            bonus = {n: p.grad.clone() for n, p in policy.named_parameters() if n in before}
        trainer.close()
    for n, bonus_n in bonus.items():
        expected = gradients["without"][n] + bonus_n
        torch.testing.assert_close(gradients["with"][n], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(gradients["pieces"][n], expected, rtol=1e-3, atol=1e-5)


def test_mismatch_weights_are_ratios_without_gradient_masked_above_three():
    log_mismatch = torch.tensor([[0.0], [math.log(2.0)], [math.log(3.1)], [-5.0]], requires_grad=True)
    weights = mismatch_weights(log_mismatch)
    assert not weights.requires_grad
    torch.testing.assert_close(weights[:, 0], torch.tensor([1.0, 2.0, 0.0, math.exp(-5.0)]))


def test_the_mismatch_of_every_row_is_measured_and_corrected(tiny_model, tmp_path, engine):
    """An engine that reports other probabilities than the trainer computes: the weight of each row follows."""
    losses = {}
    for correction in ("off", "sequence_mis"):
        trainer = make(
            tiny_model,
            tmp_path / correction,
            chat_rows(4),
            **on(engine),
            mismatch_correction=correction,
        )
        batch = trainer.make_batch([trainer.train_dataset[i] for i in range(4)], "train")
        first = batch["turn_ids"].cumsum(1) == 1
        shift = torch.tensor([0.0, math.log(2.0), -math.log(4.0), 0.1])
        batch["sampling_logps"] = batch["sampling_logps"] + shift[:, None] * first
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        losses[correction] = loss.item()
        rows = astarpo_loss(outputs["log_ratio"], batch["values"], batch["rewards"], batch["weights"], 1e-3)[:, 0]
        trainer.close()
    expected = {"off": torch.ones(4), "sequence_mis": torch.tensor([1.0, 0.5, 0.0, math.exp(-0.1)])}
    for correction, weights in expected.items():
        assert losses[correction] == pytest.approx((rows * weights).sum().item() / 4, rel=1e-3)


def test_what_is_logged_of_the_mismatch(tiny_model, tmp_path, engine):
    trainer = make(tiny_model, tmp_path, **on(engine))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["engine/logp_gap"] < 1e-3 and log["mismatch/spread"] < 1e-2
    assert log["mismatch/effective_share"] == pytest.approx(1.0, abs=1e-3) and abs(log["mismatch/k3"]) < 1e-5
    assert "engine/staleness" not in log
    trainer.close()


def test_the_probe_scores_nothing_on_a_sound_engine(tiny_model, tmp_path, engine, monkeypatch):
    trainer = make(tiny_model, tmp_path, **on(engine), max_steps=2)
    calls = []
    scorer = trainer._score
    monkeypatch.setattr(trainer, "_score", lambda *args: calls.append(1) or scorer(*args))
    trainer.train()
    assert len(calls) == 2  # the reference, once an update
    trainer.close()


def test_a_link_left_behind_stops_the_run_before_the_weights_move(tiny_model, tmp_path, adapter_engine, monkeypatch):
    trainer = make(
        tiny_model,
        tmp_path,
        **on(adapter_engine),
        max_steps=5,
        learning_rate=0.02,
    )
    assert trainer.sampler.policy is not None
    monkeypatch.setattr(trainer.sampler.policy.link, "sync", lambda: False)
    try:
        with pytest.raises(RuntimeError, match=r"samples an old policy|do not hold the same"):
            trainer.train()
        assert trainer.state.global_step < 5
    finally:
        monkeypatch.undo()
        trainer.close()
        adapter_engine.reset_prefix_cache()
