"""Exact resume: five updates, `kill -9`, and five more equal ten, to the last bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import LORA, toy_rows
from peft import LoraConfig
from train_run import parity

from astarpo.trainer import AStarPOConfig, AStarPOTrainer
from astarpo.trainer.checkpoint import MARKER, checkpoints, last_complete, rotate, what_is_missing
from astarpo.trainer.dataset import PromptOrder

pytestmark = pytest.mark.resume
TIMES = ("time", "runtime", "per_second", "profiling", "total_flos", "seconds")


def launch(check: bool = True, **options: Any):
    command = [sys.executable, str(Path(__file__).with_name("train_run.py")), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500, check=False)
    assert not check or finished.returncode == 0, finished.stderr[-3000:]
    return finished


def outcome(folder):
    history = json.loads((folder / "result.json").read_text())
    kept = [{k: v for k, v in entry.items() if not any(word in k for word in TIMES)} for entry in history]
    return kept, (folder / "adapter_model.safetensors").read_bytes()


def ways(logging_steps):
    """With 3, scoring is also made to share prefixes and to regroup rows, which short rows are not worth otherwise."""
    return {"logging_steps": logging_steps, "call_cost": 0 if logging_steps == 3 else None}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory):
    """Outcomes by logging_steps: 1, and 3, where checkpoints fall between two logs."""
    outcomes = {}
    for logging_steps in (1, 3):
        folder = tmp_path_factory.mktemp("uninterrupted")
        launch(model=tiny_model, output_dir=str(folder), **ways(logging_steps))
        outcomes[logging_steps] = outcome(folder)
    return outcomes


# An epoch has four updates: 2 is in the first, 5 in the second, and 8 is where the third begins.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill_at", "where", "logging_steps"),
    [(2, "update", 1), (5, "update", 3), (5, "checkpoint", 1), (8, "update", 3)],
)
def test_a_killed_run_ends_as_the_uninterrupted_one(
    uninterrupted, tiny_model, tmp_path, kill_at, where, logging_steps
):
    options: dict[str, Any] = dict(model=tiny_model, output_dir=str(tmp_path), **ways(logging_steps))
    killed = launch(False, kill_at=kill_at, where=where, **options)
    assert killed.returncode == -9, killed.stderr[-3000:]
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == f"checkpoint-{kill_at}"
    assert (what_is_missing(newest) is None) == (where == "update")
    resumed = launch(resume=True, **options)
    assert f"checkpoint-{kill_at - (where == 'checkpoint')}.\n" in resumed.stderr
    assert ("is passed over: it has no marker" in resumed.stderr) == (where == "checkpoint")
    history, adapter = outcome(tmp_path)
    expected, same_adapter = uninterrupted[logging_steps]
    assert [entry.get("loss") for entry in history] == [entry.get("loss") for entry in expected]
    assert history == expected
    assert adapter == same_adapter
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def make(folder, model, engine, rows=8, reward=parity, **settings):
    settings = {
        **dict(per_device_train_batch_size=4, max_steps=2, num_value_samples=4, max_completion_length=8),
        **dict(report_to="none", save_steps=1, bf16=False, gradient_checkpointing=False, disable_tqdm=True),
        **dict(model_init_kwargs={"dtype": "float32"}, require_eos=False),
        **settings,
    }
    config = AStarPOConfig(str(folder), **settings)
    return AStarPOTrainer(model, reward, config, toy_rows(rows), peft_config=LoraConfig(**LORA), engine=engine)


def test_another_run_is_refused_field_by_field(tiny_model, tmp_path, engine):
    make(tmp_path, tiny_model, engine).train()
    for change, message in [
        ({"beta2": 0.01}, r"beta2: 0.001 there, 0.01 now"),
        ({"rows": 9}, r"data: '.*' there"),
        ({"max_steps": 3}, r"max_steps: 2 there, 3 now"),
        ({"per_device_train_batch_size": 8}, r"rows_per_update: 4 there, 8 now"),
    ]:
        other = make(tmp_path, tiny_model, engine, **change)
        with pytest.raises(ValueError, match=message):
            other.train(resume_from_checkpoint=True)
    same = make(
        tmp_path, tiny_model, engine, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=9
    )
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same.state.global_step == 2


def test_a_constant_rate_lets_a_run_be_made_longer(tiny_model, tmp_path, engine):
    make(tmp_path, tiny_model, engine, lr_scheduler_type="constant").train()
    longer = make(tmp_path, tiny_model, engine, lr_scheduler_type="constant", max_steps=3)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


def test_only_whole_checkpoints_count_and_old_ones_go_after_the_marker(tmp_path, caplog):
    for step in (1, 2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w" * step)
        (folder / MARKER).write_text(json.dumps({"files": {"weights": step}, "fingerprint": {}}))
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_text("cut")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-10 is passed over: its file weights is missing" in caplog.text
    rotate(tmp_path, 1, None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    (tmp_path / "checkpoint-2" / MARKER).unlink()
    rotate(tmp_path, 1, None)
    assert last_complete(tmp_path) is None
    assert len(checkpoints(tmp_path)) == 1, "nothing goes while nothing is whole"


def test_what_was_written_last_counts_not_the_highest_step(tiny_model, tmp_path, engine):
    old = tmp_path / "checkpoint-100"
    old.mkdir()
    (old / MARKER).write_text(json.dumps({"written": 1.0, "files": {}, "fingerprint": {}}))
    trainer = make(tmp_path, tiny_model, engine, save_total_limit=1)
    trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    make(tmp_path, tiny_model, engine, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model"):
        make(tmp_path, tiny_model, engine).train(resume_from_checkpoint=True)


def test_the_order_of_prompts_follows_from_seed_and_step():
    def rows(step, **changes):
        options = dict(num_rows=14, update_rows=4, seed=0, step=lambda: step)
        return list(PromptOrder(**{**options, **changes}))

    stream = [row for epoch in range(7) for row in rows(epoch * 4)]
    assert len(stream) == 7 * 16
    for start in range(0, len(stream), 14):
        assert sorted(stream[start : start + 14]) == list(range(14)), "each permutation holds every row once"
    assert rows(5) == rows(4) == stream[16:32]
    assert rows(0, seed=1) != rows(0)
    assert rows(0, num_rows=3, update_rows=8)[:3] != rows(0)
    assert sorted(rows(0, num_rows=3, update_rows=6)) == [0, 0, 1, 1, 2, 2]
    assert rows(0, shuffle=False)[:4] == [0, 1, 2, 3]


def test_no_row_of_an_epoch_is_dropped(tiny_model, tmp_path, engine):
    seen = []

    def reward(prompts, completion_ids, **kwargs):
        seen.extend(prompt[0]["content"] for prompt in prompts)
        return parity(completion_ids)

    settings: dict[str, Any] = dict(max_steps=-1, num_train_epochs=1, save_strategy="no")
    trainer = make(tmp_path, tiny_model, engine, 7, reward, **settings)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(seen) == 8
    assert len(set(seen)) == 7
