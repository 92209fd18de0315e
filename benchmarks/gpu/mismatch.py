"""How far the engine's log-probs are from the trainer's, per token and per completion, in float16 and in bfloat16."""

import statistics
import tempfile
from typing import Any

import torch
from common import Options, on_gpu, ours

METRICS = ("engine/logp_gap", "mismatch/spread", "mismatch/k3", "mismatch/effective_share")


def measure(options: Options) -> dict[str, Any]:
    """Medians over a few updates, by type; what they mean is in docs/metrics.md."""
    found: dict[str, Any] = {}
    for dtype in ("float16", "bfloat16") if on_gpu() else ("float32", "bfloat16"):
        if dtype == "bfloat16" and on_gpu() and torch.cuda.get_device_capability() < (8, 0):
            found[dtype] = "this GPU has no bfloat16 arithmetic"
            continue
        precision = {"fp16": dtype == "float16", "bf16": dtype == "bfloat16"}
        with tempfile.TemporaryDirectory() as folder:
            trainer = ours(options, folder, options.count(6, 2), {}, model_init_kwargs={"dtype": dtype}, **precision)
            trainer.train()
            trainer.close()
        logged = [entry for entry in trainer.state.log_history if METRICS[0] in entry]
        found[dtype] = {name: statistics.median(float(entry[name]) for entry in logged) for name in METRICS}
    return found
