"""What breaks in training is detected, counted and explained."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import LORA, toy_rows
from peft import LoraConfig
from train_run import parity
from transformers import TrainerCallback

from astarpo.trainer import AStarPOConfig, AStarPOTrainer
from astarpo.trainer.callbacks import BROKEN_STREAK, SCALER_STREAK, DeadlineGuard, NumericGuard, parse_deadline

pytestmark = pytest.mark.faults


def make(folder, model, engine, reward=parity, lora=LORA, callbacks=None, **settings):
    settings = {
        **dict(per_device_train_batch_size=4, max_steps=3, num_value_samples=4, max_completion_length=8, seed=1),
        **dict(report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True),
        **dict(model_init_kwargs={"dtype": "float32"}, require_eos=False, logging_steps=1, learning_rate=1e-2),
        **settings,
    }
    config = AStarPOConfig(str(folder), **settings)
    return AStarPOTrainer(
        model, reward, config, toy_rows(), peft_config=LoraConfig(**lora), engine=engine, callbacks=callbacks
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


class Poison(TrainerCallback):
    """Puts a NaN into a gradient at given updates, and remembers the weights after each."""

    def __init__(self, *steps):
        self.steps, self.after = steps, []
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            next(p for p in kwargs["model"].parameters() if p.grad is not None).grad[0, 0] = float("nan")

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(weights(self.trainer))


def test_an_update_with_a_broken_gradient_is_left_out_and_counted(tiny_model, tmp_path, engine):
    poison = Poison(1)
    poison.trainer = make(tmp_path, tiny_model, engine, callbacks=[poison])
    poison.trainer.train()
    first, second, third = poison.after
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert logged(poison.trainer, "skipped_updates") == [0, 1, 0]


def test_gradients_that_stay_broken_end_training_with_the_weights_from_before(tiny_model, tmp_path, engine):
    poison = Poison(*range(2, 20))
    poison.trainer = make(tmp_path, tiny_model, engine, callbacks=[poison], max_steps=20)
    with pytest.raises(FloatingPointError, match=f"{BROKEN_STREAK} updates in a row.*--learning_rate"):
        poison.trainer.train()
    assert all(torch.equal(poison.after[1][name], tensor) for name, tensor in weights(poison.trainer).items())


def test_a_loss_scale_that_keeps_falling_ends_training():
    scaler = SimpleNamespace(get_scale=lambda: 0.5)
    accelerator = SimpleNamespace(scaler=scaler, optimizer_step_was_skipped=True)
    counts: list[float] = []
    guard = NumericGuard(accelerator, {"skipped_updates": counts})
    model = torch.nn.Linear(1, 1)
    step = (None, SimpleNamespace(global_step=7), None)
    for _ in range(SCALER_STREAK - 1):
        guard.on_pre_optimizer_step(*step, model=model)  # pyright: ignore[reportArgumentType]
        guard.on_step_end(*step)  # pyright: ignore[reportArgumentType]
    with pytest.raises(FloatingPointError, match=r"loss scale down to 0\.5"):
        guard.on_step_end(*step)  # pyright: ignore[reportArgumentType]
    assert sum(counts) == SCALER_STREAK


def test_infinite_rewards_are_refused_by_name(tiny_model, tmp_path, engine):
    def endless(completions, **kwargs):
        return [float("inf")] * len(completions)

    with pytest.raises(ValueError, match="endless returned inf"):
        make(tmp_path, tiny_model, engine, endless).train()


def limit_rows(trainer, most, monkeypatch, grad):
    """Let the model's forward run out of memory above `most` rows, with gradients or without."""
    model = trainer.model
    forward, rows = model.forward, []

    def limited(*args, **kwargs):
        count = len(kwargs["input_ids"])
        if torch.is_grad_enabled() == grad:
            rows.append(count)
            if count > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", limited)
    return rows


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "scoring"])
def test_running_out_of_memory_splits_the_work_and_keeps_the_update(
    tiny_model, tmp_path, engine, monkeypatch, grad, accumulation
):
    settings = dict(optim="sgd", learning_rate=1.0, gradient_accumulation_steps=accumulation, probe_rows=0)
    whole = make(tmp_path, tiny_model, engine, **settings)
    whole.train()
    split = make(tmp_path, tiny_model, engine, **settings)
    rows = limit_rows(split, 2, monkeypatch, grad)
    split.train()
    assert 4 in rows
    assert rows.count(2) > 4
    assert logged(split, "oom_splits")
    assert all(torch.allclose(weights(whole)[n], tensor, atol=1e-5) for n, tensor in weights(split).items())
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)


def test_memory_that_does_not_suffice_for_one_row_names_the_fix(tiny_model, tmp_path, engine, monkeypatch):
    trainer = make(tmp_path, tiny_model, engine)
    limit_rows(trainer, 0, monkeypatch, True)
    with pytest.raises(torch.OutOfMemoryError, match=r"single completion does not fit.*--gradient_checkpointing"):
        trainer.train()


@pytest.mark.slow
def test_an_engine_that_hangs_ends_the_process_with_a_stack_dump_and_can_be_resumed(tiny_model, tmp_path):
    options = dict(model=tiny_model, output_dir=str(tmp_path), max_steps=4)

    def launch(**more):
        command = [sys.executable, str(Path(__file__).with_name("train_run.py")), json.dumps({**options, **more})]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    hung = launch(hang_at=2, engine_timeout_s=20.0)  # a busy machine's first completions take their time
    assert hung.returncode == 1
    assert "Timeout" in hung.stderr
    assert "in hang" in hung.stderr
    resumed = launch(resume=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "checkpoint-2" in resumed.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_that_the_engine_cannot_compute_are_refused(tiny_model, tmp_path, engine, change, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tiny_model, engine, lora=LORA | change)


def test_an_adapter_of_a_higher_rank_than_the_engines_is_refused(tiny_model, tmp_path, adapter_engine):
    with pytest.raises(ValueError, match=r"rank 16.*up to 8"):
        make(tmp_path, tiny_model, adapter_engine, lora=LORA | {"r": 16})


@pytest.mark.parametrize(("name", "number"), [("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT)])
def test_a_signal_saves_and_ends_training(tiny_model, tmp_path, engine, name, number):
    trainer = make(tmp_path, tiny_model, engine, max_steps=10_000, save_strategy="steps", save_steps=10_000)
    before = signal.getsignal(number)

    def send():
        while trainer.state.global_step < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    trainer.train()
    sender.join()
    assert trainer.interrupt.requested
    assert 2 <= trainer.state.global_step < 10_000
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "astarpo_complete.json").exists()
    assert signal.getsignal(number) is before


def test_a_deadline_saves_and_ends_training(tiny_model, tmp_path, engine, caplog):
    trainer = make(
        tmp_path, tiny_model, engine, max_steps=10_000, save_by="4s", save_strategy="steps", save_steps=10_000
    )
    began = time.monotonic()
    trainer.train()
    assert time.monotonic() - began < 8
    assert 0 < trainer.state.global_step < 10_000
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "astarpo_complete.json").exists()
    assert "before save_by" in caplog.text


def test_deadlines_are_durations_times_or_dates():
    now = datetime(2026, 11, 22, 18, 0)
    assert parse_deadline("3h50m", now) == now + timedelta(hours=3, minutes=50)
    assert parse_deadline("90s", now) == now + timedelta(seconds=90)
    assert parse_deadline("18:30", now) == now + timedelta(minutes=30)
    assert parse_deadline("17:30", now) == now + timedelta(hours=23, minutes=30)
    assert parse_deadline("2026-11-23T06:00", now) == now + timedelta(hours=12)
    for bad in ("soon", "", "25:00", "2026-11-22T17:00", "0m"):
        with pytest.raises(ValueError, match="save_by"):
            parse_deadline(bad, now)
    with pytest.raises(ValueError, match="save_by"):
        AStarPOConfig("x", save_by="soon")
    assert DeadlineGuard("1h").deadline > datetime.now()
