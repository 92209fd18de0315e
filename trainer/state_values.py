"""V of states that have no reference samples of their own: from constants by role and label, or from a value network.

Suffixes name the dimensions: S states, D hidden size.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..rollout.episodes.episode import ROLES, Role
from ..rollout.episodes.rewards import binary_value, revision_value
from ..rollout.files import write_json
from .value_network import (
    ConstantChances,
    States,
    ValueNetwork,
    ValueReport,
    binomial_nll,
    fit_value_network,
    plot_reliability,
)

REVISE = ROLES.index(Role.REVISE)
FILE, NETWORK, OPTIMIZER = "state_values.json", "value_network.safetensors", "value_optimizer.pt"
LARGEST_WEIGHT = 2.0
ONLINE_RATE = 1e-4


@dataclass
class StateValues:
    """Chances of success under the reference, and the values that follow from them.

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
    trusted: tuple[bool, ...] = (False, False, False)
    offline: States | None = None
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False)

    @classmethod
    def fit(cls, states: States, with_network: bool, seed: int, folder: Path | None) -> "StateValues":
        """From the states of a reference pool; a network's report and its reliability plot go into `folder`.

        Args:
            states ([`States`]):
                The states, with hidden states for a network.
            with_network (`bool`):
                Whether to train one.
            seed (`int`):
                Of its training.
            folder (`Path`, *optional*):
                For `value_network.json` and `value_network.png`; None in all processes but one.
        """
        constants = ConstantChances.of(states)
        if not with_network:
            return cls(constants)
        network, report = fit_value_network(states, seed=seed)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "value_network.json", report.to_json())
            plot_reliability(report, folder / "value_network.png")
            tell(report, folder)
        return cls(constants, network, tuple(role.is_better for role in report.by_role), states)

    def chances(self, hidden_SD: torch.Tensor | None, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """Chances of success, shape (S,), on the CPU.

        Args:
            hidden_SD (`torch.Tensor`, *optional*):
                Hidden states; not needed where no role's network is trusted.
            role_S (`torch.Tensor`):
                0 attempt, 1 verify, 2 revise.
            label_S (`torch.Tensor`):
                1 where the attempt was right.
        """
        chances_S = self.constants.chances(role_S, label_S)
        if self.network is None or hidden_SD is None or not any(self.trusted):
            return chances_S
        trusted_S = torch.tensor(self.trusted)[role_S.long()]
        return torch.where(trusted_S, self.network.chances(hidden_SD, role_S, label_S), chances_S)

    def needs_hidden(self, role: int) -> bool:
        """Whether a state of this role is judged by its hidden state."""
        return self.network is not None and self.trusted[role]

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
                Of the choice among the reference's states.

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


def values_of(
    chance_S: torch.Tensor, role_S: torch.Tensor, label_S: torch.Tensor, alpha: float, beta1: float
) -> torch.Tensor:
    """V of states from their chances of success (docs/pag.md), shape (S,), float32.

    Args:
        chance_S (`torch.Tensor`):
            The reference's chance of success.
        role_S, label_S (`torch.Tensor`):
            Role, and whether the attempt was right.
        alpha (`float`):
            Weight of acc2 − acc1 in the revision's reward.
        beta1 (`float`):
            Temperature.
    """
    revised_S = revision_value(chance_S, label_S, alpha, beta1)
    return torch.where(role_S == REVISE, revised_S, binary_value(chance_S, beta1)).float()


def tell(report: ValueReport, folder: Path) -> None:
    """Say where the network is used, and where the constants are better."""
    for name, role in zip(ROLES, report.by_role, strict=True):
        if role.trials:
            chosen = "the network is used" if role.is_better else "no better, so the constants are used"
            print(
                f"value network, {name}: held-out NLL {role.network_nll:.4f}, constants {role.constant_nll:.4f} "
                f"({role.trials} trials): {chosen}",
                file=sys.stderr,
            )
    if not any(role.is_better for role in report.by_role):
        print("value network: of no use in any role; values are those of value=constant", file=sys.stderr)
    print(f"value network: {folder / 'value_network.json'}, {folder / 'value_network.png'}", file=sys.stderr)
