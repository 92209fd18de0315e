"""A value network for states without reference samples: an MLP on hidden states of the frozen reference.

It regresses the reference's chance of success by binomial likelihood, and V* follows by the kind's closed form
(`EpisodeKind.value`). It does not regress V* itself: with one sample per state, as the states of later turns have, the plug-in V*
is the reward, and the network would learn the mean reward instead. The chance has no such bias, and β1 and α may change later.

Suffixes name the dimensions: S states, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .states import ConstantChances, States

WIDTH, DROPOUT = 256, 0.1


class ValueNetwork(nn.Module):
    """Chance of success from a hidden state, the turn's role and whether the attempt was right.

    It begins as the constants by role and label, and learns what the hidden state adds to their logits.

    Args:
        hidden_size (`int`):
            D.
        roles (`int`):
            Number of roles.
    """

    mean_D: torch.Tensor
    scale_D: torch.Tensor
    constants: torch.Tensor

    def __init__(self, hidden_size: int, roles: int):
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(hidden_size))
        self.register_buffer("scale_D", torch.ones(hidden_size))
        self.register_buffer("constants", torch.zeros(roles, 2))
        self.norm = nn.LayerNorm(hidden_size)
        last = nn.Linear(WIDTH, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(hidden_size + roles + 1, WIDTH), nn.GELU(), nn.Dropout(DROPOUT), last)

    @torch.no_grad()
    def adapt_to(self, states: States) -> None:
        """Take over the scale of the hidden states and the constants."""
        self.adapt_scale(states.hidden_SD)
        self.constants.copy_(torch.tensor(ConstantChances.of(states).table).logit(eps=1e-3))

    @torch.no_grad()
    def adapt_scale(self, hidden_SD: torch.Tensor) -> None:
        """Take over the scale of some hidden states."""
        self.mean_D.copy_(hidden_SD.float().mean(0))
        self.scale_D.copy_(hidden_SD.float().std(0, correction=0).clamp(min=1e-6))

    def forward(self, hidden_SD: torch.Tensor, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """Logits of the chance of success, shape (S,)."""
        features = self.norm((hidden_SD.float() - self.mean_D) / self.scale_D)
        known = torch.cat(
            [nn.functional.one_hot(role_S.long(), len(self.constants)), label_S[:, None].long()], dim=1
        ).float()
        return self.layers(torch.cat([features, known], dim=1))[:, 0] + self.constants[role_S.long(), label_S.long()]

    @torch.no_grad()
    def chances(self, hidden_SD: torch.Tensor, role_S: torch.Tensor, label_S: torch.Tensor) -> torch.Tensor:
        """Chances of success, shape (S,), without dropout."""
        was_training = self.training
        self.eval()
        chances_S = self(hidden_SD, role_S, label_S).sigmoid()
        self.train(was_training)
        return chances_S

    def save(self, path: Path) -> None:
        """Write the network as safetensors."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "ValueNetwork":
        """Read a network that `save` wrote."""
        tensors = load_file(path, device=device)
        network = cls(len(tensors["mean_D"]), len(tensors["constants"])).to(device)
        network.load_state_dict(tensors)
        return network.eval()


@dataclass(frozen=True, slots=True)
class RoleReport:
    """Network and constants on the held-out states of one role; NLL a trial, in nats, None where there are none."""

    network_nll: float | None
    constant_nll: float | None
    trials: int

    @property
    def is_better(self) -> bool:
        """Whether the network beats the constants; where it does not, they are used."""
        if self.network_nll is None or self.constant_nll is None:
            return False
        return self.network_nll < self.constant_nll


@dataclass(frozen=True, slots=True)
class ValueReport:
    """How good a value network is on prompts by which neither it nor its epoch was chosen.

    Attributes:
        network_nll (`float`):
            Negative log-likelihood a trial, in nats, of the network.
        constant_nll (`float`):
            The same of the constants by role and label.
        brier (`float`):
            Mean square of (chance − outcome).
        reliability (`tuple[tuple[float, float, int], ...]`):
            By tenths of the predicted chance: mean prediction, mean outcome, trials.
        train_states, heldout_states (`int`):
            How many states there were.
        epochs (`int`):
            Epochs until the held-out likelihood was best.
        by_role (`tuple[RoleReport, ...]`):
            Likelihoods of each role.
    """

    network_nll: float
    constant_nll: float
    brier: float
    reliability: tuple[tuple[float, float, int], ...]
    train_states: int
    heldout_states: int
    epochs: int
    by_role: tuple[RoleReport, ...]

    @property
    def is_better(self) -> bool:
        """Whether the network beats the constants over all roles."""
        return self.network_nll < self.constant_nll

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        roles = [{**asdict(role), "is_better": role.is_better} for role in self.by_role]
        return {**asdict(self), "by_role": roles, "is_better": self.is_better}


def fit_value_network(
    states: States,
    *,
    seed: int = 0,
    epochs: int = 20,
    batch: int = 256,
    learning_rate: float = 3e-4,
    heldout: float = 0.1,
) -> tuple[ValueNetwork, ValueReport, States]:
    """Train on the reference's states, split by prompt in three: to train on, to choose the epoch by, and to report on.

    Returns the network, the report, and the states that are reported on.

    Args:
        states ([`States`]):
            The states.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split, the initial weights and the order.
        epochs (`int`, *optional*, defaults to `20`):
            Most epochs.
        batch (`int`, *optional*, defaults to `256`):
            States in a step.
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Learning rate of AdamW.
        heldout (`float`, *optional*, defaults to `0.1`):
            Share of the prompts by which the epoch is chosen, and again of those that are reported on.

    Raises:
        ValueError: If there are too few prompts to hold any out.
    """
    generator = torch.Generator().manual_seed(seed)
    train, stop, test = _split(states, heldout, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ValueNetwork(states.hidden_SD.shape[1], len(states.roles)).to(states.hidden_SD.device)
        network.adapt_to(train)
        best_epoch = _train(network, train, stop, generator, epochs, batch, learning_rate)
    network.eval()
    chances_S = network.chances(test.hidden_SD, test.role_S, test.label_S)
    constants_S = ConstantChances.of(train).chances(test.role_S, test.label_S)
    report = ValueReport(
        network_nll=_nll(chances_S, test),
        constant_nll=_nll(constants_S, test),
        brier=_brier(chances_S, test),
        reliability=_reliability(chances_S, test),
        train_states=len(train),
        heldout_states=len(test),
        epochs=best_epoch,
        by_role=tuple(_role_report(test, role, chances_S, constants_S) for role in range(len(states.roles))),
    )
    return network, report, test


def _role_report(test: States, role: int, chances_S: torch.Tensor, constants_S: torch.Tensor) -> RoleReport:
    index_S = (test.role_S == role).nonzero()[:, 0]
    here = test[index_S]
    if not len(here):
        return RoleReport(None, None, 0)
    return RoleReport(_nll(chances_S[index_S], here), _nll(constants_S[index_S], here), int(here.trials_S.sum()))


def _split(states: States, share: float, generator: torch.Generator) -> tuple[States, States, States]:
    names = sorted(set(states.prompts))
    count = round(share * len(names))
    if not 0 < 2 * count < len(names):
        raise ValueError(
            f"A value network needs prompts to train on and others to be judged on; there are {len(names)} in all. Sample more "
            "reference episodes, or use value_prior=constant."
        )
    order = torch.randperm(len(names), generator=generator).tolist()
    part = {names[i]: 2 if place < count else 1 if place < 2 * count else 0 for place, i in enumerate(order)}
    part_S = torch.tensor([part[prompt] for prompt in states.prompts], device=states.hidden_SD.device)
    train, stop, test = (states[(part_S == number).nonzero()[:, 0]] for number in range(3))
    return train, stop, test


def _train(
    network: ValueNetwork,
    train: States,
    stop: States,
    generator: torch.Generator,
    epochs: int,
    batch: int,
    learning_rate: float,
) -> int:
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    best, best_epoch = _nll(network.chances(stop.hidden_SD, stop.role_S, stop.label_S), stop), 0
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for epoch in range(1, epochs + 1):
        network.train()
        for index_S in torch.randperm(len(train), generator=generator).split(batch):
            part = train[index_S]
            loss = binomial_nll(network(part.hidden_SD, part.role_S, part.label_S), part.successes_S, part.trials_S)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        nll = _nll(network.chances(stop.hidden_SD, stop.role_S, stop.label_S), stop)
        if nll < best:
            best, best_epoch = nll, epoch
            kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(kept)
    return best_epoch


def binomial_nll(logits_S: torch.Tensor, successes_S: torch.Tensor, trials_S: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood a trial of k successes in n trials, without the binomial coefficient.

    Args:
        logits_S (`torch.Tensor`):
            Logits of the chances, shape (S,).
        successes_S (`torch.Tensor`):
            k, shape (S,).
        trials_S (`torch.Tensor`):
            n, shape (S,).
    """
    failures_S = trials_S - successes_S
    log_likelihood = successes_S * nn.functional.logsigmoid(logits_S) + failures_S * nn.functional.logsigmoid(
        -logits_S
    )
    return -log_likelihood.sum() / trials_S.sum()


KAPPAS = tuple(2.0 ** (exponent / 2) for exponent in range(-4, 15))
"""What [`fit_kappa`] chooses from: 0.25 to 128."""
EXPECTED_KAPPA = 2.0


def fit_kappa(prior_S: torch.Tensor, states: States) -> float:
    """How many samples a prior is worth: the likeliest κ, the states' chances being drawn from Beta(κ·prior, κ·(1 − prior)).

    A few states say little of κ, and states with one trial nothing. So κ is itself expected near 2 (ln κ with a standard deviation of 1).

    Args:
        prior_S (`torch.Tensor`):
            The prior's chances.
        states ([`States`]):
            Successes and trials.
    """
    prior_S = prior_S.double().clamp(1e-3, 1 - 1e-3)
    k_S, n_S = states.successes_S.double(), states.trials_S.double()

    def log_posterior(kappa: float) -> float:
        a_S, b_S = kappa * prior_S, kappa * (1 - prior_S)
        total_S = torch.lgamma(k_S + a_S) + torch.lgamma(n_S - k_S + b_S) - torch.lgamma(n_S + a_S + b_S)
        total_S = total_S - torch.lgamma(a_S) - torch.lgamma(b_S) + torch.lgamma(a_S + b_S)
        return float(total_S.sum()) - math.log(kappa / EXPECTED_KAPPA) ** 2 / 2

    return max(KAPPAS, key=log_posterior)


def _nll(chances_S: torch.Tensor, states: States) -> float:
    logits_S = torch.logit(chances_S.double(), eps=1e-6)
    return float(binomial_nll(logits_S, states.successes_S.double(), states.trials_S.double()))


def _brier(chances_S: torch.Tensor, states: States) -> float:
    k, n, p = states.successes_S.double(), states.trials_S.double(), chances_S.double()
    return float((k * (1 - p) ** 2 + (n - k) * p**2).sum() / n.sum())


def _reliability(chances_S: torch.Tensor, states: States) -> tuple[tuple[float, float, int], ...]:
    tenth_S = (chances_S * 10).long().clamp(max=9)
    rows = []
    for tenth in range(10):
        here = tenth_S == tenth
        trials = float(states.trials_S[here].sum())
        if trials:
            predicted = float((chances_S[here] * states.trials_S[here]).sum()) / trials
            rows.append((predicted, float(states.successes_S[here].sum()) / trials, int(trials)))
    return tuple(rows)


def plot_reliability(report: ValueReport, path: Path) -> None:
    """Draw predicted against observed chances into an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    predicted, observed, trials = zip(*report.reliability, strict=True)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axis.scatter(predicted, observed, s=_areas(trials))
    axis.set(xlabel="predicted chance of success", ylabel="observed", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"NLL {report.network_nll:.3f}, constants {report.constant_nll:.3f}")
    figure.savefig(path)


def _areas(trials: Sequence[int]) -> list[float]:
    return [10 + 190 * count / max(trials) for count in trials]
