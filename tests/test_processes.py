"""What an engine must leave as it found it: process groups, threads, and the places of other engines."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from astarpo.rollout import EngineOptions
from astarpo.rollout.engines import processes


def test_a_second_engine_does_not_take_the_first_ones_group_for_a_launchers(engine, monkeypatch):
    """vLLM has initialised torch.distributed for the first engine; nobody has set RANK."""
    assert torch.distributed.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "distributed_executor_backend" not in engine._sizes(EngineOptions(kv_cache_gb=0.05, max_num_seqs=16))


def test_the_group_of_a_launcher_is_joined(engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes, "_GROUPS_OF_VLLM", set())  # somebody else has made the group
    sizes = engine._sizes(EngineOptions(kv_cache_gb=0.05, max_num_seqs=16))
    assert sizes["distributed_executor_backend"] == "external_launcher"


def test_the_check_of_free_memory_asks_for_next_to_nothing(engine):
    assert engine._sizes(EngineOptions(kv_cache_gb=0.05, max_num_seqs=16))["gpu_memory_utilization"] <= 0.01


def test_threads_are_what_they_were(monkeypatch):
    threads = torch.get_num_threads()
    counted = [threads]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: counted[-1])
    monkeypatch.setattr(torch, "set_num_threads", counted.append)
    with processes.starting():
        torch.set_num_threads(1)
    assert counted[-1] == threads


PROGRAM = """
import os, sys
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
import torch
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
sys.path.insert(0, sys.argv[2])
from conftest import make_engine
from astarpo.rollout import SamplingSettings
from astarpo.rollout.engines.interface import generate
for _ in range(2):
    engine = make_engine(sys.argv[1])
    print(generate(engine, [[1, 20, 21]], [1], SamplingSettings(4))[0].token_ids)
    engine.close()
    one = torch.ones(1)
    torch.distributed.all_reduce(one)
    assert torch.distributed.is_initialized() and one.item() == 1
print("group is alive")
"""


def run_program(text: str, model: str, folder: Path):
    """Run a program in a process of its own, with the model and the tests' folder as its words."""
    program = folder / "program.py"
    program.write_text(text)
    words = [sys.executable, str(program), model, str(Path(__file__).parent)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_closing_an_engine_keeps_the_trainers_process_group(tiny_model, tmp_path):
    finished = run_program(PROGRAM, tiny_model, tmp_path)
    assert "group is alive" in finished.stdout, finished.stderr[-2000:]


LOST = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from conftest import make_engine
from astarpo.rollout import SamplingSettings
from astarpo.rollout.engines.interface import generate
first = make_engine(sys.argv[1])
torch.distributed.destroy_process_group()
second = make_engine(sys.argv[1])
for engine in (first, second):
    print(generate(engine, [[1, 20, 21]], [1], SamplingSettings(4))[0].token_ids)
print("both sample")
"""


def test_an_engine_starts_after_somebody_has_destroyed_the_process_group(tiny_model, tmp_path):
    finished = run_program(LOST, tiny_model, tmp_path)
    assert "both sample" in finished.stdout, finished.stderr[-2000:]
