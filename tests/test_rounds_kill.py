"""Rounds that are killed at any moment, in one process and in two, end as if they had not been."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from astarpo.rollout import ReferencePool
from astarpo.rollout.pool import check_pool

pytestmark = pytest.mark.slow
ROUNDS = 4


def start(**options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("rounds_run.py")), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> int:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode in (0, -9), stderr[-3000:]
    return process.returncode


def outcome(folder: Path):
    return json.loads((folder / "result.json").read_text()), (folder / "adapter_model.safetensors").read_bytes()


def pools(rounds: Path):
    """The samples of every round, none lost and none doubled."""
    found = []
    for number in range(ROUNDS):
        folder = rounds / f"round-{number:04d}" / "pool"
        assert check_pool(folder) == []
        pool = ReferencePool.open(folder)
        assert pool.is_complete
        rows = pool.read(["prompt_id", "sample_index", "completion_ids", "reward"]).to_pylist()
        found.append(sorted(rows, key=lambda row: (row["prompt_id"], row["sample_index"])))
    return found


@pytest.fixture(scope="module")
def lag_0(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lag-0")
    assert finish(start(model=tiny_model, output_dir=str(folder), rounds={})) == 0
    return folder


def test_ten_kills_in_one_process(tiny_model, lag_0, tmp_path):
    generator, kills = random.Random(5), 0
    # A fast machine ends a run before the tenth kill: then the next kills fall into another run from the beginning.
    for number in itertools.count():
        folder = tmp_path / str(number)
        options: dict[str, Any] = dict(model=tiny_model, output_dir=str(folder), rounds={})
        code: int | None = None
        while code != 0:
            # Within what a run takes from the moment that its model is loaded, so that kills fall into all of it.
            code = finish(start(**options, kill_after_s=generator.uniform(0.05, 0.6) if kills < 10 else None))
            kills += code == -9
        assert outcome(folder) == outcome(lag_0)
        assert pools(folder / "rounds") == pools(lag_0 / "rounds")
        if kills == 10:
            break
        assert number < 5, "a run ends within the shortest delay of a kill"


def apart(model: str, folder: Path) -> list[dict[str, Any]]:
    shared = {"rounds_dir": str(folder / "rounds"), "lag": 1}
    return [
        {"model": model, "output_dir": str(folder / part), "rounds": {**shared, "part": part}}
        for part in ("sampler", "trainer")
    ]


@pytest.fixture(scope="module")
def lag_1(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lag-1")
    running = [start(**options) for options in apart(tiny_model, folder)]
    assert [finish(process) for process in running] == [0, 0]
    return folder


def test_the_parts_of_a_run_give_what_one_process_gives(tiny_model, lag_1, tmp_path):
    assert finish(start(model=tiny_model, output_dir=str(tmp_path), rounds={"lag": 1})) == 0
    assert outcome(tmp_path) == outcome(lag_1 / "trainer")
    made = [ReferencePool.open(lag_1 / "rounds" / f"round-{number:04d}" / "pool").manifest for number in range(ROUNDS)]
    assert [manifest.fingerprint["adapter_round"] for manifest in made] == [0, 0, 1, 2]


def test_ten_kills_of_two_processes(tiny_model, lag_1, tmp_path):
    generator, kills = random.Random(6), 0
    for number in itertools.count():
        folder = tmp_path / str(number)
        parts = apart(tiny_model, folder)
        running: dict[int, subprocess.Popen[str]] = {}
        done: set[int] = set()
        while len(done) < 2:
            for part, options in enumerate(parts):
                if part in done:
                    continue
                if part not in running:
                    deadline = {"kill_after_s": generator.uniform(0.05, 0.6)} if kills + len(running) < 12 else {}
                    running[part] = start(**options, **deadline)
                elif running[part].poll() is not None:
                    code = finish(running.pop(part))
                    kills += code == -9
                    if code == 0:
                        done.add(part)
            time.sleep(0.05)
        assert outcome(folder / "trainer") == outcome(lag_1 / "trainer")
        assert pools(folder / "rounds") == pools(lag_1 / "rounds")
        if kills >= 10:
            break
        assert number < 5, "both parts end within the shortest delay of a kill"
