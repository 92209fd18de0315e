"""Running the commands as a user does."""

import os
import subprocess
import sys
import time
from pathlib import Path

SMALL = ["--max_completion_length", "12", "--kv_cache_gb", "0.05", "--max_num_seqs", "16"]


def run(module: str, *words: object, cwd: Path, check: bool = True, **env: str):
    command = [sys.executable, "-m", f"astarpo.{module}", *map(str, words)]
    finished = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, timeout=300, check=False
    )
    if check:
        assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "the command ended too early"
        assert time.monotonic() < deadline, "the command took too long"
        time.sleep(0.1)
