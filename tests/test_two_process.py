"""Two CPU processes with an engine each equal one process on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pag_model import REVISE, VERIFY
from safetensors.torch import load_file

from astarpo.rollout import ReferencePool

pytestmark = [pytest.mark.two_process, pytest.mark.slow]
LAUNCH = (
    "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def start(processes, **options):
    words = [str(Path(__file__).with_name("train_run.py")), json.dumps(options)]
    launcher = ["-m", "accelerate.commands.launch", *LAUNCH.split()] if processes == 2 else []
    command = [sys.executable, *launcher, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, check=False)


def launch(processes, **options):
    finished = start(processes, **options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = Path(options["output_dir"])
    history = json.loads((folder / "result.json").read_text())
    return [entry for entry in history if "loss" in entry], load_file(folder / "adapter_model.safetensors")


# 14 rows are no multiple of 4; with 3 rows an update holds a row twice, on different processes.
# With a call cost of 0 the processes divide their rows into groups, each into its own number.
@pytest.mark.parametrize(("rows", "accumulation", "call_cost"), [(14, 1, None), (14, 2, 0), (3, 1, None)])
def test_losses_and_adapter_are_those_of_one_process(tiny_model, tmp_path, rows, accumulation, call_cost):
    common = dict(model=tiny_model, rows=rows, max_steps=4, optim="sgd", learning_rate=0.1, save_strategy="no")
    common |= {"gradient_accumulation_steps": accumulation, "call_cost": call_cost}
    one, adapter = launch(1, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **common)
    two, same = launch(2, output_dir=str(tmp_path / "two"), per_device_train_batch_size=2, **common)
    assert len(one) == 4
    for name in ("loss", "reward", "v_star", "kl", "completions/mean_length"):
        # The loss is about 150, where float32 has a grain of 1.5e-5.
        assert [float(e[name]) for e in two] == pytest.approx([float(e[name]) for e in one], abs=1e-5, rel=2e-7), name
    assert all(torch.allclose(same[name], adapter[name], atol=1e-5) for name in adapter)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in adapter.items() if "lora_B" in name)
    passes = [json.loads((tmp_path / "two" / f"passes{rank}.json").read_text()) for rank in (0, 1)]
    assert (passes[0] != passes[1]) == (call_cost == 0)
    assert any(shared for _, shared in passes[0]) == (call_cost == 0)


@pytest.mark.pag
@pytest.mark.parametrize(
    "options",
    [
        {"centre_residuals": True, "role_weighting": True, "balance_labels": True},
        {"value_prior": "network", "value_tracking": True},
        {"value": "critic"},
    ],
)
def test_episodes_are_those_of_one_process(guesser, pool, tmp_path, options):
    common = dict(model=guesser, pool=str(pool.folder), max_steps=4, optim="sgd", learning_rate=0.1)
    common |= {"save_strategy": "no", "max_completion_length": 32, "require_eos": True}
    values = {name: options[name] for name in options if name.startswith("value")}
    options = {name: options[name] for name in options if name not in values}
    common |= {"episode_options": {"episode": "pag", "verify_prompt": VERIFY, "revise_prompt": REVISE, **options}}
    common |= {"value_options": values}
    one, adapter = launch(1, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8, **common)
    two, same = launch(2, output_dir=str(tmp_path / "two"), per_device_train_batch_size=4, **common)
    assert len(one) == 4
    names = [name for name in one[-1] if name.startswith(("attempt/", "verify/", "revise/", "residual/", "value/"))]
    assert len(names) > 5
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "reward", "kl", *names):
            assert theirs.get(name) == pytest.approx(ours.get(name), abs=1e-4, rel=1e-5), name
    assert all(torch.allclose(same[name], adapter[name], atol=1e-5) for name in adapter)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in adapter.items() if "lora_B" in name)
    assert (tmp_path / "two" / "value_network.json").is_file() == ("value_prior" in values)


@pytest.mark.pag
def test_reference_episodes_are_left_to_one_process(tiny_model, tmp_path):
    finished = start(
        2, model=tiny_model, rows=7, stage1=True, output_dir=str(tmp_path / "two"), episode_options={"episode": "pag"}
    )
    assert finished.returncode == 1 and "Reference episodes are sampled by one process" in finished.stderr
    assert not (tmp_path / "two" / "reference_pool").exists()


def samples(folder):
    pool = ReferencePool.open(folder)
    return {(row["prompt_id"], row["sample_index"]): row["text"] for row in pool.samples.to_pylist()}


def test_stage_1_is_shared_out_and_draws_the_same_samples(tiny_model, tmp_path):
    """A random model solves nothing, which the trainer says once it has the rewards of all processes."""
    for processes, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        finished = start(processes, model=tiny_model, rows=7, stage1=True, output_dir=str(folder))
        assert finished.returncode == 1
        assert finished.stderr.count("never solved any of the 7 prompts") >= processes
    one = samples(tmp_path / "one" / "reference_pool")
    parts = [samples(tmp_path / "two" / "reference_pool" / f"process-{rank}-of-2") for rank in (1, 2)]
    assert [len(part) for part in parts] == [16, 12]
    assert parts[0] | parts[1] == one
