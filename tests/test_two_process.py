"""Two CPU processes with an engine each equal one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.two_process, pytest.mark.slow]
LAUNCH = (
    "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
)


def launch(processes, **options):
    words = [str(Path(__file__).with_name("train_run.py")), json.dumps(options)]
    start = ["-m", "accelerate.commands.launch", *LAUNCH.split()] if processes == 2 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *start, *words]
    finished = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = Path(options["output_dir"])
    history = json.loads((folder / "result.json").read_text())
    return [entry for entry in history if "loss" in entry], load_file(folder / "adapter_model.safetensors")


# 14 rows are no multiple of 4; with 3 rows an update holds a row twice, on different processes.
@pytest.mark.parametrize(("rows", "accumulation"), [(14, 1), (14, 2), (3, 1)])
def test_losses_and_adapter_are_those_of_one_process(tiny_model, tmp_path, rows, accumulation):
    common = dict(model=tiny_model, rows=rows, max_steps=4, optim="sgd", learning_rate=0.1, save_strategy="no")
    common |= {"gradient_accumulation_steps": accumulation}
    one, adapter = launch(1, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **common)
    two, same = launch(2, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, **common)
    assert len(one) == 4
    for name in ("loss", "reward", "v_star", "kl", "completions/mean_length"):
        # The loss is about 150, where float32 has a grain of 1.5e-5.
        assert [float(e[name]) for e in two] == pytest.approx([float(e[name]) for e in one], abs=1e-5, rel=2e-7), name
    assert all(torch.allclose(same[name], adapter[name], atol=1e-5) for name in adapter)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in adapter.items() if "lora_B" in name)
