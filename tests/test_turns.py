"""Options of turns, and the lagged residuals that centre V and scale the weights."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from second_try import KIND as SECOND_TRY

from astarpo.rollout import SINGLE, Pag
from astarpo.rollout.pag import episode_kind
from astarpo.trainer import TurnOptions
from astarpo.trainer.config import check_turns
from astarpo.trainer.residuals import LaggedResiduals, balanced, label_counts, residual_moments

pytestmark = pytest.mark.pag


def test_bad_options_name_the_fix():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"alpha": -1.0}, "alpha must be 0 or more"),
        ({"alpha": math.nan}, "alpha must be 0 or more"),
        ({"turn_weights": [1.0, 1.0]}, "one number of at least 0 for each turn"),
        ({"turn_weights": [1.0, -1.0, 1.0]}, "at least 0"),
        ({"turn_weights": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"turn_weights": [1.0, math.inf, 0.0]}, "one number of at least 0 for each turn"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            chosen = TurnOptions("pag", **options)
            check_turns(chosen, episode_kind(chosen, chosen.alpha))
    for name in ("role_weighting", "balance_labels", "centre_residuals"):
        with pytest.raises(ValueError, match=f"{name} has no effect on completions"):
            check_turns(TurnOptions(**dict[str, Any]({name: True})), SINGLE)
    with pytest.raises(ValueError, match="every turn of `second_try` is an answer"):
        check_turns(TurnOptions(balance_labels=True), SECOND_TRY)


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(0, 1), st.booleans()), min_size=1, max_size=20))
def test_lagged_moments_are_those_of_the_residuals(rows):
    residual = torch.tensor([[r, r / 2, -r] for r, _, _ in rows], dtype=torch.float64)
    labels = torch.tensor([[0, z, z] for _, z, _ in rows])
    present = torch.tensor([[True, p, p] for _, _, p in rows])
    lagged = LaggedResiduals(Pag())
    assert lagged.centre(labels).abs().sum() == 0 and lagged.weights(True).tolist() == [1.0, 1.0, 1.0]
    lagged.add(residual_moments(residual, labels, present))
    for turn in range(3):
        for label in (0, 1):
            here = (labels[:, turn] == label) & present[:, turn]
            wanted = residual[here, turn].mean().item() if here.any() else 0.0
            got = lagged.centre(torch.full((1, 3), label))[0, turn].item()
            assert got == pytest.approx(wanted, abs=1e-5)
    if present[:, 1].sum() > 1:
        spread = residual[present[:, 1], 1].std(correction=0).item()
        assert lagged.spread((1,), False) == pytest.approx(max(0.05, spread), abs=1e-5)


def test_centring_takes_the_labels_share_out_of_the_residual():
    """A V that knows neither the action nor the label leaves the label's share in the residual; a lagged centre takes it out."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (4000,))
    rewards = torch.where(labels == 1, 0.9, 0.1) + 0.05 * torch.randn(4000)
    residual = torch.stack([rewards] * 3, dim=1)
    label_BK = torch.stack([labels] * 3, dim=1)
    lagged = LaggedResiduals(Pag())
    lagged.add(residual_moments(residual, label_BK, torch.ones(4000, 3, dtype=torch.bool)))
    left = residual - lagged.centre(label_BK)
    assert left.mean().abs() < 1e-4 and left.std() < 0.2 * residual.std()
    assert lagged.spread((1,), True) < 0.2 * lagged.spread((1,), False)


def test_recipes_and_helpers_agree_on_turns():
    assert len(episode_kind(TurnOptions("pag")).roles) == 3 and episode_kind(TurnOptions()) is SINGLE
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"episode": "PAG"}, "no kind of episode `PAG`.*single or pag"),
        ({"episode": "pag", "verdict_parser": "Lenient"}, "strict, official, lenient"),
    ]
    for words, message in wrong:
        with pytest.raises(ValueError, match=message):
            episode_kind(TurnOptions(**words))


def test_balanced_labels_count_alike():
    """Whatever share of the attempts is right, always saying "wrong" (or "correct") is worth a half of what looking is."""
    labels = torch.stack([torch.zeros(40), *[(torch.arange(40) < 10).float()] * 2], dim=1).long()
    everywhere = torch.ones(40, 3, dtype=torch.bool)
    balance = balanced(Pag(), labels, label_counts(labels, everywhere))
    assert (balance[:, [0, 2]] == 1).all()
    weight_of = [balance[labels[:, 1] == z, 1].sum().item() for z in (0, 1)]
    assert weight_of == pytest.approx([20.0, 20.0])
    rare = torch.stack([torch.zeros(100), *[(torch.arange(100) < 1).float()] * 2], dim=1).long()
    assert balanced(Pag(), rare, label_counts(rare, torch.ones(100, 3, dtype=torch.bool))).max() == 5.0


def test_balance_counts_the_present_update_and_not_those_before_it(make, tmp_path):
    """While attempts improve, shares of earlier updates would let verifications of right attempts count 4 to 14 times as much."""
    trainer = make(tmp_path, {"balance_labels": True}, max_steps=1)
    history = torch.zeros(3, 3, 2, dtype=torch.float64)
    history[0, 1] = torch.tensor([30.0, 2.0])  # earlier, hardly an attempt was right
    trainer.residuals.add(history)
    labels = torch.stack([torch.zeros(32), *[(torch.arange(32) < 20).float()] * 2], dim=1).long()
    weights = trainer._turn_weights(labels, torch.ones(32, 3, dtype=torch.bool))
    assert [weights[labels[:, 1] == z, 1].sum().item() for z in (0, 1)] == pytest.approx([16.0, 16.0])
    trainer.train()
    right, wrong = (trainer.state.log_history[0][f"verify/mass_{name}"] for name in ("right", "wrong"))
    assert right == pytest.approx(wrong)
    trainer.close()
