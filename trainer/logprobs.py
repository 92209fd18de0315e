"""Log-probs of a batch of completions: without computing padding, or what all prompts begin with more than once, or the
logits of a whole batch.

Rows are moved to the left edge, where a causal model needs no attention mask, and rows of like length are scored together,
truncated to the longest of them. Logits are made a tile at a time, for completion tokens only, and again in the backward pass.

Suffixes name the dimensions: B completions, L columns of prompt and completion, T columns of completion, N scored tokens,
D hidden, V vocabulary.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import ModelOutput

TILE = {"cpu": 64, "cuda": 256}
"""Tokens of a tile of logits. On a CPU 64 x 49k words in float32 are 12 MB, which the last-level cache can hold; on a GPU 256 x
152k words are 156 MB."""
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
    """Log-probs of completion tokens and the entropies of the distributions they were sampled from, both in nats.

    Args:
        model (`Callable`):
            The policy or the reference, after [`use_scoring_head`]: called with `input_ids` and `labels`, it returns `log_probs`
            and `entropy` of each next label.
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
            Whether to return entropies.

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
        output = model(input_ids=ids, labels=labels, score_labels=True, **past)
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


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores batches under the policy or the reference, in passes of a limited number of rows.

    Attributes:
        call_cost (`int`):
            What one more pass through the model costs, in tokens.
        passes_alike (`bool`):
            Whether all processes must make the same passes because each pass communicates (FSDP, DeepSpeed). Then rows are
            not regrouped and prefixes are not shared.
        shares_prefix (`bool`):
            Whether the model's architecture allows it, from [`can_share`].
        autocast (`Callable`):
            accelerate's mixed precision.
    """

    call_cost: int
    passes_alike: bool
    shares_prefix: bool
    autocast: Callable[..., Any]

    def __call__(
        self, model: Any, batch: dict[str, Any], max_rows: int, compute_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the completion tokens of a batch, and entropies where asked for; two tensors of shape (B, T).

        Args:
            model (`torch.nn.Module`):
                The model as wrapped by accelerate.
            batch (`dict[str, Any]`):
                `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`.
            max_rows (`int`):
                Most rows of a pass.
            compute_entropy (`bool`, *optional*, defaults to `False`):
                Whether to return entropies.
        """
        ids_BL = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask_BL = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        lengths = mask_BL.sum(1).tolist()
        if self.passes_alike:
            groups = [
                list(range(start, min(start + max_rows, len(lengths)))) for start in range(0, len(lengths), max_rows)
            ]
        else:
            groups = length_groups(lengths, self.call_cost, max_rows)
        # Blocks that are recomputed in the backward pass keep no keys and values to share.
        recomputes = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        min_saved = None
        if self.shares_prefix and not self.passes_alike and not recomputes:
            min_saved = max(2 * self.call_cost, sum(lengths) // 10)  # a tenth of the tokens, and what the pass costs
        with self.autocast():
            return score_completions(
                model, ids_BL, mask_BL, batch["completion_ids"].size(1), groups, min_saved, compute_entropy
            )


class TokenLogProbs(torch.autograd.Function):
    """ln softmax(h Wᵀ / temperature)[label] and the entropy of that distribution; the logits are made again backwards.

    Shapes: N tokens, D hidden, V words.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies in nats, both of shape (N,)."""
        logps, entropies, normalisers = [], [], []
        tile = TILE.get(hidden_ND.device.type, TILE["cuda"])
        for hidden, labels in zip(hidden_ND.split(tile), labels_N.split(tile), strict=True):
            of_tile = _score_tile(hidden, weight_VD, bias_V, labels, temperature)
            for found, values in zip((logps, entropies, normalisers), of_tile, strict=True):
                found.append(values)
        entropies_N = _cat(entropies, hidden_ND)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, _cat(normalisers, hidden_ND), entropies_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # so that an entropy that the loss has no use for costs nothing
        return _cat(logps, hidden_ND), entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the hidden states, and of weight and bias where they are trained."""
        hidden_ND, weight_VD, bias_V, labels_N, normaliser_N, entropies_N = ctx.saved_tensors
        of_logps_N, of_entropies_N = grads
        if of_logps_N is None:
            of_logps_N = torch.zeros_like(normaliser_N)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        tile = TILE.get(hidden_ND.device.type, TILE["cuda"])
        for start in range(0, len(labels_N), tile):
            rows = slice(start, start + tile)
            of_entropies = None if of_entropies_N is None else (of_entropies_N[rows], entropies_N[rows])
            logits = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.temperature)
            grad = _tile_gradient(
                logits, normaliser_N[rows], labels_N[rows], of_logps_N[rows], of_entropies, ctx.temperature
            ).to(weight_VD.dtype)
            del logits  # in float32: it must not be there when the next tile is made
            grad_hidden[rows] = (grad @ weight_VD).to(hidden_ND.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden_ND[rows].to(grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _score_tile(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and normalisers of a tile. A function of its own, so that no tile is there when the next one is made."""
    logits = _logits(hidden, weight, bias, temperature)
    normaliser = logits.logsumexp(-1)
    all_logps = logits.sub_(normaliser[:, None])
    logps = all_logps.gather(-1, labels[:, None])[:, 0]
    return logps, -all_logps.exp().mul_(all_logps).sum(-1), normaliser


def _tile_gradient(
    logits: torch.Tensor,
    normaliser: torch.Tensor,
    labels: torch.Tensor,
    of_logps: torch.Tensor,
    of_entropies: tuple[torch.Tensor, torch.Tensor] | None,
    temperature: float,
) -> torch.Tensor:
    """Gradient of a tile's logits, in their place where entropies have no gradient; `of_entropies` is that and the entropies."""
    scale = _exact(of_logps[:, None]) / temperature
    all_logps = logits.sub_(normaliser[:, None])
    if of_entropies is None:
        grad = all_logps.exp_().mul_(-scale)
    else:  # dH/dlogit = -p (ln p + H)
        factor = _exact(of_entropies[0][:, None]) / temperature
        grad = all_logps.exp() * (-scale - factor * (all_logps + of_entropies[1][:, None]))
    return grad.scatter_add_(-1, labels[:, None], scale)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _exact(torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where the model computes in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _cat(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else like.new_zeros(0, dtype=torch.float32)


@contextmanager
def reference_of(policy: Any, reference: Any) -> Iterator[Any]:
    """The model that gives the reference's log-probs inside: the frozen copy, or the policy with its adapter off.

    Args:
        policy (`torch.nn.Module`):
            The policy as wrapped by accelerate.
        reference (`torch.nn.Module`, *optional*):
            From [`load_reference`], as wrapped by accelerate.
    """
    if reference is not None:
        yield reference
        return
    adapted: Any = policy
    while not isinstance(adapted, PeftModel):  # DDP, FSDP and DeepSpeed keep what they wrap in `module`
        adapted = adapted.module
    with adapted.disable_adapter():
        yield policy


def use_scoring_head(model: Any, temperature: float, in_float32: bool = False) -> None:
    """Make `model(..., labels=labels, score_labels=True)` return log-probs at labelled positions only.

    The model's own `forward` is replaced, and not wrapped in another module, because DDP, FSDP and DeepSpeed gather parameters
    around `forward`, and PEFT passes keyword arguments through to it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, without PEFT around it.
        temperature (`float`):
            What the logits are divided by: the sampling temperature.
        in_float32 (`bool`, *optional*, defaults to `False`):
            Whether to compute the logits in float32.

    Raises:
        ValueError: If that is asked for and the head's weights are the embedding's, which stay as they are.
    """
    if in_float32:
        if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
            raise ValueError(
                "cast_lm_head_to_fp32 needs a language-model head of its own, and this model's is its embedding. Remove it."
            )
        head = model.get_output_embeddings().float()
        # Hidden states arrive in the type of the other weights; `generate` and logits that are not plain call the head itself.
        head.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    other_forward: Any = model.forward
    is_plain = has_plain_logits(model.config)

    def forward(self: Any, *args: Any, score_labels: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not score_labels:
            return other_forward(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        labels_BT = labels[:, 1:]
        mask_BT = labels_BT != -100
        if is_plain:
            hidden_BTD = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
            head = self.get_output_embeddings()
            weight, bias = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in (head.weight, head.bias))
            scores = TokenLogProbs.apply(hidden_BTD[mask_BT], weight, bias, labels_BT[mask_BT], temperature)
        else:  # softcapping or scaling of logits is the model's own business
            logits_NV = other_forward(*args, use_cache=False, **kwargs).logits[:, :-1][mask_BT].float() / temperature
            logps_NV = logits_NV.log_softmax(-1)
            scores = (
                logps_NV.gather(-1, labels_BT[mask_BT][:, None])[:, 0],
                -(logps_NV.exp() * logps_NV).sum(-1),
            )
        log_probs, entropy = (score.new_zeros(mask_BT.shape).masked_scatter(mask_BT, score) for score in scores)  # pyright: ignore
        return ModelOutput(log_probs=log_probs, entropy=entropy)

    # `generate` reads the names of the model's arguments from here.
    model.forward = types.MethodType(forward, model)


def has_plain_logits(config: Any) -> bool:
    """Whether logits are just h Wᵀ: no softcapping, no scaling, no router loss."""
    text_config = config.get_text_config()
    special = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return all(getattr(text_config, name, None) is None for name in special) and not getattr(
        text_config, "output_router_logits", False
    )
