"""`kill -9` during stage 1, again and again, with the real engine and the real command."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from commands import SMALL, wait_for

from astarpo.rollout import ReferencePool
from astarpo.rollout.data import load_problems
from astarpo.rollout.options import SYSTEM_PROMPT
from astarpo.rollout.pool import PoolManifest, check_pool

KILLS, PROMPTS, SAMPLES = 20, 200, 8


def rows(folder):
    return {(row["prompt_id"], row["sample_index"]): row for row in ReferencePool.open(folder).samples.to_pylist()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_lose_nothing_that_was_committed(tmp_path, tiny_model):
    chance = random.Random(0)
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(PROMPTS)))
    pool = tmp_path / "pool"
    words = [
        *(sys.executable, "-m", "astarpo.rollout", "--model_name_or_path", tiny_model, "--dataset_name", str(data)),
        *("--num_samples", str(SAMPLES), *SMALL, "--shard_rows", "4", "--output_dir", str(pool)),
    ]
    committed, kills = {}, 0
    while kills < KILLS:
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
            target = min(len(committed) + chance.randrange(4, 17), PROMPTS * SAMPLES - 1)
            wait_for(process, lambda target=target: pool_rows(pool) >= target)
            time.sleep(chance.random() * 0.05)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        kills += 1
        present = rows(pool)
        assert all(present[key] == row for key, row in committed.items())
        assert all(fault.problem == "not named by the manifest" for fault in check_pool(pool))
        committed = present
    assert len(committed) < PROMPTS * SAMPLES, "the kills came too late to prove anything"
    finished = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    final = rows(pool)
    problems = load_problems(str(data), system_prompt=SYSTEM_PROMPT)
    assert set(final) == {(problem.prompt_id, index) for problem in problems for index in range(SAMPLES)}
    assert ReferencePool.open(pool).num_rows == len(final) == PROMPTS * SAMPLES
    assert all(final[key] == row for key, row in committed.items())
    assert check_pool(pool) == []


def pool_rows(pool) -> int:
    return PoolManifest.load(pool).num_rows if (pool / "manifest.json").exists() else 0
