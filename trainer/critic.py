"""`value: critic`: V learnt from what the policy itself earns, without any reference sample.

This is the value of the *policy*, as in PPO, and not V* of the reference: a mean of the role and label plus a network on the reference's
hidden state, regressed on R − β2·ℓ of each update after it was used. It is here to compare with; docs/algorithm.md says why A*-PO
needs none.

Suffixes name the dimensions: S states, D hidden size, K turns, Z = 2 labels.
"""

import json
from pathlib import Path

import torch
from torch import nn

from ..rollout.files import write_json
from .value_network import ValueNetwork

NETWORK, OPTIMIZER, STATE = "critic.safetensors", "critic_optimizer.pt", "critic.json"
LEARNING_RATE, STEPS, KEPT = 3e-4, 8, 0.7
"""Rate and steps of each update's regression, and what is left of the mean's weight in the next update."""


class Critic:
    """V of states by hidden state, role and label; 0 before anything was seen.

    Args:
        hidden_size (`int`):
            D.
        roles (`int`):
            K.
        seed (`int`):
            Seed of the first weights.
    """

    def __init__(self, hidden_size: int, roles: int, seed: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = ValueNetwork(hidden_size, roles).eval()  # dropout would depend on the order of the states
        self._weight_KZ = torch.zeros(roles, 2)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)

    @torch.no_grad()
    def values(self, hidden_SD: torch.Tensor, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """V, float32, shape (S,)."""
        return self.network(hidden_SD, role_S, label_S)

    def update(
        self, hidden_SD: torch.Tensor, role_S: torch.Tensor, label_S: torch.Tensor, target_S: torch.Tensor
    ) -> float:
        """Regress on an update's states, after their values were used.

        Args:
            hidden_SD (`torch.Tensor`):
                Hidden states of the reference.
            role_S, label_S (`torch.Tensor`):
                Role and label.
            target_S (`torch.Tensor`):
                R − β2·ℓ.

        Returns:
            `float`: The mean square of what was wrong before.
        """
        network = self.network
        if not self._weight_KZ.any():
            network.adapt_scale(hidden_SD)
        before = (network(hidden_SD, role_S, label_S).detach() - target_S).square().mean().item()
        place_S = role_S.long() * 2 + label_S.long()
        count_KZ = torch.bincount(place_S, minlength=self._weight_KZ.numel()).view_as(self._weight_KZ)
        sum_KZ = torch.zeros(self._weight_KZ.numel()).index_add_(0, place_S, target_S.float()).view_as(self._weight_KZ)
        kept_KZ = KEPT * self._weight_KZ
        mean_KZ = (kept_KZ * network.constants + sum_KZ) / (kept_KZ + count_KZ).clamp(min=1e-12)
        network.constants.copy_(torch.where(kept_KZ + count_KZ > 0, mean_KZ, network.constants))
        self._weight_KZ = kept_KZ + count_KZ
        for _ in range(STEPS):
            loss = nn.functional.mse_loss(network(hidden_SD, role_S, label_S), target_S.float())
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        return before

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        self.network.save(folder / NETWORK)
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER)
        write_json(folder / STATE, {"weight": self._weight_KZ.tolist()})

    @classmethod
    def load(cls, folder: Path) -> "Critic":
        """Read what `save` wrote."""
        network = ValueNetwork.load(folder / NETWORK)
        critic = cls(len(network.mean_D), len(network.constants), 0)
        critic.network.load_state_dict(network.state_dict())
        critic._optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
        critic._weight_KZ = torch.tensor(json.loads((folder / STATE).read_text(encoding="utf-8"))["weight"])
        return critic
