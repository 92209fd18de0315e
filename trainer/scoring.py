"""Log-probs of a batch of completions without computing padding, or what all prompts begin with more than once.

Rows are moved to the left edge, where a causal model needs no attention mask, and rows of like length are scored together,
cut to the longest of them.

Suffixes name the dimensions: B completions, L columns of prompt and completion, T columns of completion, N scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

CALL_COST = {"cpu": 64, "cuda": 192}
"""What one more pass through the model costs, in tokens: launching its kernels and reading its weights once more."""


def length_groups(lengths: Sequence[int], call_cost: int, max_rows: int) -> list[list[int]]:
    """Divide rows into groups so that Σ (rows × longest row + `call_cost`) over the groups is least.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each row.
        call_cost (`int`):
            Cost of a group besides its tokens, in tokens.
        max_rows (`int`):
            Most rows of a group.

    Returns:
        `list[list[int]]`: Row numbers, each in exactly one group, shorter rows first.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    # least[i]: cost of the i shortest rows and where their last group starts. Groups of neighbours are always enough.
    least = [(0, 0)]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        starts = range(max(0, end - max_rows), end)
        least.append(min((least[start][0] + (end - start) * longest + call_cost, start) for start in starts))
    groups, end = [], len(order)
    while end > 0:
        start = least[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def score_completions(
    model: Callable[..., Any],
    input_ids_BL: torch.Tensor,
    attention_mask_BL: torch.Tensor,
    completion_columns: int,
    groups: Sequence[Sequence[int]],
    min_saved: int | None = None,
    compute_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs of completion tokens and the entropies of the distributions they were drawn from, both in nats.

    Args:
        model (`Callable`):
            Called with `input_ids` and `labels`; returns `log_probs` and `entropy` of each next label (TRL's fused LM head).
        input_ids_BL (`torch.Tensor`):
            Prompts padded left, completions padded right, shape (B, L).
        attention_mask_BL (`torch.Tensor`):
            1 on tokens, 0 on padding, shape (B, L).
        completion_columns (`int`):
            T, the last columns of L, which are scored.
        groups (`Sequence[Sequence[int]]`):
            Rows to score together, from [`length_groups`].
        min_saved (`int`, *optional*):
            Compute what all prompts begin with only once where this saves at least so many tokens; gradients flow through
            it as they would through each row's own. Never, when not given.
        compute_entropy (`bool`, *optional*, defaults to `False`):
            Whether to return entropies; TRL's head on a reference model has none.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Two tensors of shape (B, T), 0 on padding.
    """
    rows = _LeftAligned(input_ids_BL, attention_mask_BL, completion_columns)
    prefix = rows.shared_prefix()
    is_worth_it = min_saved is not None and prefix * (len(input_ids_BL) - 1) >= max(1, min_saved)
    states = _key_values(model, rows.ids_BL[:1, :prefix]) if is_worth_it else []
    prefix = prefix if is_worth_it else 0
    places, logps, entropies = [], [], []
    for group in groups:
        index = torch.tensor(group, device=input_ids_BL.device)
        columns = slice(prefix, int(rows.lengths_B[index].max()))
        ids, labels = rows.ids_BL[index, columns], rows.labels_BL[index, columns]
        past = {"past_key_values": _cache(states, len(group))} if states else {}
        output = model(input_ids=ids, labels=labels, fused_lm_head=True, **past)
        is_scored = labels[:, 1:] != -100
        places.append(rows.places_BL[index, columns][:, 1:][is_scored])
        logps.append(output.log_probs[is_scored])
        if compute_entropy:
            entropies.append(output.entropy[is_scored])
    place_N, shape_BT = torch.cat(places), (len(input_ids_BL), completion_columns)
    spread_entropies = _spread(torch.cat(entropies), place_N, shape_BT) if compute_entropy else None
    return _spread(torch.cat(logps), place_N, shape_BT), spread_entropies


class _LeftAligned:
    """A batch with every row moved to the left edge: its tokens, what of them is scored, and where scores belong."""

    def __init__(self, input_ids_BL: torch.Tensor, attention_mask_BL: torch.Tensor, completion_columns: int):
        count, columns = input_ids_BL.shape
        first = columns - completion_columns
        self.prompts_B = attention_mask_BL[:, :first].sum(1)
        self.lengths_B = attention_mask_BL.sum(1)
        position_L = torch.arange(columns, device=input_ids_BL.device)
        source_BL = position_L + (first - self.prompts_B)[:, None]
        self.ids_BL = input_ids_BL.gather(1, source_BL.clamp(max=columns - 1))
        is_scored = (position_L >= self.prompts_B[:, None]) & (position_L < self.lengths_B[:, None])
        self.labels_BL = self.ids_BL.masked_fill(~is_scored, -100)
        row_B = torch.arange(count, device=input_ids_BL.device)
        self.places_BL = row_B[:, None] * completion_columns + source_BL - first

    def shared_prefix(self) -> int:
        """How many tokens all prompts begin with; the last prompt token, which predicts a completion's first, is none."""
        same_L = (self.ids_BL == self.ids_BL[0]).all(0)[: int(self.prompts_B.min()) - 1]
        return int(same_L.cumprod(0).sum())


def can_share(config: Any) -> bool:
    """Whether all that a model remembers of a prefix is plain keys and values: no sliding windows, no recurrent states."""
    try:
        layers = DynamicCache(config=config.get_text_config()).layers
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    is_recurrent = getattr(config.get_text_config(), "num_attention_heads", None) is None
    return bool(layers) and not is_recurrent and all(type(layer) is DynamicLayer for layer in layers)


def _key_values(model: Callable[..., Any], ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer."""
    layers = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values.layers
    return [(layer.keys, layer.values) for layer in layers]


def _cache(states: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


def _spread(values_N: torch.Tensor, place_N: torch.Tensor, shape_BT: tuple[int, int]) -> torch.Tensor:
    return values_N.new_zeros(shape_BT[0] * shape_BT[1]).index_put((place_N,), values_N).view(shape_BT)
