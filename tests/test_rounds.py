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
    trainer = rounds_trainer(tiny_model, tmp_path)
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
