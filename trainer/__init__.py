"""Stage 2: the A*-PO loss (`loss.py`) and a TRL trainer around it.

`AStarPOTrainer` has `GRPOTrainer`'s constructor; the loss is `astarpo_loss`. Nothing heavy is imported before it is
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AStarPOConfig
    from .loss import astarpo_loss, sequence_log_ratio
    from .trainer import AStarPOTrainer
    from .turn_options import TurnOptions

_EXPORTS = {
    "AStarPOConfig": "config",
    "AStarPOTrainer": "trainer",
    "TurnOptions": "turn_options",
    "astarpo_loss": "loss",
    "sequence_log_ratio": "loss",
}

__all__ = ["AStarPOConfig", "AStarPOTrainer", "TurnOptions", "astarpo_loss", "sequence_log_ratio"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
