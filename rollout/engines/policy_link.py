"""How the trainer's policy reaches the engine: `inline`, `adapter` or `copied`.

All three work by content: `bring` hashes the policy's tensors and acts only when they changed, so no caller has to
announce an update and nothing can be sampled stale by forgetting to.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .interface import PolicyLink
from .lora import ADAPTER, LiveLora, LoraFactors, LoraSource, save_lora
from .server_engine import ServerEngine
from .sharding import is_sharded, whole
from .vllm_engine import VLLMEngine

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def link_policy(
    engine: VLLMEngine | ServerEngine, model: "torch.nn.Module", adapter_dir: str | None = None
) -> PolicyLink:
    """Connect a model in training to an engine, by the way that the engine was built for.

    Args:
        engine ([`VLLMEngine`] or [`ServerEngine`]):
            The engine.
        model (`torch.nn.Module`):
            The policy: a [`~peft.PeftModel`] with a LoRA adapter, or a full model for an engine made `writable`.
        adapter_dir (`str`, *optional*):
            Folder that a server sees too, for adapters.

    Raises:
        ValueError: If the adapter is of a kind that the engine cannot compute, or the model's parameters are owned by
            a wrapper; the message names the fix.
    """
    from peft import PeftModel

    if isinstance(engine, ServerEngine):
        if not isinstance(model, PeftModel):
            raise ValueError("A server takes LoRA adapters only: pass a `peft_config`, or sample with --engine vllm.")
        return AdapterLink(engine, model, adapter_dir)
    if not isinstance(model, PeftModel):
        if not engine.writable:
            raise ValueError(
                "Full fine-tuning needs an engine that takes new weights: set policy_link=copied "
                "(VLLMEngine(writable=True)), or train a LoRA adapter by passing `peft_config`."
            )
        return CopiedLink(engine, model)
    if engine.writable:
        raise ValueError("policy_link=copied is for full fine-tuning; for a LoRA adapter set inline or adapter.")
    if engine.lora_rank is None:
        return InlineLink(engine, LiveLora(model))
    config: Any = model.peft_config[ADAPTER]
    rank = int(config.r)
    if rank > engine.lora_rank:
        raise ValueError(
            f"The adapter has rank {rank}, the engine was made for ranks up to {engine.lora_rank}. Make it with "
            f"VLLMEngine(lora_rank={rank}), or leave `engine` out and the trainer makes one that fits."
        )
    return AdapterLink(engine, model)


class InlineLink:
    """The engine adds `scale · (x Aᵀ) Bᵀ` to its own linear layers, from the trainer's own tensors A and B.

    A and B are read when sampling begins (cast to the engine's type, 37 MB at rank 16 for a 1.5B model) and dropped
    when it ends, so nothing can be stale but the prefix cache. The base weights are never written, so the reference
    is the same engine with the addition off.

    Args:
        engine ([`VLLMEngine`]):
            The engine.
        source ([`LoraSource`]):
            The adapter.
    """

    def __init__(self, engine: VLLMEngine, source: LoraSource):
        self._source = source
        self._fingerprint: int | None = None
        self._additions: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modules = engine.modules()
        self._dtype, self._device = engine.dtype, engine.device
        self._places = _find_places(source.layers(), self._modules, engine.packed_modules())
        self._handles = [
            self._modules[name].register_forward_hook(self._make_hook(name), with_kwargs=True)
            for name in {place.module for place in self._places.values()}
        ]

    def _make_hook(self, name: str) -> Any:
        def add_adapter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in self._additions:
                return
            a, b = self._additions[name]
            x = args[0] if args else next(iter(kwargs.values()))
            base = output[0] if isinstance(output, tuple) else output
            base.view(-1, base.shape[-1]).addmm_(x.view(-1, x.shape[-1]) @ a, b)

        return add_adapter

    def sync(self) -> bool:
        """Notice whether the adapter has changed."""
        factors = self._source.layers().values()
        fingerprint = _fingerprint(tensor for layer in factors for tensor in (layer.a, layer.b))
        changed, self._fingerprint = fingerprint != self._fingerprint, fingerprint
        return changed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Add the adapter inside."""
        parts: dict[str, list[tuple[_Place, LoraFactors]]] = {}
        for name, factors in self._source.layers().items():
            place = self._places[name]
            parts.setdefault(place.module, []).append((place, factors))
        self._additions = {name: self._join(layers) for name, layers in parts.items()}
        try:
            yield
        finally:
            self._additions = {}

    def _join(self, parts: "list[tuple[_Place, LoraFactors]]") -> "tuple[torch.Tensor, torch.Tensor]":
        """The additions to one engine module as a single low-rank product.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A of shape (in, R) and scale · B of shape (R, width), R the sum of the
            ranks; B is zero outside each part's columns.
        """
        import torch

        a = torch.cat([factors.a for _, factors in parts]).to(self._device, self._dtype).T.contiguous()
        b = a.new_zeros(a.shape[1], parts[0][0].width)
        row = 0
        for place, factors in parts:
            block = factors.b.T * factors.scale
            b[row : row + block.shape[0], place.start : place.start + block.shape[1]] = block.to(b)
            row += block.shape[0]
        return a, b

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class AdapterHost(Protocol):
    """An engine that loads adapters from disk."""

    def load_adapter(self, version: int, path: str) -> Any:
        """Load an adapter; returns what requests must carry."""
        ...

    def unload_adapter(self, handle: Any, /) -> None:
        """Forget an adapter."""
        ...


class AdapterLink:
    """Every version of the adapter is saved to memory-backed disk and hot-loaded under a new name, id and path.

    A name that is used twice would find the prefix blocks of its earlier version.

    Args:
        engine ([`AdapterHost`]):
            An engine made with a `lora_rank`, or a server.
        model ([`~peft.PeftModel`]):
            The policy.
        adapter_dir (`str`, *optional*):
            Where to save; memory-backed disk when not given.
    """

    def __init__(self, engine: AdapterHost, model: "PeftModel", adapter_dir: str | None = None):
        self._engine = engine
        self._model = model
        self._source = LiveLora(model)
        self._fingerprint: int | None = None
        self._version = 0
        self._handle: Any = None
        shared_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="astarpo-", dir=adapter_dir or shared_memory))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # also when nobody closes the link

    def sync(self) -> bool:
        """Load the present adapter into the engine if it is not there yet."""
        layers = self._source.layers()
        fingerprint = _fingerprint(tensor for layer in layers.values() for tensor in (layer.a, layer.b))
        if fingerprint == self._fingerprint:
            return False
        version = self._version + 1
        save_lora(layers, self._model.peft_config[ADAPTER], self._path(version))
        self._unload()
        self._handle = self._engine.load_adapter(version, str(self._path(version)))
        self._version, self._fingerprint = version, fingerprint
        return True

    def _path(self, version: int) -> Path:
        return self._folder / f"v{version}"

    def _unload(self) -> None:
        if self._handle is not None:
            self._engine.unload_adapter(self._handle)
            self._handle = None
            shutil.rmtree(self._path(self._version))

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield what names the present adapter in a request."""
        yield self._handle

    def close(self) -> None:
        """Unload the adapter and delete its file."""
        self._unload()
        shutil.rmtree(self._folder, ignore_errors=True)


class SavedAdapterLink:
    """An adapter on disk that the engine loads itself.

    Args:
        engine ([`AdapterHost`]):
            A server, which must see the folder.
        folder (`Path`):
            The adapter's folder.
    """

    def __init__(self, engine: AdapterHost, folder: Path):
        self._engine, self._folder = engine, folder
        self._handle: Any = None

    def sync(self) -> bool:
        """Load the adapter the first time."""
        if self._handle is not None:
            return False
        self._handle = self._engine.load_adapter(1, str(self._folder.resolve()))
        return True

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield what names the adapter in a request."""
        yield self._handle

    def close(self) -> None:
        """Unload the adapter."""
        if self._handle is not None:
            self._engine.unload_adapter(self._handle)


class CopiedLink:
    """The policy's full weights are written into the engine, which can sample no reference from then on.

    Args:
        engine ([`VLLMEngine`]):
            An engine made `writable`.
        model (`torch.nn.Module`):
            The policy.
    """

    def __init__(self, engine: VLLMEngine, model: "torch.nn.Module"):
        self._engine = engine
        self._model = model
        self._fingerprint: int | None = None

    def sync(self) -> bool:
        """Write the present weights into the engine if they are not there yet."""
        weights = list(self._model.named_parameters())
        if any(is_sharded(tensor) for _, tensor in weights):
            fingerprint = None  # processes see different parts, and all must gather or none
        else:
            fingerprint = _fingerprint(tensor.detach() for _, tensor in weights)
        if fingerprint is not None and fingerprint == self._fingerprint:
            return False
        self._engine.weights_overwritten = True
        self._engine.llm.apply_model(lambda module: module.load_weights((n, _present(p)) for n, p in weights))
        self._fingerprint = fingerprint
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """The engine's weights are the policy already."""
        yield

    def close(self) -> None:
        """Nothing to undo: the reference weights are gone."""


def _present(parameter: "torch.Tensor") -> "torch.Tensor":
    return whole(parameter) if is_sharded(parameter) else parameter.detach()


def _fingerprint(tensors: "Iterable[torch.Tensor]") -> int:
    """A 64-bit hash of the tensors' bits, in order."""
    import torch

    return hash(tuple(int(torch.hash_tensor(tensor).item()) for tensor in tensors))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a LoRA layer acts in the engine: the output columns of `module` from `start`, out of `width`."""

    module: str
    start: int
    width: int


def _find_places(
    layers: Mapping[str, LoraFactors], modules: Mapping[str, Any], packed: Mapping[str, list[str]]
) -> dict[str, _Place]:
    """Find the engine's module for each LoRA layer, and its columns there where the engine fuses several layers."""
    fused = {part: (name, parts) for name, parts in packed.items() if len(parts) > 1 for part in parts}
    places: dict[str, _Place] = {}
    for name, factors in layers.items():
        parent, _, leaf = name.rpartition(".")
        target, siblings = fused.get(leaf, (leaf, [leaf]))
        module = modules.get(f"{parent}.{target}")
        if module is None:
            raise ValueError(
                f"The engine has no module `{parent}.{target}` for the adapter on `{name}`. Choose target_modules among "
                "the attention and MLP projections, or set policy_link=adapter."
            )
        widths = [int(width) for width in getattr(module, "output_sizes", None) or [module.output_size]]
        index = siblings.index(leaf)
        if len(widths) != len(siblings) or widths[index] != factors.b.shape[0]:
            raise ValueError(
                f"The adapter on `{name}` is for another model: its output has {factors.b.shape[0]} columns, the engine's "
                f"`{parent}.{target}` has {widths}."
            )
        places[name] = _Place(f"{parent}.{target}", sum(widths[:index]), sum(widths))
    return places
