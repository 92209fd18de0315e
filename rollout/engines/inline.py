"""An adapter that the engine adds to its own linear layers, from static buffers that a policy is copied into.

vLLM's own LoRA takes adapters from files only (`LoRARequest` in vllm/lora/request.py has a path and no tensors). So forward hooks on its
linear layers add `(x A) B`. A and B of each layer are buffers in the engine's type, made once and refreshed in place, so nothing is
allocated between generations, and kernels that a CUDA graph has captured find the present policy at the same addresses. B = 0 is the
reference.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .shared_weights import find_layer


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The addition scale · (x Aᵀ) Bᵀ of one linear layer: `a` of shape (r, in), `b` of shape (out, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The sizes of one layer's factors."""

    rank: int
    inputs: int
    outputs: int


def shapes_of(layers: Mapping[str, LoraFactors]) -> dict[str, LoraShape]:
    """The sizes of an adapter's factors by layer name."""
    return {name: LoraShape(len(factors.a), factors.a.shape[1], len(factors.b)) for name, factors in layers.items()}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a LoRA layer acts in the engine: its rows of A and B among those of `module`, and the output columns from `start`."""

    module: str
    row: int
    start: int
    shape: LoraShape


class InlineLayers:
    """The engine's linear layers with an adapter, and the buffers it is read from.

    Args:
        shapes (`Mapping[str, LoraShape]`):
            The adapter's layers by their name in the base model, such as `model.layers.0.self_attn.q_proj`.
        is_captured (`bool`, *optional*, defaults to `False`):
            Whether CUDA graphs will replay what the layers do. Then the addition is made always, with B = 0 for the reference; else it is
            left out where no policy is active.
    """

    def __init__(self, shapes: Mapping[str, LoraShape], is_captured: bool = False):
        self.shapes = dict(shapes)
        self._is_captured = is_captured
        self._is_active = False
        self._places: dict[str, _Place] = {}
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles: list[Any] = []

    @property
    def is_attached(self) -> bool:
        """Whether the engine's layers have the hooks."""
        return bool(self._handles)

    @property
    def buffers(self) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """A of shape (in, R) and B of shape (R, width) by the engine's module, R the sum of the ranks of what is fused there."""
        return self._buffers

    def attach(
        self, modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make the buffers and register the hooks.

        Args:
            modules (`Mapping[str, torch.nn.Module]`):
                The engine's modules by name.
            packed (`Mapping[str, Sequence[str]]`):
                Which layers the engine fuses into one.
            dtype (`torch.dtype`):
                The engine's type.
            device (`torch.device`):
                Where its weights are.

        Raises:
            ValueError: If the engine has no place for a layer of the adapter; the message names the fix.
        """
        widths: dict[str, int] = {}
        ranks: dict[str, int] = {}
        for name, shape in self.shapes.items():
            layer = find_layer(name, modules, packed)
            if layer.module is None:
                raise ValueError(
                    f"The engine has no module `{layer.name}` for the adapter on `{name}`. Choose target_modules among "
                    "the attention and MLP projections, or set policy_link=adapter."
                )
            columns = [
                int(width) for width in getattr(layer.module, "output_sizes", None) or [layer.module.output_size]
            ]
            if len(columns) != layer.parts or columns[layer.part] != shape.outputs:
                raise ValueError(
                    f"The adapter on `{name}` is for another model: its output has {shape.outputs} columns, the engine's "
                    f"`{layer.name}` has {columns}."
                )
            row = ranks.get(layer.name, 0)
            self._places[name] = _Place(layer.name, row, sum(columns[: layer.part]), shape)
            ranks[layer.name], widths[layer.name] = row + shape.rank, sum(columns)
        inputs = {place.module: place.shape.inputs for place in self._places.values()}
        for module, rank in ranks.items():
            a = torch.zeros(inputs[module], rank, dtype=dtype, device=device)
            self._buffers[module] = a, torch.zeros(rank, widths[module], dtype=dtype, device=device)
            self._handles.append(modules[module].register_forward_hook(self._hook(module), with_kwargs=True))

    def _hook(self, module: str) -> Any:
        a, b = self._buffers[module]

        def add_adapter(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not (self._is_active or self._is_captured):
                return
            # The layers of vllm/model_executor/layers/linear.py take one input, by position or by name, and return the output or
            # (output, bias). The sum is written into the output, so the hook returns nothing.
            x = args[0] if args else next(iter(kwargs.values()))
            base = output[0] if isinstance(output, tuple) else output
            base.view(-1, base.shape[-1]).addmm_(x.view(-1, x.shape[-1]) @ a, b)

        return add_adapter

    @torch.no_grad()
    def refresh(self, layers: Mapping[str, LoraFactors]) -> None:
        """Copy a policy into the buffers; from now on it is what the engine computes."""
        if shapes_of(layers) != self.shapes:
            raise ValueError("The adapter has other layers or ranks than the engine was made for.")
        for name, factors in layers.items():
            place = self._places[name]
            a, b = self._buffers[place.module]
            rows = slice(place.row, place.row + place.shape.rank)
            a[:, rows].copy_(factors.a.T)
            b[rows, place.start : place.start + place.shape.outputs].copy_(factors.b.T * factors.scale)
        self._is_active = True

    def clear(self) -> None:
        """Go back to the reference: B = 0."""
        self._is_active = False
        for _, b in self._buffers.values():
            b.zero_()

    def detach(self) -> None:
        """Remove the hooks and the buffers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buffers.clear()


_STARTING: list[InlineLayers] = []
"""The layers of the engine that starts just now: vLLM takes the names of loaders, not loaders."""


@contextmanager
def attached_at_start(layers: InlineLayers) -> Iterator[None]:
    """An engine that starts inside with one of our load formats gets these hooks before it warms up."""
    _STARTING.append(layers)
    try:
        yield
    finally:
        _STARTING.pop()


def attach_to(model: Any) -> None:
    """Give vLLM's model the hooks of the engine that starts just now, if it has any. Called by our weight loaders."""
    for layers in _STARTING[-1:]:
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        packed = dict(getattr(model, "packed_modules_mapping", {}))
        layers.attach(dict(model.named_modules()), packed, weight.dtype, weight.device)
