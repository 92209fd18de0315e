"""Log-probs of completion tokens on a CPU, without ever holding the logits of a batch.

On GPUs TRL's fused LM head does this with Triton kernels. Its CPU fallback scores prompts and padding as well, in
float32: on the quickstart's batches (32 × 80 tokens, 49k words) more than half of an update went there.
"""

import types
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput

ROWS = 64
"""Tokens per tile: 64 × 49k logits in float32 are 12 MB, which the last-level cache can hold."""


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
        for hidden, labels in zip(hidden_ND.split(ROWS), labels_N.split(ROWS), strict=True):
            logits = _logits(hidden, weight_VD, bias_V, temperature)
            normaliser = logits.logsumexp(-1)
            all_logps = logits.sub_(normaliser[:, None])
            logps.append(all_logps.gather(-1, labels[:, None])[:, 0])
            entropies.append(-torch.linalg.vecdot(all_logps.exp(), all_logps))
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, _cat(normalisers, hidden_ND))
        ctx.temperature = temperature
        entropies_N = _cat(entropies, hidden_ND)
        ctx.mark_non_differentiable(entropies_N)
        return _cat(logps, hidden_ND), entropies_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the hidden states, and of weight and bias where they are trained."""
        hidden_ND, weight_VD, bias_V, labels_N, normaliser_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(labels_N), ROWS):
            rows = slice(start, start + ROWS)
            scale = grads[0][rows, None].float() / ctx.temperature
            logits = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.temperature)
            grad = logits.sub_(normaliser_N[rows, None]).exp_().mul_(-scale)
            grad.scatter_add_(-1, labels_N[rows, None], scale)
            grad = grad.to(weight_VD.dtype)
            grad_hidden[rows] = (grad @ weight_VD).to(hidden_ND.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden_ND[rows].to(grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _cat(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else like.new_zeros(0, dtype=torch.float32)


def use_cpu_head(model: torch.nn.Module, temperature: float) -> None:
    """Make `model(..., labels=labels, fused_lm_head=True)` score with [`TokenLogProbs`], at labelled positions only.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model that TRL's `add_fused_lm_head` has been applied to, without PEFT around it.
        temperature (`float`):
            What the logits are divided by: the sampling temperature.
    """
    other_forward: Any = model.forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return other_forward(*args, labels=labels, **kwargs)
        hidden_BTD = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        labels_BT = labels[:, 1:]
        mask_BT = labels_BT != -100
        head = self.get_output_embeddings()
        weight, bias = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in (head.weight, head.bias))
        scores = TokenLogProbs.apply(hidden_BTD[mask_BT], weight, bias, labels_BT[mask_BT], temperature)
        log_probs, entropy = (score.new_zeros(mask_BT.shape).masked_scatter(mask_BT, score) for score in scores)  # pyright: ignore
        return ModelOutput(log_probs=log_probs, entropy=entropy)

    # TRL reads the signature of `generate`'s keyword arguments from here.
    model.forward = types.MethodType(forward, model)


def has_plain_logits(config: Any) -> bool:
    """Whether logits are just h Wᵀ: no softcapping, no scaling, no router loss."""
    text_config = config.get_text_config()
    special = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return all(getattr(text_config, name, None) is None for name in special) and not getattr(
        text_config, "output_router_logits", False
    )
