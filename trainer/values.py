"""V of the states in which turns begin.

A state's chance of success is that of a Beta posterior: p̂ = (k + κ·prior)/(N + κ), for k successes in N reference samples of this
very state and a prior from constants or from a value network. Where training is tracked, p̂ is moved by what training has shown since.
V follows by the closed form of the kind of episode. Prompts that were never sampled, and all states of later turns, have N = 0: the prior.

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
from ..rollout.files import text_hash, write_json
from .states import ConstantChances, States
from .tracking import Tracker
from .value_network import ValueNetwork, ValueReport, fit_kappa, fit_value_network, plot_reliability

logger = logging.getLogger(__name__)

FILE, NETWORK = "state_values.json", "value_network.safetensors"


@dataclass
class StateValues:
    """Chances of success of states.

    Attributes:
        constants ([`ConstantChances`]):
            The prior by role and label.
        kappa (`float`):
            How many reference samples the prior is worth.
        network ([`ValueNetwork`], *optional*):
            The prior by hidden state.
        trusted (`tuple[bool, ...]`):
            For which roles the network is used: those in which it beat the constants on held-out prompts.
        tracker ([`Tracker`], *optional*):
            What training has shown.
        first (`dict[int, float]`):
            Prior chances of prompts, by key: the network is fixed, so each is computed once.
    """

    constants: ConstantChances
    kappa: float = 0.0
    network: ValueNetwork | None = None
    trusted: tuple[bool, ...] = ()
    tracker: Tracker | None = None
    first: dict[int, float] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        states: States,
        kappa: float | None,
        network: ValueNetwork | bool,
        is_tracked: bool,
        seed: int,
        folder: Path | None,
    ) -> "StateValues":
        """Fit the prior to the reference's states.

        Args:
            states ([`States`]):
                The states, with hidden states for a network.
            kappa (`float`, *optional*):
                κ; fitted when not given.
            network ([`ValueNetwork`] or `bool`):
                A network that was trained before, or whether to train one.
            is_tracked (`bool`):
                Whether V follows training.
            seed (`int`):
                Seed of the network's training.
            folder (`Path`, *optional*):
                Where `value_network.json` and `value_network.png` go; None in all processes but one.
        """
        roles = len(states.roles)
        values = cls(ConstantChances.of(states), tracker=Tracker(roles) if is_tracked else None)
        heldout = states
        if network is True:
            # κ is judged on prompts that the network was not fitted to: on its own it would look better than it is.
            values.network, report, heldout = fit_value_network(states, seed=seed)
            values.trusted = tuple(role.is_better for role in report.by_role)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / "value_network.json", report.to_json())
                plot_reliability(report, folder / "value_network.png")
                _log_report(report, states.roles, folder)
        elif network is not False:
            values.network, values.trusted = network, (True,) * roles

        def first_turns(of: States) -> tuple[States, torch.Tensor]:
            first = of[(of.role_S == 0).nonzero()[:, 0]]
            return first, values.prior(first.hidden_SD, first.role_S, first.label_S)

        judged, prior_S = first_turns(heldout)
        values.kappa = fit_kappa(prior_S, judged) if kappa is None else kappa
        if values.network is not None:
            first, prior_S = first_turns(states)
            values.first = dict(zip(map(prompt_key, first.prompts), prior_S.tolist(), strict=True))
        return values

    def prior(self, hidden_SD: torch.Tensor | None, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """Chances of success by the prior, shape (S,), on the CPU.

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

    def unknown(self, prompts: Sequence[int]) -> list[int]:
        """Rows whose prompt's prior needs a hidden state that was not looked at yet."""
        if not self.needs_hidden([0]):
            return []
        return [row for row, prompt in enumerate(prompts) if prompt not in self.first]

    def chances(
        self,
        prior_BK: torch.Tensor,
        successes_B: torch.Tensor,
        trials_B: torch.Tensor,
        label_BK: torch.Tensor,
        prompts: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """p̂ of each turn's state.

        Args:
            prior_BK (`torch.Tensor`):
                The prior's chances, shape (B, K).
            successes_B, trials_B (`torch.Tensor`):
                k and N of the prompts.
            label_BK (`torch.Tensor`):
                Labels.
            prompts (`list[int]`):
                Keys of the prompts.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: p̂, and p̂ without what the prompts themselves showed in training, which is what
            [`Tracker.add`] wants; float64, shape (B, K).
        """
        chance_BK = prior_BK.double()
        # NaN without samples and with a prior that is worth nothing: then nothing is known of the prompt.
        chance_BK[:, 0] = (successes_B.double() + self.kappa * chance_BK[:, 0]) / (trials_B.double() + self.kappa)
        if self.tracker is None:
            return chance_BK, chance_BK
        shifted_BK = self.tracker.shifted(chance_BK, label_BK)
        chance_BK = shifted_BK.clone()
        chance_BK[:, 0] = self.tracker.joined(shifted_BK[:, 0], prompts)
        return chance_BK, shifted_BK

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        tracker = None if self.tracker is None else self.tracker.to_json()
        content = {"constants": self.constants.table, "kappa": self.kappa, "trusted": self.trusted, "tracker": tracker}
        write_json(folder / FILE, {**content, "first": list(self.first.items())})
        if self.network is not None:
            self.network.save(folder / NETWORK)

    def save_network(self, folder: Path) -> None:
        """Write the network, if there is one that won anywhere, for a later run's `value_network`."""
        if self.network is not None and any(self.trusted):
            self.network.save(folder / NETWORK)

    @classmethod
    def load(cls, folder: Path) -> "StateValues":
        """Read what `save` wrote."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return cls(
            ConstantChances(tuple((low, high) for low, high in content["constants"])),
            content["kappa"],
            ValueNetwork.load(folder / NETWORK) if (folder / NETWORK).is_file() else None,
            tuple(content["trusted"]),
            None if content["tracker"] is None else Tracker.from_json(content["tracker"]),
            dict(content["first"]),
        )


def prompt_key(prompt_id: str) -> int:
    """A prompt's id as a number that fits into a tensor."""
    return int(text_hash(prompt_id)[:15], 16)


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
            Temperature of V*; infinity for the mean reward.

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
            "In no role is the value network better than constants, so values are those of value_prior=constant."
        )
    logger.info("Value network: %s, %s", folder / "value_network.json", folder / "value_network.png")
