"""The probe: is the engine sampling the present policy, or an older one?

A wrong policy samples without any error: the loss stays finite and training just goes astray. So in every update the
log-probs that the engine reported are compared, on the tokens it just sampled, with those of the passes that train. Where they
lie further apart than they used to, they are compared with an earlier policy's (the anchor): an engine that was left behind is
near that one. Half-precision engines scatter around the trainer by more than one update may move the policy; then the anchor
is kept, and the drift of the next updates decides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.func import functional_call

Score = Callable[[torch.nn.Module, dict[str, Any]], torch.Tensor]
"""Given a model and a batch, returns per-token log-probs of shape (B, T)."""
LEAST_FLOOR = 1e-10

MAX_GAP = 0.3
"""Mean |Δ log-prob| per token, in nats, above which engine and trainer cannot be the same model."""
HEAVIEST = 2
"""Percent of the tokens (and one more) without which a finding against the engine must stand, too."""
PARTLY = 0.1
"""Share of the way to the anchor from which an engine is partly behind, such as by a prefix cache kept too long."""


class EngineState(StrEnum):
    """What a comparison says about the engine."""

    PRESENT = "present"
    """It holds the present policy."""
    STALE = "stale"
    """It holds the anchor, or something between."""
    UNDECIDED = "undecided"
    """The policy moved less than engine and trainer scatter."""


@dataclass(frozen=True, slots=True)
class Staleness:
    """Where the engine's log-probs lie, on K sampled tokens.

    Attributes:
        to_present (`float`):
            Mean square of (engine − present policy), in nats².
        to_anchor (`float`):
            Mean square of (engine − anchor).
        score (`float`):
            Projection of (engine − present) on (anchor − present): 0 is the present policy, 1 the anchor.
        error (`float`):
            Standard error of `score`.
        rest (`tuple[float, float]`):
            Both without the heaviest tokens. Of a policy that is certain of nearly every token, the one it is not decides the score, and
            engine and trainer may round just that one apart.
        gap (`float`):
            Mean |engine − present| per token.
    """

    to_present: float
    to_anchor: float
    score: float
    error: float
    rest: tuple[float, float]
    gap: float

    def judge(self, floor: float, sigmas: float = 3.0) -> EngineState:
        """Judge the engine.

        Half of the other distance is asked for, not less: rounding that only one of the two policies suffers makes
        the distances differ by up to that much when the policy hardly moved.

        Args:
            floor (`float`):
                `to_present` of an engine that is known to hold the present policy.
            sigmas (`float`, *optional*, defaults to `3.0`):
                Standard errors by which `score` must exceed what counts as partly behind.
        """
        is_sure = all(score - sigmas * error > PARTLY for score, error in ((self.score, self.error), self.rest))
        if is_sure and (self.to_present > 9 * floor or self.to_anchor < 0.5 * self.to_present):
            return EngineState.STALE
        return EngineState.PRESENT if self.to_present < 0.5 * self.to_anchor else EngineState.UNDECIDED


def staleness(sampled_K: torch.Tensor, present_K: torch.Tensor, anchor_K: torch.Tensor) -> Staleness:
    """Compare the engine's log-probs of K sampled tokens with those of the present policy and of the anchor."""
    step_K, distance_K = (anchor_K - present_K).double(), (sampled_K - present_K).double()
    heaviest = 1 + len(step_K) * HEAVIEST // 100
    rest_K = step_K.abs().argsort(descending=True)[heaviest:]
    score, error = _projection(distance_K, step_K)
    return Staleness(
        to_present=distance_K.square().mean().item(),
        to_anchor=(sampled_K - anchor_K).double().square().mean().item(),
        score=score,
        error=error,
        rest=_projection(distance_K[rest_K], step_K[rest_K]),
        gap=distance_K.abs().mean().item(),
    )


def _projection(distance_K: torch.Tensor, step_K: torch.Tensor) -> tuple[float, float]:
    """The projection of one on the other in units of the latter, and its standard error."""
    power = step_K.square().sum().item()
    if power == 0:
        return 0.0, math.inf
    score = (distance_K * step_K).sum().item() / power
    rest = (distance_K - score * step_K).square().sum().item() / max(1, len(step_K) - 1)
    return score, math.sqrt(rest / power)


class PolicyProbe:
    """Keeps an earlier policy's trainable parameters and checks the engine against them.

    Every update gives the distance between engine and present policy for nothing, from the passes that train. The anchor is
    scored only where that distance is more than twice what it is known to be on the present policy.

    Args:
        model (`torch.nn.Module`):
            The policy, without wrappers.
        rows (`int`):
            Completions to score under the anchor; a finding against the engine is confirmed on all of them.
    """

    def __init__(self, model: torch.nn.Module, rows: int):
        self._model = model
        self._rows = rows
        self._anchor: dict[str, torch.Tensor] | None = None
        self._floor: float = 0.0
        """Least mean square distance of an engine that held the present policy, since that was last confirmed."""

    @torch.no_grad()
    def check(self, scored: Sequence[tuple[dict[str, Any], torch.Tensor]], score: Score) -> Staleness | None:
        """Check the engine on the completions of an update, before the optimizer's step.

        Args:
            scored (`Sequence[tuple[dict[str, Any], torch.Tensor]]`):
                For each pass its batch (`sampling_logps` and `turn_ids` of shape (B, T)) and the present policy's log-probs.
            score (`Score`):
                Scores a batch under a model.

        Returns:
            [`Staleness`] or `None`: What was found where the anchor was scored.

        Raises:
            RuntimeError: If the engine is behind, or samples another model altogether.
        """
        distances = [
            (batch["sampling_logps"] - present_BT)[batch["turn_ids"] > 0].double() for batch, present_BT in scored
        ]
        distance_K = torch.cat(distances)
        power, gap = float(distance_K.square().mean()), float(distance_K.abs().mean())
        if not math.isfinite(power):
            return None  # broken numbers are the gradient guard's business
        if self._anchor is None:
            _refuse_another_model(gap)
            self._floor, self._anchor = max(power, LEAST_FLOOR), self._snapshot()
            return None
        if power <= 4 * self._floor:  # at most twice as far
            self._floor, self._anchor = min(self._floor, max(power, LEAST_FLOOR)), self._snapshot()
            return None
        finding = self._compare(list(_first_rows(scored, self._rows)), score)
        state = finding.judge(self._floor, sigmas=1.0)
        if state is EngineState.STALE:
            finding = self._compare(scored, score)
            state = finding.judge(self._floor)
        if state is EngineState.STALE:
            raise RuntimeError(
                f"The engine samples an old policy: on the tokens it just sampled its log-probs lie {finding.score:.0%} of "
                f"the way from the present policy to an earlier one (mean square distances {finding.to_present:.2g} and "
                f"{finding.to_anchor:.2g}). Either the policy did not reach the engine or its prefix cache outlived an "
                "update. Training stops because such samples teach the wrong thing: resume from the last checkpoint with "
                "another --policy_link, and please report this."
            )
        _refuse_another_model(gap)
        if state is EngineState.PRESENT:  # engine and trainer have come to differ more, and that is all
            self._floor, self._anchor = max(power, LEAST_FLOOR), self._snapshot()
        return finding

    def _compare(self, scored: Sequence[tuple[dict[str, Any], torch.Tensor]], score: Score) -> Staleness:
        assert self._anchor is not None
        anchored = _Anchored(self._model, self._anchor)
        sampled, present, anchor = [], [], []
        for batch, present_BT in scored:
            kept = batch["turn_ids"] > 0
            sampled.append(batch["sampling_logps"][kept])
            present.append(present_BT[kept])
            anchor.append(score(anchored, batch)[kept])
        return staleness(torch.cat(sampled), torch.cat(present), torch.cat(anchor))

    def save(self, path: Path) -> None:
        """Write the anchor and the floor, so that a resumed run judges as the uninterrupted one would."""
        if self._anchor is not None:
            save_file(self._anchor, path, metadata={"floor": self._floor.hex()})

    def load(self, path: Path) -> None:
        """Read them back; without a file there was no anchor yet."""
        if not path.is_file():
            return
        with safe_open(path, "pt") as file:
            self._anchor = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._floor = float.fromhex(file.metadata()["floor"])

    def _snapshot(self) -> dict[str, torch.Tensor]:
        # On the CPU: in full fine-tuning a second copy on the GPU would be what does not fit.
        return {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }


class _Anchored(torch.nn.Module):
    """A model that computes with the anchor's parameters, without touching its own."""

    def __init__(self, model: torch.nn.Module, anchor: dict[str, torch.Tensor]):
        super().__init__()
        self.model, self.training = model, model.training
        device = next(model.parameters()).device
        self.anchor = {name: tensor.to(device) for name, tensor in anchor.items()}

    def forward(self, **kwargs: object) -> object:
        return functional_call(self.model, self.anchor, (), kwargs)


def _first_rows(
    scored: Sequence[tuple[dict[str, Any], torch.Tensor]], rows: int
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    for batch, present_BT in scored:
        taken = {name: value[:rows] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        yield taken, present_BT[:rows]
        rows -= len(present_BT)
        if rows <= 0:
            return


def _refuse_another_model(gap: float) -> None:
    if gap > MAX_GAP:
        raise RuntimeError(
            f"Engine and trainer disagree by {gap:.2f} nats a token on average, so they do not hold the same "
            "model. Check that both load the same weights, revision and dtype, and use the same temperature."
        )
