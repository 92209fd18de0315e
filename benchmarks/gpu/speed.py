"""Tokens a second of the engine: plain weights, and the policy by each way that it takes to the engine."""

import tempfile
import time
from typing import Any

from common import Options, on_gpu, ours

from astarpo.rollout import SamplingSettings

WAYS: dict[str, dict[str, Any]] = {
    "inline, eager": {"policy_link": "inline"},
    "inline, graphs": {"policy_link": "inline", "cuda_graphs": "on"},
    "adapter": {"policy_link": "adapter"},
    "transformers": {"engine": "transformers"},
}


def measure(options: Options) -> dict[str, Any]:
    """Tokens a second of 64 completions at once, after one call that warms up."""
    found: dict[str, Any] = {}
    for name, engine in WAYS.items():
        if name == "inline, graphs" and not on_gpu():
            found[name] = "CUDA graphs need a GPU"
            continue
        try:
            found[name] = _measure_way(options, engine)
        except Exception as error:  # one way that breaks must not hide the others
            found[name] = f"failed: {type(error).__name__}: {error}"[:500]
    return found


def _measure_way(options: Options, engine: dict[str, Any]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours(options, folder, 1, engine)
        try:
            trainer.train()
            return decoding(trainer, options.count(64, 8), options.count(128, 8))
        finally:
            trainer.close()


def decoding(trainer: Any, count: int, length: int) -> dict[str, float]:
    """Tokens a second of plain weights and of the policy."""
    prompts, found = [[5 + i % 200] * 16 for i in range(count)], {}
    for name, policy in (("plain weights", None), ("policy", trainer.sampler.policy.link)):
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            stream = trainer.engine.stream(prompts, list(range(count)), SamplingSettings(length, 1.0), policy)
            tokens = sum(len(completion.token_ids) for _, completion in stream)
            found[name] = round(tokens / (time.perf_counter() - began), 1)
    return found
