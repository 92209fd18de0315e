"""Memory stays flat over hundreds of updates: adapters loaded, pools read and caches filled must not pile up."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.flat, pytest.mark.slow, pytest.mark.timeout(1500)]
UPDATES, SETTLED = 500, 100


@pytest.mark.parametrize("way", ["inline", "adapter", "copied"])
def test_memory_is_flat_over_the_last_400_of_500_updates(tiny_model, tmp_path, way):
    options = dict(model=tiny_model, output_dir=str(tmp_path), policy_link=way, max_steps=UPDATES, save_strategy="no")
    options |= {"per_device_train_batch_size": 2, "watch_memory": True, "learning_rate": 1e-4}
    command = [sys.executable, str(Path(__file__).with_name("train_run.py")), json.dumps(options)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    finished = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1400, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    rss = json.loads((tmp_path / "rss.json").read_text())
    assert len(rss) == UPDATES
    settled = sum(rss[SETTLED - 10 : SETTLED + 10]) / 20
    assert max(rss[SETTLED:]) < 1.02 * settled, (settled, max(rss[SETTLED:]), rss[-1])
