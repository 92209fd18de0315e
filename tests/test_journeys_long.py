"""Five journeys with a real model, SmolLM2-135M-Instruct, on a CPU: `make test-long`, some ten minutes."""

import json
import signal
import subprocess
import sys

import pytest
from commands import run, wait_for
from huggingface_hub import ModelCard

from astarpo.trainer.division import write_problems
from astarpo.trainer.quickstart import fetch_model

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
SMALL = ["--max_completion_length", "24", "--kv_cache_gb", "0.3", "--max_num_seqs", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    fetch_model(folder)
    write_problems(folder / "data", 15, 40)
    return folder


@pytest.fixture(scope="module")
def words():
    given = ["--model_name_or_path", "SmolLM2-135M-Instruct", "--dataset_name", "data/train.jsonl", "--limit", 24]
    return [
        *given,
        *SMALL,
        "--num_value_samples",
        2,
        "--per_device_train_batch_size",
        16,
        "--logging_steps",
        1,
        "--learning_rate",
        "3e-4",
    ]


@pytest.fixture(scope="module")
def trained(folder, words):
    more = ["--eval_dataset_name", "data/heldout.jsonl", "--eval_limit", 20, "--max_steps", 3, "--output_dir", "out"]
    return run("__main__", "train", *words, *more, cwd=folder)


def test_from_problems_to_an_adapter_in_one_command(folder, trained):
    assert "3 logged updates" in trained.stdout and "next:" in trained.stdout
    record = json.loads((folder / "out" / "run.json").read_text())
    assert 0 < record["before"]["eval_reward"] < 1 and record["is_finished"]
    assert ModelCard.load(str(folder / "out" / "README.md")).data.to_dict()["model-index"]


def test_the_export_is_used(folder, trained):
    ended = run("__main__", "export", "--adapter", "out", "--output_dir", "merged", cwd=folder)
    assert "of 20 greedy completions are the same" in ended.stdout
    data = ["--dataset_name", "data/heldout.jsonl", "--limit", 10, *SMALL]
    evaluated = run("__main__", "eval", "--model_name_or_path", "merged", *data, "--output", "m.json", cwd=folder)
    assert "10 problems" in evaluated.stdout


def test_two_evaluations_are_compared(folder, trained):
    data = ["--model_name_or_path", "SmolLM2-135M-Instruct", "--dataset_name", "data/heldout.jsonl", *SMALL]
    run("__main__", "eval", *data, "--output", "before.json", cwd=folder)
    run("__main__", "eval", *data, "--adapter", "out", "--output", "after.json", cwd=folder)
    assert "paired 95 % interval" in run("__main__", "eval", "compare", "before.json", "after.json", cwd=folder).stdout


def test_an_interrupted_run_goes_on(folder, words):
    given = [*words, "--lr_scheduler_type", "constant", "--output_dir", "cut"]
    log = folder / "cut.txt"
    with log.open("w") as out:
        command = [sys.executable, "-m", "astarpo", "train", *map(str, given), "--max_steps", "500"]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        wait_for(process, lambda: "update   1/500" in log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=200) == 130, log.read_text()[-2000:]
    step = json.loads((folder / "cut" / "run.json").read_text())["updates"]
    again = run("__main__", "train", *given, "--max_steps", step + 1, cwd=folder)
    assert f"after update {step}" in again.stdout and f"{step + 1} logged updates" in again.stdout


def test_training_goes_on_from_an_adapter(folder, words, trained):
    more = ["--start_from_adapter", "out", "--max_steps", 1, "--output_dir", "next"]
    run("__main__", "train", *words, *more, cwd=folder)
    assert (folder / "next" / "reference" / "model.safetensors").is_file()
    assert (folder / "next" / "adapter_model.safetensors").is_file()
