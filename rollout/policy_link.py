"""How the trainer's policy reaches the engine: `inline`, `adapter` or `copied`.

All three work by content: `bring` hashes the policy's tensors and acts only when they changed, so no caller has to
announce an update and nothing can be sampled stale by forgetting to.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import PolicyLink
from .vllm_engine import VLLMEngine

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

ADAPTER = "default"
"""PEFT's and TRL's name of the adapter that is trained."""


def link_policy(engine: VLLMEngine, model: "torch.nn.Module") -> PolicyLink:
    """Connect a model to an engine by the way that the engine was built for.

    Args:
        engine ([`VLLMEngine`]):
            The engine.
        model (`torch.nn.Module`):
            The policy: a [`~peft.PeftModel`] with a LoRA adapter, or a full model for an engine made `writable`.

    Raises:
        ValueError: If the adapter is of a kind that the engine cannot compute, or the model's parameters are owned by
            a wrapper; the message names the fix.
    """
    from peft import PeftModel

    if engine.writable:
        return CopiedLink(engine, model)
    if not isinstance(model, PeftModel):
        raise ValueError(
            "Full fine-tuning needs an engine that takes new weights: set policy_link=copied (VLLMEngine(writable=True)), "
            "or train a LoRA adapter by passing `peft_config`."
        )
    _check_adapter(model)
    if engine.lora_rank is not None:
        return AdapterLink(engine, model)
    return InlineLink(engine, model)


class InlineLink:
    """The engine adds `scale · (x Aᵀ) Bᵀ` to its own linear layers, from the trainer's own tensors A and B.

    A and B are read when sampling begins (cast to the engine's type, 37 MB at rank 16 for a 1.5B model) and dropped
    when it ends, so nothing can be stale but the prefix cache. The base weights are never written, so the reference
    is the same engine with the addition off.
    """

    def __init__(self, engine: VLLMEngine, model: "PeftModel"):
        self._model = model
        self._fingerprint: int | None = None
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modules = engine.modules()
        self._dtype = engine.llm.model_config.dtype
        packed = engine.llm.apply_model(lambda module: getattr(module, "packed_modules_mapping", {}))[0]
        self._placed = _place_adapters(model, self._modules, packed)
        self._handles = [
            self._modules[name].register_forward_hook(self._make_hook(name), with_kwargs=True) for name in self._placed
        ]

    def _make_hook(self, name: str) -> Any:
        def add_adapter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name not in self._factors:
                return
            a, b = self._factors[name]
            x = args[0] if args else next(iter(kwargs.values()))
            base = output[0] if isinstance(output, tuple) else output
            base.view(-1, base.shape[-1]).addmm_(x.view(-1, x.shape[-1]) @ a, b)

        return add_adapter

    def bring(self) -> bool:
        """Notice whether the adapter has changed."""
        fingerprint = _fingerprint(_adapter_tensors(self._model))
        changed, self._fingerprint = fingerprint != self._fingerprint, fingerprint
        return changed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Add the adapter inside."""
        self._factors = {name: _factors(parts, self._dtype) for name, parts in self._placed.items()}
        try:
            yield
        finally:
            self._factors = {}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class AdapterLink:
    """Every version of the adapter is saved to memory-backed disk and hot-loaded under a new name, id and path.

    A name that is used twice would find the prefix blocks of its earlier version.
    """

    def __init__(self, engine: VLLMEngine, model: "PeftModel"):
        self._engine = engine
        self._model = model
        self._fingerprint: int | None = None
        self._version = 0
        self._request: Any = None
        shared_memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="astarpo-", dir=shared_memory if shared_memory.is_dir() else None))

    def bring(self) -> bool:
        """Load the present adapter into the engine if it is not there yet."""
        fingerprint = _fingerprint(_adapter_tensors(self._model))
        if fingerprint == self._fingerprint:
            return False
        from vllm.lora.request import LoRARequest

        version = self._version + 1
        path = self._folder / f"v{version}"
        self._model.save_pretrained(str(path), selected_adapters=[ADAPTER], save_embedding_layers=False)
        engine = self._engine.llm.llm_engine
        if self._request is not None:
            engine.remove_lora(self._request.lora_int_id)
            shutil.rmtree(self._request.lora_path)
        request = LoRARequest(f"policy-{version}", version, str(path))
        if not engine.add_lora(request):
            raise RuntimeError(f"vLLM refused the adapter in {path}; its log above says why.")
        self._version, self._request, self._fingerprint = version, request, fingerprint
        return True

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the request that names the present adapter."""
        yield self._request

    def close(self) -> None:
        """Unload the adapter and delete its file."""
        if self._request is not None:
            self._engine.llm.llm_engine.remove_lora(self._request.lora_int_id)
        shutil.rmtree(self._folder, ignore_errors=True)


class CopiedLink:
    """The policy's full weights are written into the engine, which can sample no reference from then on."""

    def __init__(self, engine: VLLMEngine, model: "torch.nn.Module"):
        self._engine = engine
        self._model = model
        self._fingerprint: int | None = None

    def bring(self) -> bool:
        """Write the present weights into the engine if they are not there yet."""
        weights = list(self._model.named_parameters())
        fingerprint = _fingerprint(tensor for _, tensor in weights)
        if fingerprint == self._fingerprint:
            return False
        self._engine.weights_overwritten = True
        self._engine.llm.apply_model(lambda module: module.load_weights((n, p.detach()) for n, p in weights))
        self._fingerprint = fingerprint
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """The engine's weights are the policy already."""
        yield

    def close(self) -> None:
        """Nothing to undo: the reference weights are gone."""


def _adapter_tensors(model: "PeftModel") -> list["torch.Tensor"]:
    return [p for name, p in model.named_parameters() if f".{ADAPTER}." in name]


def _fingerprint(tensors: "Iterable[torch.Tensor]") -> int:
    """A 64-bit hash of the tensors' bits, in order."""
    import torch

    return hash(tuple(int(torch.hash_tensor(tensor.detach()).item()) for tensor in tensors))


def _check_adapter(model: "PeftModel") -> None:
    config: Any = model.peft_config[ADAPTER]
    problems = {
        f"it is {config.peft_type}, not LoRA": str(getattr(config.peft_type, "value", config.peft_type)) != "LORA",
        "use_dora=True": getattr(config, "use_dora", False),
        f"bias={getattr(config, 'bias', None)!r}": getattr(config, "bias", "none") != "none",
        "modules_to_save is set": bool(getattr(config, "modules_to_save", None)),
        "lora_dropout is not 0 (sampling knows no dropout, so scoring would disagree)": (
            getattr(config, "lora_dropout", 0.0) != 0.0
        ),
    }
    found = [reason for reason, present in problems.items() if present]
    if found:
        raise ValueError(
            f"The engine cannot compute this adapter: {'; '.join(found)}. Use a plain LoraConfig "
            "(bias='none', lora_dropout=0, no modules_to_save, no DoRA)."
        )


@dataclass(frozen=True, slots=True)
class _Placed:
    """A LoRA layer and where it acts: output columns `start` to `start + layer.out_features`, of `width` in all."""

    layer: Any
    start: int
    width: int


def _factors(parts: list[_Placed], dtype: "torch.dtype") -> "tuple[torch.Tensor, torch.Tensor]":
    """The additions to one engine module as a single low-rank product.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: A of shape (in, R) and scale · B of shape (R, width), R the sum of the
        ranks; B is zero outside each part's columns.
    """
    import torch

    a = torch.cat([part.layer.lora_A[ADAPTER].weight.detach() for part in parts]).to(dtype).T.contiguous()
    b = a.new_zeros(a.shape[1], parts[0].width)
    row = 0
    for part in parts:
        block = part.layer.lora_B[ADAPTER].weight.detach().T * part.layer.scaling[ADAPTER]
        b[row : row + block.shape[0], part.start : part.start + block.shape[1]] = block.to(dtype)
        row += block.shape[0]
    return a, b


def _place_adapters(
    model: "PeftModel", modules: dict[str, Any], packed: dict[str, list[str]]
) -> dict[str, list[_Placed]]:
    """Find for each LoRA layer the engine's module, and its columns there where the engine fuses several layers."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    fused = {part: (name, parts) for name, parts in packed.items() if len(parts) > 1 for part in parts}
    placed: dict[str, list[_Placed]] = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        _check_owned(name, layer)
        parent, _, leaf = name.rpartition(".")
        target, siblings = fused.get(leaf, (leaf, [leaf]))
        engine_name = f"{parent}.{target}"
        if engine_name not in modules:
            raise ValueError(
                f"The engine has no module `{engine_name}` for the adapter on `{name}`. Choose target_modules among the "
                "attention and MLP projections, or set policy_link=adapter."
            )
        widths = [int(base.get_submodule(f"{parent}.{sibling}").out_features) for sibling in siblings]  # pyright: ignore
        start = sum(widths[: siblings.index(leaf)])
        placed.setdefault(engine_name, []).append(_Placed(layer, start, sum(widths)))
    return placed


def _check_owned(name: str, layer: Any) -> None:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    if a.dim() != 2 or b.dim() != 2 or a.numel() == 0 or type(a).__name__ == "DTensor":
        raise ValueError(
            f"The parameters of `{name}` are owned by a wrapper (FSDP or DeepSpeed ZeRO-3), so the engine cannot compute "
            "with them. Set policy_link=adapter."
        )
