"""Where vLLM's weights come from, when its own way of loading will not do: two load formats and one copy for two models.

`WRITABLE`: new weights can be written into the engine later (`policy_link=copied`). `SHARED`: the weights come from the
trainer's model in this process, and from then on there is one copy of them. vLLM fuses layers (q, k and v are one tensor), so
the memory is the engine's: while it starts it is filled from the trainer's model, parameter by parameter, and each parameter
becomes a view of its place there as soon as it was copied. Nothing is held twice, not even while starting, and nothing but the
adapter has to reach the engine later.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class SharingError(ValueError):
    """The weights cannot be shared; the message says why."""


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """Where a layer of a Hugging Face model lies in vLLM's model.

    Attributes:
        name (`str`):
            Name of vLLM's module, such as `model.layers.0.self_attn.qkv_proj`.
        module (`torch.nn.Module`, *optional*):
            The module; None where vLLM has no module of that name.
        part (`int`):
            Which of the layers that are fused there this one is: 1 for k in `qkv_proj`.
        parts (`int`):
            How many layers are fused there; 1 where the layer stands alone.
    """

    name: str
    module: Any
    part: int
    parts: int


def find_layer(name: str, modules: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> EngineLayer:
    """Find a layer of a Hugging Face model in vLLM's model.

    Args:
        name (`str`):
            The layer's name in the Hugging Face model, such as `model.layers.0.self_attn.k_proj`.
        modules (`Mapping[str, torch.nn.Module]`):
            vLLM's modules by name.
        packed (`Mapping[str, Sequence[str]]`):
            vLLM's `packed_modules_mapping` (vllm/model_executor/models/interfaces.py): which layers it fuses into one, and
            in which order their output columns stand there.
    """
    parent, _, leaf = name.rpartition(".")
    for fused, leaves in packed.items():
        if leaf in leaves and len(leaves) > 1:
            target, part, parts = fused, list(leaves).index(leaf), len(leaves)
            break
    else:
        target, part, parts = leaf, 0, 1
    full_name = f"{parent}.{target}".lstrip(".")
    return EngineLayer(full_name, modules.get(full_name), part, parts)


@dataclass(frozen=True, slots=True)
class _Place:
    """Rows `start` to `stop` of a parameter of the engine."""

    parameter: "torch.nn.Parameter"
    start: int
    stop: int

    def view(self) -> "torch.Tensor":
        return self.parameter.data[self.start : self.stop]


class SharedWeights:
    """The frozen weights of a model, to be used by an engine too.

    Args:
        model ([`~peft.PeftModel`]):
            The policy; only what is not trained is shared.

    Raises:
        SharingError: If its weights cannot be shared.
    """

    def __init__(self, model: "torch.nn.Module"):
        reason = why_not_shareable(model)
        if reason:
            raise SharingError(
                f"The base weights cannot be shared with the engine: {reason}. Set share_base_weights=off."
            )
        self._model = model
        self._parameters = dict(_base_parameters(model))
        self._places: dict[str, _Place] = {}

    @property
    def bytes(self) -> int:
        """Bytes that are held once instead of twice."""
        return sum(parameter.nbytes for parameter in self._parameters.values())

    def park(self) -> None:
        """Move the weights to the CPU until the engine has its tensors, so that a GPU never holds two copies."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.cpu()

    def take_back(self, device: "torch.device") -> None:
        """Give the model memory of its own again, after an engine that did not start."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(device, copy=True)

    def lend(self, engine_model: Any) -> set[str]:
        """Fill the engine's model with the weights and turn them into views of it.

        Args:
            engine_model (`torch.nn.Module`):
                vLLM's model, allocated but empty.

        Returns:
            `set[str]`: Names of the engine's parameters that were filled.

        Raises:
            SharingError: If a weight has no place in the engine, if it was changed on the way there, or if a weight of the
                engine has no source in the model.
        """
        self._places = _find_places(self._parameters, engine_model)
        filled = engine_model.load_weights(self._handing_over())
        empty = [name for name, _ in engine_model.named_parameters() if name not in filled]
        if empty:
            raise SharingError(f"The model has no weight for the engine's `{empty[0]}`. Set share_base_weights=off.")
        for name, parameter in self._parameters.items():
            if not self._is_view(name) and not self._become_view(name):
                raise SharingError(
                    f"The weight `{name}` ({tuple(parameter.shape)}, {parameter.dtype}) is held differently by the engine, so it "
                    "cannot be shared. Set share_base_weights=off."
                )
        return filled

    def _handing_over(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """The weights as vLLM's `load_weights` takes them; each becomes a view once vLLM asks for the next one."""
        for name, parameter in self._parameters.items():
            yield name, parameter.data
            # vLLM has copied the weight when it asks for the next one, unless it keeps some back; `lend` tries those again.
            self._become_view(name)
        for name, tied_to in _tied_parameters(self._model).items():
            # A checkpoint may hold a copy of a head that its config ties. vLLM then builds a head of its own, has it loaded, and
            # ties it again where both are equal (vllm/model_executor/model_loader/weight_tying.py).
            yield name, self._parameters[tied_to].data

    def _become_view(self, name: str) -> bool:
        """Use the engine's memory from now on; only if the same numbers are there already."""
        import torch

        parameter, view = self._parameters[name], self._places[name].view()
        # Autograd refuses to save an inference tensor for the backward pass. vLLM loads outside of inference mode
        # (`load_model` in vllm/v1/worker/gpu_worker.py), so this holds unless that changes.
        if view.shape != parameter.shape or view.dtype != parameter.dtype or view.is_inference():
            return False
        if not torch.equal(parameter.data.to(view.device), view):
            return False
        parameter.data = view
        return True

    def _is_view(self, name: str) -> bool:
        parameter, view = self._parameters[name], self._places[name].view()
        return parameter.data_ptr() == view.data_ptr() and parameter.dtype == view.dtype

    def check(self) -> None:
        """Make sure that the weights are still shared and still those of the reference.

        Raises:
            RuntimeError: If something has replaced them or merged an adapter into them.
        """
        moved = [name for name in self._parameters if not self._is_view(name)]
        if moved:
            raise RuntimeError(
                f"{len(moved)} base weights, such as `{moved[0]}`, are no longer shared with the engine: the model was moved or "
                "cast (.to, .half), or the engine's weights were reloaded. Leave both as they are, or set "
                "share_base_weights=off."
            )
        if any(getattr(module, "merged", False) for module in self._model.modules()):
            raise RuntimeError(
                "The adapter is merged into the base weights, which the engine shares, so it would be added twice and the "
                "reference is gone. Call unmerge_adapter() before sampling, or merge after training."
            )


def why_not_shareable(model: "torch.nn.Module") -> str | None:
    """Why a model's base weights cannot be shared; None when they can."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return "all weights are trained, and the engine's must stay the reference's while the policy moves"
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        return "they are quantised, and trainer and engine lay such weights out differently"
    types = {parameter.dtype for _, parameter in _base_parameters(model)}
    if len(types) > 1:
        return f"they are of several types ({', '.join(sorted(str(each) for each in types))})"
    return None


def _base_parameters(model: Any) -> "Iterator[tuple[str, torch.nn.Parameter]]":
    """Frozen parameters by their name in the base model, tied ones once."""
    for name, parameter in model.get_base_model().named_parameters():
        if not parameter.requires_grad:
            yield name.replace(".base_layer.", "."), parameter


def _tied_parameters(model: Any) -> dict[str, str]:
    """Other names of frozen parameters that have several, and the name under which they are shared."""
    shared = {id(parameter): name for name, parameter in _base_parameters(model)}
    tied = {}
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".")
        if not parameter.requires_grad and shared[id(parameter)] != plain:
            tied[plain] = shared[id(parameter)]
    return tied


def _find_places(parameters: "Mapping[str, torch.Tensor]", engine_model: Any) -> dict[str, _Place]:
    """Where each of the trainer's weights lies in the engine's model."""
    packed = getattr(engine_model, "packed_modules_mapping", {})
    modules = dict(engine_model.named_modules())
    places: dict[str, _Place] = {}
    for name, parameter in parameters.items():
        path, _, kind = name.rpartition(".")
        layer = find_layer(path, modules, packed)
        held = getattr(layer.module, kind, None)
        if held is None:
            raise SharingError(f"The engine has no weight for `{name}`. Set share_base_weights=off.")
        # An embedding that stands alone may be padded in the engine, so there the rows are counted on the trainer's side.
        sizes = list(layer.module.output_sizes) if layer.parts > 1 else [len(parameter)]
        start = sum(sizes[: layer.part])
        places[name] = _Place(held, start, start + sizes[layer.part])
    return places


WRITABLE, SHARED, INLINE = "astarpo_writable", "astarpo_shared", "astarpo_inline"
"""Names of the load formats (`load_format` of vLLM). All of them give the model the hooks of `inline`, where the engine has any."""
_LENT: list[SharedWeights] = []
"""The weights of the engine that starts just now: vLLM takes the names of loaders, not loaders."""


@contextmanager
def lending(weights: SharedWeights) -> Iterator[None]:
    """An engine that starts inside with `load_format=SHARED` takes these weights."""
    _LENT.append(weights)
    try:
        yield
    finally:
        _LENT.pop()


def register_loaders(after_loading: "Callable[[Any], None]") -> None:
    """Make the load formats known to vLLM.

    `register_model_loader` (vllm/model_executor/model_loader/__init__.py) is vLLM's public way to load weights that are not in
    a checkpoint. The loaders are vLLM's default loader with one method replaced.

    Args:
        after_loading (`Callable[[torch.nn.Module], None]`):
            Called with vLLM's model once it has its weights, before vLLM warms up and captures CUDA graphs (`load_model` comes before
            `compile_or_warm_up_model` in vllm/v1/worker/gpu_worker.py).
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import current_platform

    class InlineLoader(DefaultModelLoader):
        def __init__(self, load_config: Any):
            # The default loader knows the file formats by name, and ours are not among them.
            load_config.load_format = "auto"
            super().__init__(load_config)

        def load_weights(self, model: "torch.nn.Module", model_config: Any) -> None:
            self.fill(model, model_config)
            after_loading(model)

        def fill(self, model: "torch.nn.Module", model_config: Any) -> None:
            super().load_weights(model, model_config)

    class WritableLoader(InlineLoader):
        def load_weights(self, model: "torch.nn.Module", model_config: Any) -> None:
            super().load_weights(model, model_config)
            if current_platform.is_cpu():
                for module in model.modules():
                    if isinstance(module, LinearBase):
                        _keep_weight(module)

    class SharedLoader(WritableLoader):
        def download_model(self, model_config: Any) -> None:
            """Download nothing: the weights are in this process."""

        def fill(self, model: "torch.nn.Module", model_config: Any) -> None:
            # The default loader's own check that every parameter was filled.
            self.track_weights_loading(model, _LENT[-1].lend(model))

    register_model_loader(INLINE)(InlineLoader)
    register_model_loader(WRITABLE)(WritableLoader)
    register_model_loader(SHARED)(SharedLoader)


def _keep_weight(layer: Any) -> None:
    """Make a linear layer compute with its weight as it was loaded.

    After loading, vLLM on a CPU packs the weight of every linear layer for oneDNN and then replaces it by an empty tensor
    (`dispatch_cpu_unquantized_gemm` in vllm/model_executor/layers/utils.py), so there would be nothing to write into or to share. Here the
    layer's own method for that is replaced. It costs speed. On a GPU vLLM leaves weights as they are loaded.
    """
    import torch
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    if type(layer.quant_method) is not UnquantizedLinearMethod:
        return
    method = copy.copy(layer.quant_method)

    def process_weights_after_loading(layer: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    method.process_weights_after_loading = process_weights_after_loading
    layer.quant_method = method


def unpack_embeddings(model: "torch.nn.Module") -> None:
    """Make embedding layers compute with their weight; on a CPU vLLM would use a packed copy that goes stale.

    `UnquantizedEmbeddingMethod` (vllm/model_executor/layers/vocab_parallel_embedding.py) packs a copy for the LM head, keeps the
    weight beside it, and knows no flag against it. So what it packed is replaced after the engine has started.
    """
    import torch
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    embeddings: list[Any] = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    for layer in embeddings:
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = torch.nn.functional.linear
