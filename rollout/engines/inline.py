"""`inline`: an adapter that the engine adds to its own linear layers, from static buffers that a policy is copied into.

vLLM's own LoRA takes adapters from files only (`LoRARequest` in vllm/lora/request.py has a path and no tensors). So forward hooks on its
linear layers add `(x A) B`. A and B of each layer are buffers in the engine's type, made once and refreshed in place, so nothing is
allocated between generations, and kernels that a CUDA graph has captured find the present policy at the same addresses. B = 0 is the
reference.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .shared_weights import find_layer

if TYPE_CHECKING:
    from peft import PeftModel

    from .vllm_engine import VLLMEngine

ADAPTER = "default"
"""PEFT's and TRL's name of the adapter that is trained."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The addition scale · (x Aᵀ) Bᵀ of one linear layer: `a` of shape (r, in), `b` of shape (out, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class LoraSource(Protocol):
    """Where an adapter's factors come from."""

    def layers(self) -> Mapping[str, LoraFactors]:
        """The factors by the layer's name in the base model, such as `model.layers.0.self_attn.q_proj`."""
        ...


class LiveLora:
    """The adapter of a model in training; its tensors are read anew at every call.

    Args:
        model ([`~peft.PeftModel`]):
            A model with a LoRA adapter.

    Raises:
        ValueError: If the adapter is of a kind that no engine computes; the message names the fix.
    """

    def __init__(self, model: "PeftModel"):
        check_adapter_config(model.peft_config[ADAPTER])
        self._model = model

    def layers(self) -> dict[str, LoraFactors]:
        """The present factors, gathered where a wrapper has divided them among processes."""
        from peft.tuners.lora import LoraLayer

        modules = self._model.get_base_model().named_modules()
        layers: dict[str, LoraFactors] = {}
        adapted: list[tuple[str, Any]] = [(name, layer) for name, layer in modules if isinstance(layer, LoraLayer)]
        for name, layer in adapted:
            if ADAPTER not in layer.lora_A:
                raise ValueError(f"The adapter on `{name}` is not on a linear layer. Choose linear target_modules.")
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            layers[name] = LoraFactors(whole(a), whole(b), layer.scaling[ADAPTER])
        return layers


def check_adapter_config(config: Any) -> None:
    """Raise a `ValueError` that names the fix when an adapter is not plain LoRA.

    `lora_dropout` may be anything: completions are sampled and scored without dropout.
    """
    problems = {
        f"it is {config.peft_type}, not LoRA": str(getattr(config.peft_type, "value", config.peft_type)) != "LORA",
        "use_dora=True": getattr(config, "use_dora", False),
        f"bias={getattr(config, 'bias', None)!r}": getattr(config, "bias", "none") != "none",
        "modules_to_save is set": bool(getattr(config, "modules_to_save", None)),
    }
    found = [reason for reason, present in problems.items() if present]
    if found:
        raise ValueError(
            f"The engine cannot compute this adapter: {'; '.join(found)}. Use a plain LoraConfig "
            "(bias='none', no modules_to_save, no DoRA)."
        )


def whole(parameter: Any) -> torch.Tensor:
    """The whole parameter, detached. Where it is sharded all processes must ask for it at the same time.

    Args:
        parameter (`torch.Tensor`):
            A parameter, a `DTensor` of FSDP2, or one that DeepSpeed has partitioned.

    Raises:
        ValueError: If its wrapper hides it (FSDP1 flattens parameters into one); the message names the fix.
    """
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if parameter.dim() != 2 or parameter.numel() == 0:
        raise ValueError(
            "The policy's parameters were flattened by FSDP1, so the engine cannot have them. Use FSDP2 "
            "(`fsdp_version: 2`, see configs/accelerate/fsdp2.yaml) or plain data parallelism (DDP)."
        )
    return parameter.detach()


def fingerprint_of(tensors: Iterable[torch.Tensor]) -> int:
    """A 64-bit hash of the tensors' bits, in order."""
    return hash(tuple(int(torch.hash_tensor(tensor).item()) for tensor in tensors))


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


class InlineLink:
    """The engine adds the adapter to its own linear layers, from buffers that the trainer's tensors A and B are copied into.

    They are copied when sampling begins (37 MB at rank 16 for a 1.5B model), and B is zero again when it ends, so nothing can be old but
    the prefix cache. The base weights are never written, so the reference is the same engine without the addition. See
    [`InlineLayers`].

    Args:
        engine ([`VLLMEngine`]):
            The engine.
        source ([`LoraSource`]):
            The adapter.

    Raises:
        ValueError: If the engine has no place for the adapter, or has captured CUDA graphs without it; the message names the fix.
    """

    def __init__(self, engine: "VLLMEngine", source: LoraSource):
        self._source = source
        self._fingerprint: int | None = None
        shapes = shapes_of(source.layers())
        if engine.inline is not None and engine.inline.shapes == shapes:
            self._layers, self._is_own = engine.inline, False
            return
        if engine.has_graphs:
            raise ValueError(
                "The engine has captured CUDA graphs for an adapter of other layers or ranks. Set --cuda_graphs off, or start an engine for "
                "this adapter."
            )
        self._layers, self._is_own = InlineLayers(shapes), True
        self._layers.attach(engine.modules(), engine.packed_modules(), engine.dtype, engine.device)

    def sync(self) -> bool:
        """Return whether the adapter has changed; `active` copies it."""
        factors = self._source.layers().values()
        fingerprint = fingerprint_of(tensor for layer in factors for tensor in (layer.a, layer.b))
        changed, self._fingerprint = fingerprint != self._fingerprint, fingerprint
        return changed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Add the adapter inside."""
        self._layers.refresh(self._source.layers())
        try:
            yield
        finally:
            self._layers.clear()

    def close(self) -> None:
        """Remove the hooks, unless the engine was started with them."""
        if self._is_own:
            self._layers.detach()
