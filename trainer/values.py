"""V of states that have no reference samples of their own: from constants by role and label, or from a value network.

Suffixes name the dimensions: S states, D hidden size, B episodes, K turns.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..rollout.episode import EpisodeKind
from ..rollout.files import write_json
from .states import ConstantChances, States
from .value_network import ValueNetwork, ValueReport, binomial_nll, fit_value_network, plot_reliability

logger = logging.getLogger(__name__)

FILE, NETWORK, OPTIMIZER = "state_values.json", "value_network.safetensors", "value_optimizer.pt"
LARGEST_WEIGHT = 2.0
ONLINE_RATE = 1e-4


@dataclass
class StateValues:
    """Chances of success under the reference.

    Attributes:
        constants ([`ConstantChances`]):
            By role and label.
        network ([`ValueNetwork`], *optional*):
            By hidden state.
        trusted (`tuple[bool, ...]`):
            For which roles the network is used: those in which it beat the constants on held-out prompts.
        offline ([`States`], *optional*):
            The reference's states, for training online.
    """

    constants: ConstantChances
    network: ValueNetwork | None = None
    trusted: tuple[bool, ...] = ()
    offline: States | None = None
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False)

    @classmethod
    def fit(cls, states: States, with_network: bool, seed: int, folder: Path | None) -> "StateValues":
        """Fit them to the states of a reference pool.

        Args:
            states ([`States`]):
                The states, with hidden states for a network.
            with_network (`bool`):
                Whether to train a network.
            seed (`int`):
                Seed of its training.
            folder (`Path`, *optional*):
                Where `value_network.json` and `value_network.png` go; None in all processes but one.
        """
        constants = ConstantChances.of(states)
        if not with_network:
            return cls(constants)
        network, report = fit_value_network(states, seed=seed)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "value_network.json", report.to_json())
            plot_reliability(report, folder / "value_network.png")
            _log_report(report, states.roles, folder)
        return cls(constants, network, tuple(role.is_better for role in report.by_role), states)

    def chances(self, hidden_SD: torch.Tensor | None, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """Chances of success, shape (S,), on the CPU.

        Args:
            hidden_SD (`torch.Tensor`, *optional*):
                Hidden states; not needed where no role's network is trusted.
            role_S (`torch.Tensor`):
                Index of the role.
            label_S (`torch.Tensor`):
                1 where the first turn succeeded.
        """
        chances_S = self.constants.chances(role_S, label_S)
        if self.network is None or hidden_SD is None or not any(self.trusted):
            return chances_S
        trusted_S = torch.tensor(self.trusted)[role_S.long()]
        return torch.where(trusted_S, self.network.chances(hidden_SD, role_S, label_S), chances_S)

    def needs_hidden(self, roles: Sequence[int]) -> bool:
        """Whether states of any of these roles are judged by their hidden state."""
        return self.network is not None and any(self.trusted[role] for role in roles)

    def update(
        self,
        hidden_SD: torch.Tensor,
        role_S: torch.Tensor,
        label_S: torch.Tensor,
        success_S: torch.Tensor,
        log_ratio_S: torch.Tensor,
        seed: int,
    ) -> tuple[float, float]:
        """One step on states that the policy visited, with truncated weights min(2, e^{−ℓ}) towards the reference, and on as many of
        the reference's own. To be called after the states' values were used.

        Args:
            hidden_SD (`torch.Tensor`):
                Hidden states of the reference.
            role_S, label_S, success_S (`torch.Tensor`):
                Role, label, and whether the turn succeeded.
            log_ratio_S (`torch.Tensor`):
                ℓ of the turn.
            seed (`int`):
                Seed for sampling the reference's states.

        Returns:
            `tuple[float, float]`: Mean weight, and the effective number of samples (Σw)² / Σw².
        """
        assert self.network is not None and self.offline is not None
        weight_S = (-log_ratio_S).exp().clamp(max=LARGEST_WEIGHT)
        chosen_S = torch.randint(len(self.offline), (len(role_S),), generator=torch.Generator().manual_seed(seed))
        old = self.offline[chosen_S]
        self.network.eval()  # dropout would depend on the order of the states, which several processes share out
        logits = self.network(
            torch.cat([hidden_SD, old.hidden_SD]), torch.cat([role_S, old.role_S]), torch.cat([label_S, old.label_S])
        )
        successes = torch.cat([weight_S * success_S, old.successes_S / old.trials_S])
        loss = binomial_nll(logits, successes, torch.cat([weight_S, torch.ones(len(old))]))
        optimizer = self._online_optimizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return weight_S.mean().item(), (weight_S.sum() ** 2 / (weight_S**2).sum()).item()

    def _online_optimizer(self) -> torch.optim.Optimizer:
        assert self.network is not None
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=ONLINE_RATE)
        return self._optimizer

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        write_json(folder / FILE, {"constants": self.constants.table, "trusted": self.trusted})
        if self.network is not None:
            self.network.save(folder / NETWORK)
        if self._optimizer is not None:
            torch.save(self._optimizer.state_dict(), folder / OPTIMIZER)

    @classmethod
    def load(cls, folder: Path, offline: States | None = None) -> "StateValues":
        """Read what `save` wrote; `offline` is needed to go on training."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        constants = ConstantChances(tuple((low, high) for low, high in content["constants"]))
        network = ValueNetwork.load(folder / NETWORK) if (folder / NETWORK).is_file() else None
        values = cls(constants, network, tuple(content["trusted"]), offline)
        if (folder / OPTIMIZER).is_file():
            values._online_optimizer().load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
        return values


def turn_values(kind: EpisodeKind, chance_BK: torch.Tensor, label_BK: torch.Tensor, beta1: float) -> torch.Tensor:
    """V of the states in which turns begin, from their chances of success.

    Args:
        kind ([`EpisodeKind`]):
            Says what each turn earns.
        chance_BK (`torch.Tensor`):
            The reference's chances of success, shape (B, K).
        label_BK (`torch.Tensor`):
            1 where the first turn succeeded, shape (B, K); 0 in the first column.
        beta1 (`float`):
            Temperature of V*.

    Returns:
        `torch.Tensor`: float32 values of shape (B, K).
    """
    columns = [kind.value(role, chance_BK[:, k], label_BK[:, k], beta1).float() for k, role in enumerate(kind.roles)]
    return torch.stack(columns, dim=1)


@torch.no_grad()
def hidden_states(
    model: Any,
    sequences: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    max_rows: int,
    autocast: Callable[..., Any],
) -> list[torch.Tensor]:
    """Last hidden states of a model at some tokens of some sequences: what a value network sees of a state.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The reference, without PEFT around it.
        sequences (`Sequence[Sequence[int]]`):
            Token ids.
        positions (`Sequence[Sequence[int]]`):
            Which tokens, for each sequence.
        max_rows (`int`):
            Most sequences of a pass; halved when memory runs out.
        autocast (`Callable`):
            accelerate's mixed precision.

    Returns:
        `list[torch.Tensor]`: For each sequence a float32 tensor of shape (positions, D), on the CPU.
    """
    decoder, device = model.base_model, next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    start = 0
    while start < len(order):
        group = order[start : start + max_rows]
        longest = len(sequences[group[-1]])
        # On the right padding needs no mask: a causal model does not look there.
        ids = [list(sequences[number]) + [0] * (longest - len(sequences[number])) for number in group]
        try:
            with autocast():
                states = decoder(input_ids=torch.tensor(ids, device=device), use_cache=False)
        except torch.OutOfMemoryError:
            if max_rows == 1:
                raise
            max_rows //= 2
            torch.cuda.empty_cache()
            continue
        for row, number in enumerate(group):
            hidden[number] = states.last_hidden_state[row, list(positions[number])].float().cpu()
        start += len(group)
    return hidden


def _log_report(report: ValueReport, roles: Sequence[str], folder: Path) -> None:
    """Say in which roles the network is used, and in which the constants are better."""
    for name, role in zip(roles, report.by_role, strict=True):
        if role.trials:
            chosen = "the network is used" if role.is_better else "no better, so the constants are used"
            logger.info(
                "Value network, %s: held-out NLL %.4f, constants %.4f (%d trials): %s.",
                *(name, role.network_nll, role.constant_nll, role.trials, chosen),
            )
    if not any(role.is_better for role in report.by_role):
        logger.warning(
            "The value network is better than the constants in no role, so values are those of value=constant."
        )
    logger.info("Value network: %s, %s", folder / "value_network.json", folder / "value_network.png")
