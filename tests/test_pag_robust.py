"""Training on PAG episodes when something is missing, refused, broken, or done in parts; and evaluation during training."""

import math
from typing import Any

import pytest
import torch
from helpers import changed_pool
from pag_run import PAG, batches, make_pool
from transformers import AutoTokenizer

from astarpo.rollout import SINGLE
from astarpo.rollout.episode import FollowUps
from astarpo.trainer.metrics import PassTotals
from astarpo.trainer.states import later_states

pytestmark = pytest.mark.pag

TURNS = ("attempt", "verify", "revise")


def test_what_cannot_train_is_refused_before_it_begins(make, guesser, guessing_engine, pool, tmp_path):
    single = make_pool(tmp_path / "single", guesser, guessing_engine, SINGLE)
    with pytest.raises(ValueError, match=r"sampled with episode='single', training is set to episode='pag'"):
        make(tmp_path, pool=str(single.folder))
    with pytest.raises(ValueError, match="verdict_parser='strict', training is set to verdict_parser='lenient'"):
        make(tmp_path, {"verdict_parser": "lenient"})
    with pytest.raises(ValueError, match="Name their pool"):
        make(tmp_path, pool=None, train_dataset=pool.to_dataset())
    long_pool = changed_pool(pool, tmp_path / "long", max_completion_length=200)
    too_long = make(tmp_path, max_completion_length=200, pool=str(long_pool.folder))
    with pytest.raises(ValueError, match="An episode may take"):
        too_long.train()
    too_long.close()
    partial = make(tmp_path, reward_funcs=lambda completions, **kwargs: [0.5] * len(completions))
    with pytest.raises(ValueError, match=r"earned 0\.5.*--episode single"):
        partial.train()
    partial.close()


def test_a_reward_without_signal_weighs_nothing(make, tmp_path):
    def sometimes(completions, **kwargs):
        return [None if "{0}" in text[0]["content"] else 1.0 for text in completions]

    trainer = make(tmp_path, reward_funcs=sometimes, max_steps=1)
    seen = batches(trainer)
    trainer.train()
    batch, episodes, _ = seen[0]
    for row, episode in enumerate(episodes):
        if "{0}" in episode.turns[0].text and not episode.turns[0].is_truncated:
            assert batch["weights"][row].tolist() == [0.0, 0.0, 0.0]
        elif len(episode.turns) == 3 and "{0}" in episode.turns[2].text:
            assert batch["weights"][row].tolist() == [1.0, 1.0, 0.0]
    trainer.close()


def test_pieces_and_micro_batches_make_the_same_update(make, tmp_path, caplog):
    """Two micro-batches, one of them in halves because memory ran out: adapter and moments of one pass."""
    options: dict[str, Any] = {"centre_residuals": True, "role_weighting": True, "balance_labels": True}
    ends = []
    ways: list[tuple[str, dict[str, Any]]] = [
        ("whole", {}),
        ("parts", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ]
    for name, settings in ways:
        trainer = make(tmp_path / name, options, optim="sgd", learning_rate=1e-3, **settings)
        if name == "parts":
            inner, failed = trainer.compute_loss, []

            def short_of_memory(model, inputs, *args, inner=inner, failed=failed, **kwargs):
                loss = inner(model, inputs, *args, **kwargs)
                if not failed and len(inputs["completion_ids"]) == 4:
                    failed.append(True)
                    raise torch.OutOfMemoryError("pretended")
                return loss

            trainer.compute_loss = short_of_memory
        trainer.train()
        trainer.close()
        state = {key: value.detach().clone() for key, value in trainer.model.named_parameters() if value.requires_grad}
        ends.append((state, trainer.residuals.moments, trainer.state.log_history))
    assert "Out of memory: from now on 2" in caplog.text
    (one, moments, log), (two, other_moments, other_log) = ends
    torch.testing.assert_close(moments, other_moments, atol=1e-3, rtol=1e-3)
    assert moments[0].sum() > 20
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-3, rtol=1e-2)
    assert log[0]["loss"] == pytest.approx(other_log[0]["loss"], rel=1e-3)


def test_a_broken_update_leaves_nothing_behind(make, tmp_path):
    trainer = make(tmp_path, {"centre_residuals": True}, max_steps=1)
    trainer.train()
    before = trainer.residuals.moments.clone()
    nan = torch.full((2, 3), torch.nan)
    batch = {
        **{name: torch.zeros(2, 3) for name in ("rewards", "values", "centres", "success", "weights")},
        **{name: torch.zeros(2, 3) for name in ("turn_ids", "sampling_logps")},
        **{"labels": torch.zeros(2, 3, dtype=torch.long), "present": torch.ones(2, 3, dtype=torch.bool)},
    }
    update, seen = PassTotals(0.0), PassTotals(0.0)
    seen.add(nan, torch.zeros(2, 3), torch.zeros(2, 3), batch, trainer.args.beta2)
    update.extend(seen, math.nan)
    trainer._end_update(update, trainer._metrics["train"])
    after = trainer.residuals.moments
    assert after.isfinite().all()
    torch.testing.assert_close(after, 0.9 * before)
    trainer.close()


def test_episodes_train_without_vllm(make, tmp_path):
    """With `generate` of transformers, from the trainer's own model."""
    trainer = make(tmp_path, engine=None, use_vllm=False, max_steps=1)
    seen = batches(trainer)
    trainer.train()
    batch, episodes, _ = seen[0]
    for row, episode in enumerate(episodes):
        revises = PAG.next_role(episode.turns[:2]) == "revise"
        assert batch["weights"][row].tolist() == [1.0, 1.0, float(revises)]
    log = trainer.state.log_history[0]
    assert log["kl"] == pytest.approx(0.0, abs=1e-6) and log["grad_norm"] > 0
    trainer.close()


def test_evaluation_in_episodes(make, pool, tmp_path):
    """Several episodes a problem, problems without reference samples, and nothing of it in the training's moments."""
    rows = pool.to_dataset().select(range(6)).remove_columns(["reference_rewards"])
    trainer = make(
        tmp_path,
        {"centre_residuals": True},
        eval_dataset=rows,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        max_steps=1,
    )
    trainer.train()
    moments = trainer.residuals.moments.clone()
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_reward/ci95_low"] <= metrics["eval_reward"] <= metrics["eval_reward/ci95_high"] <= 1
    assert {"eval_attempt/reward", "eval_verify/reward", "eval_verify/no_verdict", "eval_loss"} <= metrics.keys()
    assert math.isfinite(metrics["eval_loss"])
    assert torch.equal(trainer.residuals.moments, moments)
    trainer.close()


def test_a_pool_beside_rewards_is_checked_too(make, guesser, guessing_engine, pool, tmp_path):
    single = make_pool(tmp_path / "single", guesser, guessing_engine, SINGLE)
    with pytest.raises(ValueError, match="sampled with episode='single'"):
        make(tmp_path, pool=str(single.folder), train_dataset=single.to_dataset())
    with pytest.raises(ValueError, match="holds completions, no episodes"):
        follow_ups = FollowUps.render(AutoTokenizer.from_pretrained(guesser), PAG)
        later_states(single, PAG, follow_ups, lambda messages: [[0]] * len(messages))
