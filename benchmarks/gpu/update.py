"""Seconds of an update, ours against TRL's GRPO with vLLM in the same process and TRL's A2PO, at equal sizes."""

import gc
import statistics
import tempfile
from typing import Any

import torch
from common import Options, lora, on_gpu, ours, parity, rows, settings
from contenders import EachUpdate

GENERATIONS = 8


def measure(options: Options) -> dict[str, Any]:
    """Median seconds of an update without the first one, and ours over theirs."""
    updates, found = options.count(6, 3), {}
    for name, run in (("ours", _ours), ("grpo", _grpo), ("a2po", _a2po)):
        try:
            found[name] = round(run(options, updates), 3)
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
        except Exception as error:  # a rival that breaks must not hide our own time
            if name == "ours":
                raise
            found[name] = f"failed: {type(error).__name__}: {error}"[:500]
        gc.collect()
        torch.cuda.empty_cache()
    mine = found["ours"]
    ratios = {
        f"vs_{name}": round(mine / found[name], 3) for name in ("grpo", "a2po") if isinstance(found[name], float)
    }
    return {"seconds": found, **ratios}


def _ours(options: Options, updates: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours(options, folder, updates, {})
        seconds = _seconds(trainer)
        trainer.close()
    return seconds


def _grpo(options: Options, updates: int) -> float:
    from trl import GRPOConfig, GRPOTrainer

    reward: Any = parity
    engine: dict[str, Any] = {}
    if on_gpu():  # its weight push fails on vLLM's CPU engine
        engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
        engine["vllm_max_model_length"] = options.prompt + options.completion + 32
    with tempfile.TemporaryDirectory() as folder:
        made = settings(options, folder, updates)
        trainer = GRPOTrainer(
            options.random(),
            reward,
            GRPOConfig(**made, num_generations=min(GENERATIONS, options.batch), **engine),
            rows(options, options.batch * updates),
            peft_config=lora(),
        )
        return _seconds(trainer)


def _a2po(options: Options, updates: int) -> float:
    from transformers import AutoTokenizer
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    def by_length(completions: list[str], **kwargs: Any) -> list[float]:  # it gives reward functions no token ids
        return [float(len(text) % 2) for text in completions]

    with tempfile.TemporaryDirectory() as folder:
        # It has no LoRA: all weights, which it keeps in float32 and computes with in 16 bit.
        made = settings(options, folder, updates, model_init_kwargs={"dtype": "float32"})
        trainer = A2POTrainer(
            options.random(),
            by_length,
            A2POConfig(**made, num_value_samples=2, filter_all_incorrect=False),
            rows(options, options.batch * updates),
            processing_class=AutoTokenizer.from_pretrained(options.random(), padding_side="left"),
        )
        return _seconds(trainer)


def _seconds(trainer: Any) -> float:
    """Train, and return the median time of an update without the first one, which warms up."""
    times: list[float] = []

    def note(step: int, seconds: float) -> bool:
        times.append(seconds)
        return False

    trainer.add_callback(EachUpdate(note))
    trainer.train()
    return statistics.median(times[1:])
