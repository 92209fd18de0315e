"""One of two gloo processes: a policy divided by FSDP2, brought to an engine; writes what the engine and HF say."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from accelerate import PartialState
from conftest import make_engine
from helpers import completion_logps, move, tiny_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from astarpo.rollout import SamplingSettings
from astarpo.rollout.engines.interface import generate
from astarpo.rollout.engines.policy_link import LiveLora, link_policy

PROMPTS = [[1, 20, 21, 22], [1, 30, 31]]


def run(model: str, folder: str) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    engine = make_engine(model, lora_rank=8)
    whole: Any = tiny_policy(model)
    policy: Any = tiny_policy(model)
    mesh = init_device_mesh("cpu", (state.num_processes,))
    for layer in policy.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    link = link_policy(engine, policy)
    gaps, changed = [], []
    for seed in (1, 2):
        move(whole, seed=seed)
        gathered = LiveLora(whole).layers()
        for name, layer in policy.get_base_model().named_modules():  # the same update, on each process's part
            if name in gathered:
                for part, tensor in ((layer.lora_A, gathered[name].a), (layer.lora_B, gathered[name].b)):
                    spread(part["default"].weight, tensor)
        completions = generate(engine, PROMPTS, [seed, seed + 1], SamplingSettings(8), link, lambda: None)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            expected = completion_logps(whole, prompt, completion)
            gaps.append(float((torch.tensor(completion.logprobs) - expected).abs().max()))
        changed.append(link.sync())
    local = {type(p).__name__ for p in policy.parameters()}
    link.close()
    report = {"gaps": gaps, "synced_again": changed, "types": sorted(local), "processes": state.num_processes}
    Path(folder, f"rank{state.process_index}.json").write_text(json.dumps(report))


@torch.no_grad()
def spread(parameter, tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    parameter.copy_(distribute_tensor(tensor, parameter.device_mesh, parameter.placements))


if __name__ == "__main__":
    run(*sys.argv[1:])
