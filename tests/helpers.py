"""What several test modules need: tiny policies, completions' log-probs, toy data sets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from astarpo.rollout import ReferencePool
from astarpo.rollout.graders import graded_by

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def tiny_policy(model: str, *, lora: bool = True, seed: int = 0):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not lora:
        return base
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**LORA))


def taught_qwen2(rows_of: Callable[[int], list[list[int]]], steps: int, below: float) -> Qwen2ForCausalLM:
    """A tiny Qwen2 trained on rows of token ids, 0 being padding; `rows_of` gives those of a step. It ends `below` a loss."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=320, eos_token_id=2, max_position_embeddings=1024)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for step in range(steps):
        rows = rows_of(step)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < below
    return model


def move(model, scale: float = 0.05, seed: int = 1) -> None:
    """Change every trainable parameter, as an update does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def completion_logps(model, prompt: list[int], completion) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def toy_rows(count: int = 8, rewards=(1.0, 0.0, 0.0, 1.0)) -> Dataset:
    """Chat prompts with gold answers and reference rewards."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {i} plus 1?"}],
                "solution": str(i + 1),
                "reference_rewards": list(rewards),
            }
            for i in range(count)
        ]
    )


def changed_pool(pool: ReferencePool, folder: Path, **fields: Any) -> ReferencePool:
    """A copy of a pool that says of itself what `fields` say."""
    shutil.copytree(pool.folder, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"] |= fields
    path.write_text(json.dumps(manifest))
    return ReferencePool.open(folder)


def graded_pool(pool: ReferencePool, folder: Path, functions: Any, weights: Any = None) -> ReferencePool:
    """A copy of a pool that says that reward functions graded it."""
    functions = functions if isinstance(functions, list) else [functions]
    weights = weights or [1.0] * len(functions)
    return changed_pool(pool, folder, verifier="reward functions of a test", **graded_by(functions, weights))


def solved_shards(pool: Path) -> None:
    """Give a pool rewards: the random model solves nothing, and stage 2 needs something to do."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in pool.glob("samples-*.parquet"):
        table = pq.read_table(shard)
        rewards = pa.array([float(i % 2) for i in range(len(table))], pa.float64())
        pq.write_table(table.set_column(table.column_names.index("reward"), "reward", rewards), shard)
