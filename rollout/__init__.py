"""Stage 1 and evaluation: data sets, prompts, episodes, engines, the reference pool and V*.

`EpisodeKind` says what the model is asked to do, `EpisodeSampler` samples episodes from an engine, `sample_pool` keeps graded
ones in a `ReferencePool`, `evaluate` makes a report of them, and `optimal_values` is the V* estimate. Nothing heavy is imported
before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Problem, load_problems
    from .engines.interface import Completion, Engine, FinishReason, SamplingSettings
    from .engines.vllm_engine import VLLMEngine
    from .episode import SINGLE, EpisodeKind, EpisodeSampler
    from .evaluation import EvaluationReport, evaluate
    from .fingerprint import pool_fingerprint
    from .options import DataOptions, EngineOptions, EpisodeOptions, ModelOptions, SampleOptions
    from .pag import Pag
    from .pool import PoolManifest, ReferencePool
    from .sample import sample_pool
    from .values import optimal_values

_EXPORTS = {
    "SINGLE": "episode",
    "Completion": "engines.interface",
    "DataOptions": "options",
    "Engine": "engines.interface",
    "EngineOptions": "options",
    "EpisodeKind": "episode",
    "EpisodeOptions": "options",
    "EpisodeSampler": "episode",
    "EvaluationReport": "evaluation",
    "FinishReason": "engines.interface",
    "ModelOptions": "options",
    "Pag": "pag",
    "PoolManifest": "pool",
    "Problem": "data",
    "ReferencePool": "pool",
    "SampleOptions": "options",
    "SamplingSettings": "engines.interface",
    "VLLMEngine": "engines.vllm_engine",
    "evaluate": "evaluation",
    "load_problems": "data",
    "optimal_values": "values",
    "pool_fingerprint": "fingerprint",
    "sample_pool": "sample",
}

__all__ = [
    "SINGLE",
    "Completion",
    "DataOptions",
    "Engine",
    "EngineOptions",
    "EpisodeKind",
    "EpisodeOptions",
    "EpisodeSampler",
    "EvaluationReport",
    "FinishReason",
    "ModelOptions",
    "Pag",
    "PoolManifest",
    "Problem",
    "ReferencePool",
    "SampleOptions",
    "SamplingSettings",
    "VLLMEngine",
    "evaluate",
    "load_problems",
    "optimal_values",
    "pool_fingerprint",
    "sample_pool",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
