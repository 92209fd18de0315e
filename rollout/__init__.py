"""Stage 1 and evaluation: data sets, prompts, the vLLM engine, the reference pool and V*.

`ReferencePool` is what stage 1 leaves on disk, `VLLMEngine` samples the reference or the policy, `optimal_values` is
the V* estimate. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Problem, load_problems
    from .engines.interface import Completion, Engine, FinishReason, SamplingSettings
    from .engines.vllm_engine import VLLMEngine
    from .evaluation import EvaluationReport, evaluate
    from .options import DataOptions, EngineOptions
    from .pool import PoolManifest, ReferencePool
    from .stage1 import sample_pool
    from .values import optimal_values

_EXPORTS = {
    "Completion": "engines.interface",
    "DataOptions": "options",
    "Engine": "engines.interface",
    "EngineOptions": "options",
    "EvaluationReport": "evaluation",
    "FinishReason": "engines.interface",
    "PoolManifest": "pool",
    "Problem": "data",
    "ReferencePool": "pool",
    "SamplingSettings": "engines.interface",
    "VLLMEngine": "engines.vllm_engine",
    "evaluate": "evaluation",
    "load_problems": "data",
    "optimal_values": "values",
    "sample_pool": "stage1",
}

__all__ = [
    "Completion",
    "DataOptions",
    "Engine",
    "EngineOptions",
    "EvaluationReport",
    "FinishReason",
    "PoolManifest",
    "Problem",
    "ReferencePool",
    "SamplingSettings",
    "VLLMEngine",
    "evaluate",
    "load_problems",
    "optimal_values",
    "sample_pool",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
