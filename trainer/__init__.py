"""Stage 2: the A*-PO loss (`loss.py`) and a trainer around it.

`AStarPOTrainer` takes `GRPOTrainer`'s arguments. Nothing heavy is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AStarPOConfig, RoundOptions, TurnOptions, ValueOptions
    from .loss import astarpo_loss, sequence_log_ratio
    from .trainer import AStarPOTrainer

_EXPORTS = {
    "AStarPOConfig": "config",
    "AStarPOTrainer": "trainer",
    "RoundOptions": "config",
    "TurnOptions": "config",
    "ValueOptions": "config",
    "astarpo_loss": "loss",
    "sequence_log_ratio": "loss",
}

__all__ = [
    "AStarPOConfig",
    "AStarPOTrainer",
    "RoundOptions",
    "TurnOptions",
    "ValueOptions",
    "astarpo_loss",
    "sequence_log_ratio",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
