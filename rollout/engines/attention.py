"""Attention of a decoding step with grouped heads, without a copy of the cache."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FOLDED = "astarpo_folded"
"""Name under which transformers knows it (`attn_implementation`)."""


def folded_sdpa(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """Attention of one new token a row, the query heads that share a key head taken as rows of one query.

    Where a batch has a mask, transformers repeats keys and values for each query head (transformers/integrations/sdpa_attention.py): a copy of
    the whole cache in every layer of every step. Passes of several tokens are left to transformers.

    Args:
        module (`torch.nn.Module`):
            The attention layer.
        query (`torch.Tensor`):
            Of shape (B, heads, T, D).
        key (`torch.Tensor`):
            Of shape (B, key heads, C, D), as `value`.
        attention_mask (`torch.Tensor`, *optional*):
            True where a row looks, of shape (B, 1, T, C).
        scaling (`float`, *optional*):
            What the scores are multiplied by; 1/√D when not given.

    Returns:
        `tuple`: The output, of shape (B, T, heads, D), and None.
    """
    rows, heads, tokens, size = query.shape
    if tokens != 1 or kwargs.get("s_aux") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    folded = query.reshape(rows, key.shape[1], heads // key.shape[1], size)
    output = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, size), None


AttentionInterface.register(FOLDED, folded_sdpa)
AttentionMaskInterface.register(FOLDED, sdpa_mask)
