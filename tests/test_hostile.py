"""Model output is untrusted: every hostile completion gets an answer in time and costs nobody else anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import HOSTILE
from hostile_run import MEMORY_MB, TIMEOUT_S

RUN = Path(__file__).with_name("hostile_run.py")
WAYS = {
    "threads": [sys.executable, str(RUN), "threads"],
    "asyncio": [sys.executable, str(RUN), "asyncio"],
    "accelerate": [
        # On CPUs `accelerate launch` starts several processes only this way; `--cpu` alone means one.
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *(str(RUN), "accelerate"),
    ],
}


def test_there_are_enough():
    assert len(HOSTILE) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("gmpy2", ["installed", "absent"])
@pytest.mark.parametrize("way", WAYS)
def test_every_item_is_answered_and_the_next_one_is_right(tmp_path, way, gmpy2):
    environment = {**os.environ, "PYTHONPATH": str(RUN.parent), "ACCELERATE_USE_CPU": "true"}
    if gmpy2 == "absent":
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "gmpy2.py").write_text("raise ImportError('hidden by a test')")
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "hidden"), str(RUN.parent)])
    else:
        pytest.importorskip("gmpy2")
    run = subprocess.run(
        [*WAYS[way], str(tmp_path / "report")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = sorted(tmp_path.glob("report.*.json"))
    assert len(reports) == (2 if way == "accelerate" else 1)
    for path in reports:
        report = json.loads(path.read_text())
        assert set(report["rows"]) == set(HOSTILE)
        for name, row in report["rows"].items():
            assert row["outcome"] in ("wrong", "no_answer", "timed_out", "crashed"), name
            assert row["next"] == "correct", f"the item after {name}"
            # `threads` and `accelerate` measure from outside, queueing for a worker included
            assert row["seconds"] <= TIMEOUT_S + 1 + (3 * TIMEOUT_S if way == "threads" else 0), name
        assert sum(row["outcome"] in ("timed_out", "crashed") for row in report["rows"].values()) <= 15
        assert report["peak_mb"] <= MEMORY_MB
    assert not list(tmp_path.rglob("PWNED"))
