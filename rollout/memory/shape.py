"""What of a model decides its memory, read from its config alone: no weights are loaded."""

from dataclasses import dataclass
from typing import Any


class Unplannable(ValueError):
    """A model whose memory the formulas do not describe; the message says why."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A kind of linear layer: its name in a block, its sizes, and how many blocks have it."""

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model.

    Attributes:
        parameters (`int`):
            Number of weights; tied embeddings count once.
        layers (`int`):
            Number of blocks.
        hidden (`int`):
            Width of the residual stream.
        intermediate (`int`):
            Width of the MLP.
        queries (`int`):
            Width of all query heads together.
        keys (`int`):
            Width of all key heads together, and of all value heads.
        vocabulary (`int`):
            Number of words.
        linears (`tuple[Linear, ...]`):
            The linear layers of the blocks, without the head.
        stored_width (`int`):
            Bytes of a weight as it is stored: 4 or 2.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    linears: tuple[Linear, ...]
    stored_width: int = 2

    @classmethod
    def of(cls, model: str, revision: str | None = None) -> "ModelShape":
        """The shape of a model on the hub or in a folder, of which only `config.json` is read.

        Args:
            model (`str`):
                Hub id or folder.
            revision (`str`, *optional*):
                Branch, tag or commit on the hub.

        Raises:
            ValueError: If there is no config.
            Unplannable: If it is not that of a causal language model with plain attention and unquantised weights.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The config of `{model}` could not be read: {error}. Name a hub id, or a folder with a config.json."
            ) from error
        return cls.of_config(config, model)

    @classmethod
    def of_config(cls, config: Any, name: str) -> "ModelShape":
        """The shape of the model that a config describes; `name` is for messages."""
        import torch
        from transformers import AutoModelForCausalLM

        text = config.get_text_config()
        if getattr(config, "quantization_config", None) is not None:
            raise Unplannable(f"the weights of `{name}` are quantised, which the formulas do not know.")
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            heads = text.num_attention_heads
            head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
            keys = (getattr(text, "num_key_value_heads", None) or heads) * head_size
            sizes = (text.num_hidden_layers, text.hidden_size, text.intermediate_size, heads * head_size, keys)
        except (AttributeError, ValueError) as error:
            raise Unplannable(
                f"`{name}` cannot be planned: its architecture ({config.model_type}) is not a causal language model of "
                f"attention and MLP blocks ({error}). Choose such a model."
            ) from error
        head = model.get_output_embeddings()
        kinds: dict[tuple[str, int, int], int] = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                kind = path.rpartition(".")[2], module.in_features, module.out_features
                kinds[kind] = kinds.get(kind, 0) + 1
        return cls(
            sum(parameter.numel() for parameter in model.parameters()),
            *sizes,
            vocabulary=text.vocab_size,
            linears=tuple(Linear(*kind, count) for kind, count in kinds.items()),
            stored_width=4 if str(text.dtype).endswith("float32") else 2,
        )

    def width(self, dtype: str | None) -> int:
        """Bytes of a weight loaded as `dtype`: `float32`, a 16-bit type, or `auto` for as stored."""
        return self.stored_width if dtype in (None, "auto") else 4 if dtype == "float32" else 2
