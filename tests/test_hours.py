"""The time plan: tokens over tokens a second; calibrated on this machine, or estimated from a card's specification."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import SMALL, run
from helpers import solved_shards
from test_plan import QWEN

from astarpo.rollout.memory import ModelShape, RunSizes, plan_run
from astarpo.rollout.memory.cards import GPUS
from astarpo.rollout.memory.command import PlanOptions, plan_hours, work
from astarpo.rollout.memory.hours import Speeds, Work, estimate_speeds, stages
from astarpo.trainer.calibrate import measured

ROOT = Path(__file__).parent.parent
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN))
    return str(folder)


@pytest.fixture(scope="module")
def shape(folder):
    return ModelShape.of(folder)


def test_a_stage_takes_its_tokens_over_the_speed():
    todo = Work(100, 8, 10, 32, prompt_tokens=50, completion_tokens=150, evaluated=20)
    first, second, third = stages(todo, Speeds(sampling=1000, learning=500, source=""))
    assert (first.tokens, first.seconds) == (120_000, 120)
    assert (second.tokens, second.seconds) == (48_000, 48 + 10 * 32 * 200 / 500)
    assert (third.tokens, third.seconds) == (6000, 6)
    assert "--num_samples" in first.shorter


def test_what_a_run_does_follows_from_its_options():
    options = PlanOptions("m", dataset_name="math", per_device_train_batch_size=32, gradient_accumulation_steps=4)
    todo = work(options, None)
    assert todo is not None
    assert (todo.problems, todo.num_samples, todo.completions, todo.evaluated) == (7500, 8, 128, 500)
    assert todo.updates == 176  # three epochs, the last update of an epoch filled from the next
    assert work(replace(options, max_steps=5), None) == replace(todo, updates=5)
    assert work(replace(options, limit=500), None) == replace(todo, problems=500, updates=12)
    assert work(PlanOptions("m", dataset_name="mine.jsonl"), None) is None
    counted = work(PlanOptions("m", dataset_name="mine.jsonl", num_problems=80), None)
    assert counted is not None and (counted.problems, counted.updates) == (80, 30)


def test_measured_lengths_win_over_assumed_ones():
    speeds = Speeds(10, 10, "", prompt_tokens=33, completion_tokens=44)
    todo = work(PlanOptions("m", dataset_name="gsm8k"), speeds)
    assert todo is not None and (todo.prompt_tokens, todo.completion_tokens) == (33, 44)
    told = work(PlanOptions("m", dataset_name="gsm8k", mean_completion_length=55), speeds)
    assert told is not None and told.completion_tokens == 55


@pytest.mark.parametrize(
    "name", ["num_problems", "limit", "num_samples", "num_train_epochs", "mean_completion_length"]
)
def test_counts_must_be_positive(name):
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match="must be positive"):
        work(PlanOptions("m", dataset_name="math", **wrong), None)


def test_speeds_of_a_card_follow_its_specification(shape):
    sizes = plan_run(shape, RunSizes(768, 512, share_base_weights=True, max_num_seqs=64), 10 * GB).sizes

    def of(name="t4", **changes):
        return estimate_speeds(GPUS[name], shape, replace(sizes, **changes), 500, name)

    assert of().sampling == pytest.approx(64 / (28 * 1e-3))  # launches decide
    # With graphs a step reads 3.1 GB of weights and 0.9 GB of keys and values at 0.6 of 320 GB/s.
    read = 1_543_714_304 * 2 + 64 * 500 * 28_672
    assert of(cuda_graphs=True).sampling == pytest.approx(64 / (read / (0.6 * 320e9)), rel=1e-6)
    assert of("h100", cuda_graphs=True).sampling > 3 * of("h100").sampling
    assert of(engine="transformers").sampling < of().sampling
    assert of().learning == pytest.approx(0.2 * 65e12 / (6 * 1_543_714_304))
    assert of(gradient_checkpointing=True).learning == pytest.approx(of().learning * 6 / 8)
    assert of("l4").learning > of().learning
    assert "estimated" in of().source


def test_hours_need_a_card_and_a_number_of_problems(shape, folder):
    plan = plan_run(shape, RunSizes(768, 512, share_base_weights=True), 10 * GB)
    hours, _ = plan_hours(PlanOptions(folder, dataset_name="math"), shape, plan)
    assert len(hours) == 3 and all(stage.seconds > 0 for stage in hours)
    assert plan_hours(PlanOptions(folder), shape, plan)[0] == ()
    hours, why = plan_hours(PlanOptions(folder, dataset_name="math", gpu="24GB"), shape, plan)
    assert hours == () and "--speeds" in why


@pytest.mark.parametrize("content", ["", "[]", '{"sampling": 1}', None])
def test_a_file_without_speeds_is_refused(tmp_path, content):
    path = tmp_path / "speeds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="is not a file of `astarpo calibrate`"):
        Speeds.read(str(path))


def test_the_last_update_is_measured():
    entries = [
        {"step_time": 9.0, "num_tokens": 1000.0},
        {
            **{"step_time": 5.0, "num_tokens": 2600.0, "completions/mean_length": 120.0},
            "engine/tokens_per_second": 480.0,
        },
    ]
    speeds = measured(entries, 8)
    assert (speeds.sampling, speeds.completion_tokens, speeds.prompt_tokens) == (480, 120, 80)
    assert speeds.learning == pytest.approx(1600 / 3)  # 8 × 120 tokens were sampled in 2 of the 5 seconds


def test_calibrate_writes_what_the_plan_reads(tiny_model, tmp_path):
    problems = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = run(
        "__main__",
        *("calibrate", "--model_name_or_path", tiny_model, "--dataset_name", problems, "--dtype", "float32"),
        *("--per_device_train_batch_size", "4", "--output", "speeds.json", *SMALL),
        cwd=tmp_path,
    )
    assert "samples" in finished.stdout and "--speeds speeds.json" in finished.stdout
    speeds = Speeds.read(str(tmp_path / "speeds.json"))
    assert speeds.sampling > 0 and speeds.learning > 0
    assert 0 < (speeds.completion_tokens or 0) <= 12
    plan = run(
        "__main__",
        *("plan", "--model_name_or_path", tiny_model, "--speeds", "speeds.json", "--num_problems", "100", "--json"),
        cwd=tmp_path,
    )
    report = json.loads(plan.stdout)
    assert report["hours"] > 0 and "measured" in report["speeds"]
    assert report["stages"][0]["tokens"] == pytest.approx(800 * (speeds.completion_tokens or 0), abs=1)


def test_the_recipe_of_a_free_t4_takes_some_three_hours(folder, tmp_path):
    words = ["plan", "--model_name_or_path", folder, "--config", "t4_small", "--json"]
    found = {}
    for engine in ("vllm", "transformers"):
        found[engine] = json.loads(run("__main__", *words, "--engine", engine, cwd=tmp_path).stdout)
        assert found[engine]["peak_gb"] <= 10
    assert 1 < found["vllm"]["hours"] < found["transformers"]["hours"] < 4


@pytest.mark.slow
def test_a_recipe_from_end_to_end_goes_on_where_it_was(tiny_model, tmp_path):
    rows = [{"prompt": f"What is {i} plus 1?", "answer": str(i % 3)} for i in range(8)]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_model}\nmax_completion_length: 12\nkv_cache_gb: 0.05\nmax_num_seqs: 16\n"
        f"rollout: {{dataset_name: {problems}, num_samples: 2}}\n"
        "train: {dtype: float32, max_steps: 2, save_steps: 1, per_device_train_batch_size: 4, num_value_samples: 2, "
        "report_to: none, logging_steps: 1}\n"
        f"eval: {{dataset_name: {problems}}}\n"
    )
    command = [sys.executable, str(ROOT / "examples/run_recipe.py"), "--config", str(recipe), "--output_dir", "run"]

    def once():
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400)

    stopped = once()
    assert stopped.returncode == 2 and "`astarpo train` ended with exit code 2" in stopped.stderr
    solved_shards(tmp_path / "run/pool")  # the random model solves nothing
    first = once()
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-3000:]
    assert first.stdout.count("finished before") == 2
    report = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 <= report["accuracy_before"] <= 1 and report["hours"] > 0 and report["peak_gb"] is None
    assert "not measured (no GPU)" in first.stdout
    again = once()
    assert again.returncode == 0 and again.stdout.count("finished before") == 4
