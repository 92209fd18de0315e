"""How the policy reaches the engine: `inline`, `adapter` or `copied`; and LoRA adapters as an engine sees them.

The links to a model in training work by content: `sync` hashes the policy's tensors and acts only when they have changed. So no
caller has to announce an update, and nothing can be sampled with an old policy because somebody forgot to.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .inline import ADAPTER, InlineLink, LiveLora, LoraFactors, check_adapter_config, fingerprint_of, whole
from .interface import Engine, OwnModelLink, PolicyLink
from .server_engine import ServerEngine
from .vllm_engine import VLLMEngine

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

PREFIX = "base_model.model."
"""What PEFT's files put before a layer's name in the base model."""


def choose_link(model: "torch.nn.Module", asked: str, is_sharded: bool) -> str:
    """The way to a vLLM engine: what was asked for, or what suits the model and what wraps it.

    Args:
        model (`torch.nn.Module`):
            The policy.
        asked (`str`):
            `policy_link` of the options: `auto`, `inline`, `adapter` or `copied`.
        is_sharded (`bool`):
            Whether a wrapper divides the trained weights among processes.

    Returns:
        `str`: `inline`, `adapter` or `copied`.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return "copied" if asked == "auto" else asked
    if is_sharded and asked in ("auto", "inline"):
        return "adapter"  # no process holds tensors that `inline` could read
    return "inline" if asked == "auto" else asked


def link_policy(engine: Engine, model: "torch.nn.Module", adapter_dir: str | None = None) -> PolicyLink:
    """Connect a model in training to an engine, by the way that the engine was built for.

    Args:
        engine ([`Engine`]):
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
    if getattr(engine, "model", None) is model:  # a `TransformersEngine` over this very model
        return OwnModelLink()
    if not isinstance(engine, VLLMEngine):
        raise ValueError(
            f"A {type(engine).__name__} with a model of its own cannot take a policy in training. Set --engine vllm, server or "
            "transformers, or leave `engine` out and the trainer makes one."
        )
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


def adapter_folder(path: str, *more: str) -> Path:
    """The folder of an adapter: `path` itself, or where the hub's cache has it now, with `more` files by their patterns."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["adapter_*", *more]))
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


def is_sharded(parameter: "torch.Tensor") -> bool:
    """Whether a wrapper (FSDP2, DeepSpeed ZeRO-3) has left this process only a part of this parameter."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


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

    New ones each time, because vLLM's prefix cache knows an adapter by its name and path alone (`_gen_lora_extra_hash_keys` in
    vllm/v1/core/kv_cache_utils.py): a name that is used twice would find the blocks of its earlier version.

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
        fingerprint = fingerprint_of(tensor for layer in layers.values() for tensor in (layer.a, layer.b))
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
            # Each process would hash the part that it holds and could decide differently, but all must gather or none.
            fingerprint = None
        else:
            fingerprint = fingerprint_of(tensor.detach() for _, tensor in weights)
        if fingerprint is not None and fingerprint == self._fingerprint:
            return False
        self._engine.weights_overwritten = True
        # vLLM's own loading fuses what it fuses in a checkpoint; `WRITABLE` has kept the tensors it writes into.
        self._engine.llm.apply_model(lambda module: module.load_weights((n, _present(p)) for n, p in weights))
        self._fingerprint = fingerprint
        return True

    @contextmanager
    def active(self) -> Iterator[None]:
        """Do nothing: the engine's weights are the policy already."""
        yield

    def close(self) -> None:
        """Do nothing: the reference weights are gone."""


def _present(parameter: "torch.Tensor") -> "torch.Tensor":
    return whole(parameter) if is_sharded(parameter) else parameter.detach()
