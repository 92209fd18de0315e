"""The probe: is the engine sampling the present policy, or an older one?

A wrong policy samples without any error: the loss stays finite and training just goes astray. So once per update the
log-probs that the engine reported are compared with the trainer's own under the present and under the previous
policy, on the same tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.func import functional_call

STALE_SCORE = 0.1
"""A score above this, beyond its error, is an engine that is (partly) behind; exact engines scatter around 0."""
MAX_GAP = 0.3
"""Mean |Δ log-prob| per token, in nats, above which engine and trainer cannot be the same model."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """Where the engine's log-probs lie between the present policy (score 0) and the previous one (score 1).

    Attributes:
        score (`float`):
            Projection of (engine − present) on (previous − present), over all probed tokens.
        error (`float`):
            Standard error of `score`, from the part of (engine − present) that the projection leaves.
        gap (`float`):
            Mean |engine − present| per token, in nats.
    """

    score: float
    error: float
    gap: float

    def is_stale(self, sigmas: float) -> bool:
        """Whether the engine is behind, at `sigmas` standard errors."""
        return self.score - sigmas * self.error > STALE_SCORE

    @property
    def is_unclear(self) -> bool:
        """Whether the engine looks closer to the previous policy."""
        return self.score > 0.5


def staleness(sampled: torch.Tensor, present: torch.Tensor, previous: torch.Tensor) -> Staleness:
    """Compare the engine's log-probs with those of two policies.

    Args:
        sampled (`torch.Tensor`):
            The engine's log-probs of the sampled tokens, shape (K,).
        present (`torch.Tensor`):
            The trainer's under the present policy, shape (K,).
        previous (`torch.Tensor`):
            The trainer's under the previous policy, shape (K,).
    """
    step, distance = (previous - present).double(), (sampled - present).double()
    gap = distance.abs().mean().item()
    power = step.square().sum().item()
    if power < 1e-12 * max(1, step.numel()):  # the policy did not move: nothing to be behind of
        return Staleness(0.0, math.inf, gap)
    score = (distance * step).sum().item() / power
    rest = (distance - score * step).square().sum().item() / max(1, step.numel() - 1)
    return Staleness(score, math.sqrt(rest / power), gap)


class PolicyProbe:
    """Keeps the previous policy's trainable parameters and checks the engine against them.

    Args:
        model (`torch.nn.Module`):
            The policy, without wrappers.
        rows (`int`):
            Completions to look at first; all of them are when those leave it unclear.
    """

    def __init__(self, model: torch.nn.Module, rows: int):
        self._model = model
        self._rows = rows
        self._previous: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def check(
        self,
        score_rows: Callable[[Callable[..., object], slice], torch.Tensor],
        sampled: torch.Tensor,
        mask: torch.Tensor,
    ) -> Staleness | None:
        """Check the engine and remember the present policy for the next time.

        Args:
            score_rows (`Callable`):
                Given a model-like callable and a slice of rows, returns per-token log-probs of shape (rows, T).
            sampled (`torch.Tensor`):
                The engine's log-probs, shape (B, T).
            mask (`torch.Tensor`):
                1 on sampled tokens, shape (B, T).

        Returns:
            [`Staleness`] or `None`: The finding; `None` the first time, when there is no previous policy.

        Raises:
            RuntimeError: If the engine is behind, or samples another model altogether.
        """
        previous, self._previous = self._previous, self._snapshot()
        finding = self._compare(score_rows, sampled, mask, slice(0, self._rows), previous)
        stale = finding.is_stale(sigmas=4)
        if not stale and finding.is_unclear:
            finding = self._compare(score_rows, sampled, mask, slice(0, len(sampled)), previous)
            stale = finding.is_stale(sigmas=3)
        if stale:
            raise RuntimeError(
                f"The engine samples an old policy: on the tokens it just sampled its log-probs lie {finding.score:.0%} "
                f"(± {finding.error:.0%}) of the way from the present policy to the previous one. Either the policy did "
                "not reach the engine or its prefix cache outlived an update. Training stops because such samples teach "
                "the wrong thing; resume from the last checkpoint with another --policy_link, and please report this."
            )
        if finding.gap > MAX_GAP:
            raise RuntimeError(
                f"Engine and trainer disagree by {finding.gap:.2f} nats a token on average, so they do not hold the same "
                "model. Check that both load the same weights, revision and dtype, and use the same temperature."
            )
        return finding if previous is not None else None

    def _compare(
        self,
        score_rows: Callable[[Callable[..., object], slice], torch.Tensor],
        sampled: torch.Tensor,
        mask: torch.Tensor,
        rows: slice,
        previous: dict[str, torch.Tensor] | None,
    ) -> Staleness:
        kept = mask[rows].bool()
        present_logps = score_rows(self._model, rows)
        previous_logps = present_logps if previous is None else score_rows(self._with(previous), rows)
        return staleness(sampled[rows][kept], present_logps[kept], previous_logps[kept])

    def _with(self, parameters: dict[str, torch.Tensor]) -> Callable[..., object]:
        """The model computing with other parameters, without touching its own."""

        def call(**kwargs: object) -> object:
            device = next(self._model.parameters()).device
            moved = {name: tensor.to(device) for name, tensor in parameters.items()}
            return functional_call(self._model, moved, (), kwargs)

        return call

    def _snapshot(self) -> dict[str, torch.Tensor]:
        # On the CPU: in full fine-tuning a second copy on the GPU would be what does not fit.
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }
