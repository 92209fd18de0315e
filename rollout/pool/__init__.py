"""The reference pool on disk.

`reading` says what a pool is and opens one, `writing` creates, continues and checks one (under `lock`), `regrading` grades it again without
sampling, `publishing` uploads it, `summary` describes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .reading import PoolManifest, ReferencePool, Sample, Shard, fingerprint_of_dataset, rewards_tensor
    from .regrading import regrade_pool
    from .writing import Fault, PoolWriter, check_pool

_EXPORTS = {
    "Fault": "writing",
    "PoolManifest": "reading",
    "PoolWriter": "writing",
    "ReferencePool": "reading",
    "Sample": "reading",
    "Shard": "reading",
    "check_pool": "writing",
    "fingerprint_of_dataset": "reading",
    "regrade_pool": "regrading",
    "rewards_tensor": "reading",
}

__all__ = [
    "Fault",
    "PoolManifest",
    "PoolWriter",
    "ReferencePool",
    "Sample",
    "Shard",
    "check_pool",
    "fingerprint_of_dataset",
    "regrade_pool",
    "rewards_tensor",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
