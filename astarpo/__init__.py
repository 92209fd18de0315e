"""A*-PO reinforcement learning for math reasoning: vLLM rollouts, math-verify rewards, a trainer in TRL's style.

```python
from astarpo import AStarPOConfig, AStarPOTrainer, ReferencePool
```

The three rooms are `astarpo.verifier` (is an answer right?), `astarpo.rollout` (stage 1 and evaluation) and `astarpo.trainer`
(stage 2). Importing this package loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .rollout import ReferencePool
    from .trainer import AStarPOConfig, AStarPOTrainer

__version__ = "0.2.0"

_EXPORTS = {"AStarPOConfig": "trainer", "AStarPOTrainer": "trainer", "ReferencePool": "rollout"}

__all__ = ["AStarPOConfig", "AStarPOTrainer", "ReferencePool", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
