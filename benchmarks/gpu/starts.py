"""Does it start? Versions, the engine that is chosen, and two engines one after the other in one process."""

import gc
import time
from typing import Any

from common import Options

from astarpo.rollout import EngineOptions, SamplingSettings, VLLMEngine
from astarpo.rollout.engines.interface import generate
from astarpo.rollout.env_cli import lines
from astarpo.rollout.startup import judge, look


def measure(options: Options) -> dict[str, Any]:
    """What `astarpo env` prints, the verdict, and seconds and log-probs of two starts of vLLM."""
    machine = look()
    verdict = judge(machine)
    found: dict[str, Any] = {"environment": lines(machine), "engine": verdict.engine, "note": verdict.note}
    if verdict.engine == "vllm":
        found["starts"] = [_start(options) for _ in range(2)]
    return found


def _start(options: Options) -> dict[str, Any]:
    began = time.perf_counter()
    engine = VLLMEngine(
        options.random(), options.prompt + options.completion, options=EngineOptions(kv_cache_gb=0.1, max_num_seqs=8)
    )
    started = time.perf_counter() - began
    settings = SamplingSettings(8, 1.0)
    (completion,) = generate(engine, [[5] * options.prompt], [0], settings)
    engine.close()
    gc.collect()
    return {"seconds": round(started, 2), "logprobs": [round(value, 4) for value in completion.logprobs]}
