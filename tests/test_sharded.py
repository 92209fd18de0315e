"""Where FSDP2 divides the policy between two processes, each process's engine still samples the whole policy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from test_two_process import LAUNCH, environment

from astarpo.rollout.engines.policy_link import whole

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


@pytest.mark.two_process
@pytest.mark.slow
def test_a_policy_divided_by_fsdp2_reaches_the_engines(tiny_model, tmp_path):
    program = str(Path(__file__).with_name("sharded_run.py"))
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split(), program, tiny_model, str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for rank in (0, 1):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["processes"] == 2
        assert report["types"] == ["DTensor"]
        assert max(report["gaps"]) < 1e-3
        assert report["synced_again"] == [False, False]


def test_flattened_parameters_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        whole(torch.nn.Parameter(torch.zeros(10)))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_configs_are_what_accelerate_reads(name):
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == 2
    assert config.distributed_type == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
