"""Trackers get what is logged: tensorboard here, wandb and trackio in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from journeys import TRAIN, astarpo, write_files


def words(tiny_model: str, tracker: str) -> list[str]:
    given = [
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "own.csv",
        "--reward_funcs",
        "my_rewards.odd",
        *TRAIN,
    ]
    return ["train", *given, "--report_to", tracker, "--max_steps", "2", "--output_dir", "out"]


@pytest.fixture
def installed(request, tmp_path_factory) -> Path:
    """A tracker's package and what it needs, in a folder beside the project's environment."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"pip does not find {request.param}: {done.stderr[-300:]}")
    return folder


def run_with(folder: Path, tiny_model: str, tracker: str, cwd: Path, **env: str) -> None:
    # After the project's own packages, so that only what is missing comes from there.
    code = f"import sys; sys.path.append({str(folder)!r}); sys.argv[0] = 'astarpo'; from astarpo.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words(tiny_model, tracker)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_tensorboard(tiny_model, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_files(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    ended = astarpo(*words(tiny_model, "tensorboard"), cwd=tmp_path)
    assert ended.code == 0, ended.err[-2000:]
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert {"train/reward", "train/kl", "train/v_star"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("train/reward")] == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("installed", ["wandb"], indirect=True)
def test_wandb(installed, tiny_model, tmp_path):
    write_files(tmp_path)
    run_with(installed, tiny_model, "wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"train/reward" in content and b"train/v_star" in content


@pytest.mark.long
@pytest.mark.parametrize("installed", ["trackio"], indirect=True)
def test_trackio(installed, tiny_model, tmp_path):
    write_files(tmp_path)
    run_with(installed, tiny_model, "trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "kept"))
    kept = b"".join(path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert b"train/reward" in kept or b"reward" in kept
