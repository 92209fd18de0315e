"""LoRA adapters as the engine sees them: for each linear layer the factors A and B, live or from disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .sharding import whole

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

ADAPTER = "default"
"""PEFT's and TRL's name of the adapter that is trained."""
PREFIX = "base_model.model."
"""What PEFT's files put before a layer's name in the base model."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The addition scale · (x Aᵀ) Bᵀ of one linear layer: `a` of shape (r, in), `b` of shape (out, r)."""

    a: "torch.Tensor"
    b: "torch.Tensor"
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


def save_lora(layers: Mapping[str, LoraFactors], config: Any, folder: Path) -> None:
    """Write an adapter as PEFT does, from factors that may have been gathered.

    Args:
        layers (`Mapping[str, LoraFactors]`):
            The factors by layer name.
        config ([`~peft.LoraConfig`]):
            The adapter's configuration.
        folder (`Path`):
            Where to write; made when it is not there.
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, factors in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.b.contiguous()
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class SavedLora:
    """An adapter on disk, as PEFT saves it.

    Args:
        factors (`Mapping[str, LoraFactors]`):
            The factors by layer name.
        folder (`Path`):
            Where they were read from.
    """

    def __init__(self, factors: Mapping[str, LoraFactors], folder: Path):
        self._factors = dict(factors)
        self.folder = folder

    @classmethod
    def open(cls, path: str) -> "SavedLora":
        """Read an adapter from a folder or from the hub (safetensors only)."""
        from peft import PeftConfig
        from safetensors.torch import load_file

        folder = adapter_folder(path)
        if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
            raise ValueError(
                f"`{folder}` holds no LoRA adapter: it needs adapter_config.json and adapter_model.safetensors. The "
                "trainer writes both into its --output_dir."
            )
        config: Any = PeftConfig.from_pretrained(str(folder))
        check_adapter_config(config)
        return cls(_pair_factors(load_file(folder / "adapter_model.safetensors"), config), folder)

    def layers(self) -> dict[str, LoraFactors]:
        """The factors."""
        return self._factors


def adapter_folder(path: str) -> Path:
    """The folder of an adapter: `path` itself, or where the hub's cache has it now."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["adapter_*"]))
    except Exception as error:
        raise ValueError(
            f"Adapter `{path}` is neither a folder nor could it be fetched from the hub ({type(error).__name__}). Check "
            "--adapter."
        ) from error


def _pair_factors(tensors: "Mapping[str, torch.Tensor]", config: Any) -> dict[str, LoraFactors]:
    if config.rank_pattern or config.alpha_pattern:
        raise ValueError("The adapter has rank_pattern or alpha_pattern, which is not supported here: use one rank.")
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    suffix = ".lora_A.weight"
    names = [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]
    if len(tensors) != 2 * len(names):
        raise ValueError(
            f"The adapter holds more than LoRA factors: {sorted(tensors)[:3]}... Use a plain LoRA adapter."
        )
    return {
        name: LoraFactors(tensors[f"{PREFIX}{name}{suffix}"], tensors[f"{PREFIX}{name}.lora_B.weight"], scale)
        for name in names
    }


def check_adapter_config(config: Any) -> None:
    """Raise a `ValueError` that names the fix when an adapter is not plain LoRA."""
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
