"""`accelerate launch -m astarpo.trainer`, with one and two processes, and what must not be mixed."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from commands import SMALL
from helpers import solved_shards

from astarpo.rollout import EngineOptions
from astarpo.trainer import AStarPOConfig
from astarpo.trainer.sizes import engine_of_training

PROBLEMS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]
ONE = ["--num_processes", "1"]
TWO = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]


@pytest.mark.slow
@pytest.mark.two_process
@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one", "two"])
def test_the_trainer_is_launched_as_documented(launcher, tiny_model, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    rollout = [
        sys.executable,
        "-m",
        "astarpo.rollout",
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "d.jsonl",
    ]
    subprocess.run(
        [*rollout, "--num_samples", "4", "--output_dir", "pool", *SMALL], cwd=tmp_path, check=True, timeout=300
    )
    solved_shards(tmp_path / "pool")
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launcher,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    words += [
        "-m",
        "astarpo.trainer",
        "--model_name_or_path",
        tiny_model,
        "--pool",
        "pool",
        "--num_value_samples",
        "4",
    ]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--output_dir", "out"]
    words += ["--bf16", "false", "--gradient_checkpointing", "false", "--logging_steps", "1", *SMALL]
    finished = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_trainer_on_the_cpu_beside_an_engine_on_the_gpu_is_refused(tmp_path, monkeypatch):
    args: Any = AStarPOConfig(str(tmp_path), report_to="none")
    assert args.device.type == "cpu"
    assert engine_of_training(args, EngineOptions()).engine == "vllm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("astarpo.trainer.sizes.chosen_engine", lambda options: EngineOptions(engine="vllm"))
    with pytest.raises(ValueError, match=r"The trainer is on the CPU .* and vLLM would take the GPU"):
        engine_of_training(args, EngineOptions())


def test_without_vllm_the_own_model_is_sampled_on_any_device(tmp_path):
    args = AStarPOConfig(str(tmp_path), report_to="none", use_vllm=False)
    assert engine_of_training(args, EngineOptions()).engine == "transformers"
    with pytest.raises(ValueError, match="Ray makes reference samples"):
        engine_of_training(args, EngineOptions(engine="ray"))
