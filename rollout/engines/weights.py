"""Where the engine's weights come from, when vLLM's own way of loading will not do.

`writable`: new weights can be written later. `shared`: they come from a model in this process, which then uses the
engine's. Both keep linear weights as they are loaded; on CPU vLLM would otherwise repack them and drop the originals.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .shared_weights import SharedWeights

if TYPE_CHECKING:
    import torch

WRITABLE, SHARED = "astarpo_writable", "astarpo_shared"
_LENT: list[SharedWeights] = []
"""The weights of the engine that starts just now: vLLM takes names of loaders, not loaders."""


@contextmanager
def lending(weights: SharedWeights) -> Iterator[None]:
    """An engine that starts inside with `load_format=SHARED` takes these weights."""
    _LENT.append(weights)
    try:
        yield
    finally:
        _LENT.pop()


def register_loaders() -> None:
    """Make the load formats known to vLLM."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class WritableLoader(DefaultModelLoader):
        def __init__(self, load_config: Any):
            load_config.load_format = "auto"
            super().__init__(load_config)

        def load_weights(self, model: "torch.nn.Module", model_config: Any) -> None:
            self.fill(model, model_config)
            for module in model.modules():
                if isinstance(module, LinearBase):
                    object.__setattr__(module, "_cpu_skip_gemm_dispatch", True)

        def fill(self, model: "torch.nn.Module", model_config: Any) -> None:
            super().load_weights(model, model_config)

    class SharedLoader(WritableLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch."""

        def fill(self, model: "torch.nn.Module", model_config: Any) -> None:
            self.track_weights_loading(model, _LENT[-1].lend(model))

    register_model_loader(WRITABLE)(WritableLoader)
    register_model_loader(SHARED)(SharedLoader)


def unpack_embeddings(model: "torch.nn.Module") -> None:
    """Make embedding layers compute with their weight; on CPU vLLM would use a packed copy that goes stale."""
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            object.__setattr__(module, "cpu_linear", torch.nn.functional.linear)
