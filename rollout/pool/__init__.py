"""The reference pool on disk.

`manifest` says what a pool is, `reading` opens one, `writing` creates and continues one (under `lock`), `checking` finds
what is broken, `regrading` grades again without sampling, `summary` describes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checking import Fault, check_pool
    from .manifest import PoolManifest, Sample, Shard
    from .reading import ReferencePool, rewards_tensor
    from .regrading import regrade_pool
    from .writing import PoolWriter

_EXPORTS = {
    "Fault": "checking",
    "PoolManifest": "manifest",
    "PoolWriter": "writing",
    "ReferencePool": "reading",
    "Sample": "manifest",
    "Shard": "manifest",
    "check_pool": "checking",
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
    "regrade_pool",
    "rewards_tensor",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
