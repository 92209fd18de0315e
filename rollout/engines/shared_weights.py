"""One copy of the base weights for trainer and engine.

The engine fuses layers (q, k and v in one tensor), so the memory is the engine's: while it starts it is filled from the
trainer's model, parameter by parameter, and each parameter becomes a view of its place there as soon as it was copied.
Nothing is held twice, not even while starting, and nothing has to be brought to the engine later but the adapter.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class SharingError(ValueError):
    """The weights cannot be shared; the message says why."""


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
            SharingError: If a weight has no place in the engine, or came there changed, or one of the engine's came from nowhere.
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
        for name, parameter in self._parameters.items():
            yield name, parameter.data
            self._become_view(name)  # what vLLM has not taken yet is tried again in the end
        for name, tied_to in _tied_parameters(self._model).items():
            # A checkpoint may hold a head that its config ties: vLLM loads it, finds it equal, and ties it then.
            yield name, self._parameters[tied_to].data

    def _become_view(self, name: str) -> bool:
        """Use the engine's memory from now on; only if the same numbers are there already."""
        import torch

        parameter, view = self._parameters[name], self._places[name].view()
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
    packed: dict[str, list[str]] = dict(getattr(engine_model, "packed_modules_mapping", {}))
    fused = {part: (name, parts) for name, parts in packed.items() if len(parts) > 1 for part in parts}
    modules = dict(engine_model.named_modules())
    places: dict[str, _Place] = {}
    for name, parameter in parameters.items():
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        target, siblings = fused.get(leaf, (leaf, [leaf]))
        module = modules.get(f"{parent}.{target}".lstrip("."))
        held = getattr(module, kind, None)
        if held is None:
            raise SharingError(f"The engine has no weight for `{name}`. Set share_base_weights=off.")
        sizes = list(module.output_sizes) if len(siblings) > 1 else [len(parameter)]  # an embedding may be padded
        start = sum(sizes[: siblings.index(leaf)])
        places[name] = _Place(held, start, start + sizes[siblings.index(leaf)])
    return places
