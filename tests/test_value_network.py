"""The value network on synthetic states whose chances are known (docs/algorithm.md, Where V comes from)."""

import pytest
import torch

from astarpo.rollout import SINGLE
from astarpo.rollout.values import optimal_values
from astarpo.trainer.states import ConstantChances, States
from astarpo.trainer.value_network import (
    ValueNetwork,
    binomial_nll,
    fit_value_network,
    plot_reliability,
)

pytestmark = pytest.mark.value_network
DIM, ROLES = 64, ("attempt", "verify", "revise")


def synthetic(count, trials=1, seed=0, informative=True):
    """States with a known chance of success: a function of the hidden state, of role and of label."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, DIM, generator=generator)
    role = torch.randint(0, 3, (count,), generator=generator)
    label = torch.randint(0, 2, (count,), generator=generator) * (role > 0)
    signal = 1.5 * hidden[:, 0] + hidden[:, 1] if informative else torch.zeros(count)
    chance = (signal + 0.8 * role - 1.2 * label - 0.5).sigmoid()
    draws = torch.rand(count, trials, generator=generator) < chance[:, None]
    prompts = tuple(f"p{i // 4}" for i in range(count))
    return States(hidden, role, label, draws.sum(1), torch.full((count,), trials), prompts, ROLES), chance


@pytest.fixture(scope="module")
def fitted():
    states, _ = synthetic(30_000)
    return fit_value_network(states)


def test_it_is_calibrated_with_one_sample_a_state(fitted):
    network, report, _ = fitted
    states, chance = synthetic(20_000, seed=1)
    got = network.chances(states.hidden_SD, states.role_S, states.label_S)
    assert abs((got - chance).mean()) < 0.02
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        here = (got >= low) & (got < low + 0.2)
        assert abs((got[here] - chance[here]).mean()) < 0.02, low
    for role in range(3):
        for label in (0, 1):
            here = (states.role_S == role) & (states.label_S == label)
            if here.any():
                assert abs((got[here] - chance[here]).mean()) < 0.02, (role, label)
    assert report.is_better and report.network_nll < report.constant_nll - 0.05
    assert all(abs(predicted - observed) < 0.15 for predicted, observed, trials in report.reliability if trials > 50)
    assert 0 < report.brier < 0.25


def test_regressing_on_the_plug_in_value_would_learn_the_mean_reward():
    """Why the chance is regressed: with one sample the plug-in V* is the reward, whatever β1 is."""
    chance, beta1 = torch.tensor(0.3), 0.5
    rewards = (torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)) < chance).double()
    plug_in = optimal_values(rewards, beta1).mean()
    true = SINGLE.value("attempt", chance, torch.tensor(0), beta1)
    assert plug_in.item() == pytest.approx(0.3, abs=0.01)
    assert true.item() == pytest.approx(0.5352, abs=1e-3)


def test_states_that_say_nothing_are_not_preferred_for_long():
    """The reported likelihood chose nothing, so without information the network wins about as often as it loses."""
    reports = [
        fit_value_network(synthetic(2_000, seed=s, informative=False)[0], seed=s, epochs=5)[1] for s in range(10)
    ]
    assert sum(not report.is_better for report in reports) >= 1
    assert all(abs(report.network_nll - report.constant_nll) < 0.05 for report in reports)
    assert all(report.to_json()["is_better"] == (report.network_nll < report.constant_nll) for report in reports)


def test_the_split_is_by_prompt(monkeypatch):
    from astarpo.trainer import value_network as module

    seen = {}
    inner = module._train

    def watching(network, train, stop, *args):
        seen["train"], seen["stop"] = set(train.prompts), set(stop.prompts)
        return inner(network, train, stop, *args)

    monkeypatch.setattr(module, "_train", watching)
    states, _ = synthetic(400)
    _, report, _ = fit_value_network(states, epochs=1)
    assert not seen["train"] & seen["stop"]
    assert (len(seen["train"]), len(seen["stop"]), report.heldout_states) == (80, 10, 40)
    few, _ = synthetic(4)
    with pytest.raises(ValueError, match="Sample more reference episodes"):
        fit_value_network(few)


def test_constants_count(fitted):
    states, _ = synthetic(4_000, trials=3)
    constants = ConstantChances.of(states)
    here = (states.role_S == 2) & (states.label_S == 1)
    expected = states.successes_S[here].sum() / states.trials_S[here].sum()
    assert constants.table[2][1] == pytest.approx(expected.item())
    assert constants.table[0][1] == 0.5  # an attempt has no label
    got = constants.chances(torch.tensor([2, 0]), torch.tensor([1, 0]))
    assert got.tolist() == pytest.approx([constants.table[2][1], constants.table[0][0]])


def test_likelihood_of_counts_is_that_of_single_trials():
    logits = torch.tensor([0.3, -1.0])
    together = binomial_nll(logits, torch.tensor([2, 1]), torch.tensor([3, 4]))
    single = torch.cat([logits[:1].expand(3), logits[1:].expand(4)])
    wins = torch.tensor([1, 1, 0, 1, 0, 0, 0])
    torch.testing.assert_close(together, binomial_nll(single, wins, torch.ones(7, dtype=torch.long)))


def test_same_seed_same_network_and_it_can_be_kept(tmp_path):
    states, _ = synthetic(600)
    before = torch.random.get_rng_state()
    first, second = (fit_value_network(states, seed=3, epochs=2)[0] for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    first.save(tmp_path / "value.safetensors")
    again = ValueNetwork.load(tmp_path / "value.safetensors")
    inputs = (states.hidden_SD, states.role_S, states.label_S)
    assert torch.equal(first.chances(*inputs), second.chances(*inputs))
    assert torch.equal(first.chances(*inputs), again.chances(*inputs))


def test_the_plot_is_drawn(fitted, tmp_path):
    plot_reliability(fitted[1], tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"
