"""Attention for cards below compute capability 8.0, on which PyTorch's fused kernels refuse grouped key and value heads."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

REPEATED = "astarpo_sdpa"
"""Name under which transformers knows it (`attn_implementation`)."""
FLASH = (8, 0)
"""First compute capability with the flash kernel, which takes grouped heads."""


def repeated_sdpa(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """PyTorch's attention with each key and value head repeated for the query heads that share it.

    transformers passes `enable_gqa=True` where a batch has no mask (transformers/integrations/sdpa_attention.py). The memory-efficient
    kernel refuses that and the flash kernel needs compute capability 8.0, so a T4 falls to the math kernel, which holds all scores
    in float32: 0.9 GB more for a row of 768 tokens of a 1.5B model.

    Args:
        module (`torch.nn.Module`):
            The attention layer.
        query (`torch.Tensor`):
            Of shape (B, heads, T, D).
        key (`torch.Tensor`):
            Of shape (B, key heads, T, D), as `value`.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    plain = SimpleNamespace(is_causal=getattr(module, "is_causal", True))  # without groups: they are repeated already
    return sdpa_attention_forward(plain, query, repeat_kv(key, groups), repeat_kv(value, groups), *args, **kwargs)  # pyright: ignore


def suit_attention(model: Any, asked: str | None) -> None:
    """Let a model use it, where the GPU needs it and nobody has chosen another attention.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, as loaded.
        asked (`str`, *optional*):
            `attn_implementation` that a user gave.
    """
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability() < FLASH
    if is_old and asked is None and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(REPEATED, repeated_sdpa)
        AttentionMaskInterface.register(REPEATED, sdpa_mask)
        model.set_attn_implementation(REPEATED)
