"""V from a Beta posterior, and V that follows the policy: on made-up policies whose chances are known."""

import math

import pytest
import torch

from astarpo.rollout import SINGLE, Pag
from astarpo.rollout.values import optimal_values, two_point_value
from astarpo.trainer.critic import Critic
from astarpo.trainer.dataset import kept_rows, with_values
from astarpo.trainer.states import ConstantChances, first_states
from astarpo.trainer.tracking import DECAY, Tracker
from astarpo.trainer.value_network import ValueNetwork, fit_kappa
from astarpo.trainer.values import StateValues, turn_values

pytestmark = pytest.mark.value_network


def drawn(prompts: int, samples: int, strength: float, mean: float = 0.3, seed: int = 0):
    """Prompts whose chances are drawn from a Beta distribution, and reference samples of them."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    chances = torch.distributions.Beta(strength * mean, strength * (1 - mean)).sample((prompts,))
    rewards = (torch.rand(prompts, samples, generator=generator) < chances[:, None]).float().tolist()
    return chances, first_states([str(n) for n in range(prompts)], rewards, None, SINGLE), rewards


@pytest.mark.parametrize("strength", [0.5, 2.0, 16.0])
def test_kappa_is_how_alike_the_prompts_are(strength):
    _, states, _ = drawn(4000, 8, strength)
    assert strength / 1.5 < fit_kappa(torch.full((4000,), 0.3), states) < strength * 1.5
    _, single, _ = drawn(50, 1, strength)
    assert fit_kappa(torch.full((50,), 0.3), single) == 2.0  # one sample a prompt says nothing of it


def test_the_posterior_needs_fewer_samples_than_the_table():
    """N = 2 with a prior against N = 8 as it is: mean square of what each says of the true chances."""
    chances, two, _ = drawn(4000, 2, 3.0)
    _, eight, _ = drawn(4000, 8, 3.0)
    nothing = torch.zeros(4000, 1, dtype=torch.long)

    def error(values, states):
        prior = values.prior(None, states.role_S, states.label_S)[:, None]
        got, _ = values.chances(prior, states.successes_S, states.trials_S, nothing, [0] * 4000)
        return ((got[:, 0] - chances) ** 2).mean().item()

    table = error(StateValues(ConstantChances.of(two)), two)
    posterior = error(StateValues.fit(two, None, False, False, 0, None), two)
    assert posterior < 0.5 * table
    assert posterior < 2 * error(StateValues(ConstantChances.of(eight)), eight)


def test_without_a_prior_v_is_the_table_and_nothing_is_known_of_a_prompt_without_samples():
    _, states, rewards = drawn(50, 8, 2.0)
    values = StateValues.fit(states, 0.0, False, False, 0, None)
    label = torch.zeros(51, 1, dtype=torch.long)
    successes, trials = (
        torch.cat([x, torch.zeros(1, dtype=torch.long)]) for x in (states.successes_S, states.trials_S)
    )
    chances, _ = values.chances(torch.full((51, 1), 0.3), successes, trials, label, list(range(51)))
    for beta1 in (0.5, math.inf):
        got = turn_values(SINGLE, chances, label, beta1)[:, 0]
        torch.testing.assert_close(got[:50], optimal_values(torch.tensor(rewards), beta1).float())
        assert got[50].isnan()


def test_an_infinite_temperature_is_the_mean_reward():
    p = torch.tensor([0.0, 0.2, 1.0])
    torch.testing.assert_close(two_point_value(p, -1.0, 1.0, math.inf), 2 * p.double() - 1)
    torch.testing.assert_close(Pag().value("revise", p, torch.ones(3), math.inf), 2 * p.double() - 1)
    assert optimal_values(torch.tensor([[1.0, math.nan, 0.0]]), math.inf).item() == 0.5


class Run:
    """Updates of a policy whose logits all move alike and a little each on its own."""

    def __init__(self, prompts=96, rows=32, own=0.0, speed=0.15):
        self.chances, states, rewards = drawn(prompts, 8, 2.0, seed=3)
        self.logits = self.chances.clamp(0.01, 0.99).logit()
        self.counts = states.successes_S, states.trials_S
        self.values = StateValues.fit(states, None, False, True, 0, None)
        self.table = torch.tensor(rewards).mean(1)
        self.speed, self.own, self.rows = (
            speed,
            own * torch.randn(prompts, generator=torch.Generator().manual_seed(1)),
            rows,
        )
        self.generator = torch.Generator().manual_seed(2)

    def update(self, number):
        rows = torch.randperm(len(self.chances), generator=self.generator)[: self.rows]
        true = (self.logits[rows] + number * (self.speed + self.own[rows])).sigmoid()
        label = torch.zeros(self.rows, 1, dtype=torch.long)
        prior = torch.full((self.rows, 1), self.values.constants.table[0][0])
        chance, shifted = self.values.chances(prior, self.counts[0][rows], self.counts[1][rows], label, rows.tolist())
        success = (torch.rand(self.rows, 1, generator=self.generator) < true[:, None]).double()
        assert self.values.tracker is not None
        self.values.tracker.add(rows.tolist(), shifted, label, success, torch.ones(self.rows, 1, dtype=torch.bool))
        return ((chance[:, 0] - true) ** 2).mean().item(), ((self.table[rows] - true) ** 2).mean().item()


@pytest.mark.parametrize("own", [0.0, 0.05])
def test_tracking_follows_a_policy_that_improves(own):
    run = Run(own=own)
    errors = [run.update(number) for number in range(30)]
    late = [sum(pair[which] for pair in errors[15:]) / 15 for which in (0, 1)]
    assert late[0] < 0.3 * late[1]
    early = [sum(pair[which] for pair in errors[:3]) / 3 for which in (0, 1)]
    assert early[0] < 1.2 * early[1]


def test_the_shift_is_exact_where_the_policy_is_the_reference_and_alone_in_its_label():
    tracker = Tracker(2)
    chance = torch.tensor([[0.5, 0.2], [0.5, 0.6]], dtype=torch.float64)
    label = torch.tensor([[0, 0], [0, 1]])
    torch.testing.assert_close(tracker.shifted(chance, label), chance)
    present = torch.tensor([[True, True], [True, False]])
    tracker.add([1, 2], tracker.shifted(chance, label), label, torch.ones(2, 2), present)
    assert tracker.shift_KZ[1, 0] > 0 and tracker.shift_KZ[1, 1] == 0  # a turn that is not there says nothing
    assert tracker.shift_KZ[0, 0] > 0 and tracker.shift_KZ[0, 1] == 0
    moved = tracker.shifted(chance, label)
    assert (moved[:, 0] > 0.5).all() and moved[0, 1] > 0.2 and moved[1, 1] == pytest.approx(0.6)


def test_counts_of_a_prompt_fade_and_are_kept(tmp_path):
    tracker = Tracker(1)
    chance, label, present = torch.full((1, 1), 0.5), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1).bool()
    tracker.add([7], chance, label, torch.ones(1, 1), present)
    tracker.shift_KZ.zero_()
    joined = lambda t: t.joined(torch.tensor([0.5, 0.5]), [7, 8]).tolist()  # noqa: E731
    assert joined(tracker) == pytest.approx([(1 + 1) / 3, 0.5])
    tracker.add([8], chance, label, torch.ones(1, 1), ~present)
    assert joined(tracker) == pytest.approx([(DECAY + 1) / (DECAY + 2), 0.5])
    values = StateValues(ConstantChances(((0.5, 0.5),)), 1.0, tracker=tracker, first={7: 0.25})
    values.save(tmp_path)
    again = StateValues.load(tmp_path)
    assert again.tracker is not None and joined(again.tracker) == joined(tracker)
    assert again.first == {7: 0.25} and again.kappa == 1.0


def test_a_critic_learns_what_the_policy_earns(tmp_path):
    generator = torch.Generator().manual_seed(0)
    critic, direction = Critic(8, 1, 0), torch.randn(8, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(64, dtype=torch.long)

    def states():
        hidden = torch.randn(64, 8, generator=generator)
        return hidden, torch.where(hidden @ direction > 0, 0.7, 0.4)

    errors = []
    for _ in range(60):
        hidden, target = states()
        errors.append(critic.update(hidden, nothing, nothing, target))
    assert errors[0] == pytest.approx((0.55**2 + 0.15**2), abs=0.06)  # V is 0 before anything was seen
    assert errors[3] < 0.03 and errors[-1] < 0.5 * 0.15**2
    critic.save(tmp_path)
    again = Critic.load(tmp_path)
    hidden, target = states()
    one, two = (c.update(hidden, nothing, nothing, target + 1) for c in (critic, again))
    assert one == two
    assert torch.equal(critic.values(hidden, nothing, nothing), again.values(hidden, nothing, nothing))


def test_rows_are_those_that_were_solved_as_often_as_asked(tmp_path):
    from datasets import Dataset

    from astarpo.trainer import AStarPOConfig, ValueOptions

    rewards = [[float(n < k) for n in range(4)] for k in range(5)]
    rows = Dataset.from_list([{"prompt": str(k), "reference_rewards": row} for k, row in enumerate(rewards)])

    def args(**settings):
        return AStarPOConfig(str(tmp_path), bf16=False, num_value_samples=4, **settings)

    def kept(values=ValueOptions(), rows=rows, **settings):  # noqa: B008
        return kept_rows(with_values(rows, args(), values), args(**settings), values)["prompt"]

    assert list(kept()) == ["0", "1", "2", "3", "4"]
    assert list(kept(ValueOptions(solved_between=[1, 3]))) == ["1", "2", "3"]
    assert list(kept(filter_all_incorrect=True)) == list(kept(ValueOptions(solved_between=[1, 4])))
    with pytest.raises(ValueError, match="No prompt was solved between 4 and 4 times in 4"):
        kept(ValueOptions(solved_between=[4, 4]), rows.select([1, 2]))
    graded = Dataset.from_list([{"prompt": "a", "reference_rewards": [0.5, 1.0, 0.0, 0.0]}])
    with pytest.raises(ValueError, match="not all 0 or 1"):
        with_values(graded, args(), ValueOptions(value_tracking=True))


def test_a_network_is_kept_and_taken_again(tmp_path):
    network = ValueNetwork(4, 1)
    StateValues(ConstantChances(((0.5, 0.5),)), 1.0, network, (False,)).save_network(tmp_path)
    assert not list(tmp_path.iterdir())  # it won nowhere
    StateValues(ConstantChances(((0.5, 0.5),)), 1.0, network, (True,)).save_network(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["value_network.safetensors"]
