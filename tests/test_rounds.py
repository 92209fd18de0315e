"""Rounds: training on completions that an earlier policy has sampled."""

import errno
import json
import math
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers import LORA, move, toy_rows
from pag_model import REVISE, VERIFY
from pag_run import PROBLEMS
from peft import LoraConfig
from safetensors.torch import load_file
from train_run import parity
from transformers import TrainerCallback

from astarpo.rollout import EngineOptions, ReferencePool
from astarpo.rollout.engines.inline import LiveLora
from astarpo.rollout.engines.policy_link import SavedLora
from astarpo.rollout.files import file_hash, write_text
from astarpo.rollout.pool import check_pool, writing
from astarpo.rollout.rounds import RoundFolder, agree, wait_for
from astarpo.rollout.values import optimal_values
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, RoundOptions, TurnOptions, ValueOptions
from astarpo.trainer.loss import turn_log_ratios
from astarpo.trainer.rounds import STORED, effective_share, lagged_policy, prompts_of_round, save_adapter, with_rounds
from astarpo.verifier import math_reward


def rounds_trainer(model, folder, *, rows=None, reward=parity, engine=None, rounds: Any = None, lora=LORA, **settings):
    rounds = {"rounds": 3, "updates_per_round": 2, "least_effective_share": 0.0} | (rounds or {})
    engine_options = settings.pop("engine_options", None)
    turns, values = settings.pop("turns", TurnOptions()), settings.pop("values", ValueOptions())
    settings = {
        "bf16": False,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_vllm": engine is not None or engine_options is not None,
        "require_eos": False,
        **settings,
    }
    return AStarPOTrainer(
        model,
        reward,
        AStarPOConfig(str(folder), **settings),
        toy_rows() if rows is None else rows,
        peft_config=LoraConfig(**lora),
        engine=engine,
        engine_options=engine_options,
        episode_options=turns,
        value_options=values,
        round_options=RoundOptions(**rounds),
    )


def test_a_run_of_rounds(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rounds/number" in entry]
    assert [entry["rounds/number"] for entry in logs] == [0, 0, 1, 1, 2, 2]
    assert [entry["rounds/age"] for entry in logs] == [0, 1] * 3
    # At the first update of a round the policy is the one that sampled it.
    assert all(abs(entry["kl"]) < 1e-6 for entry in logs[::2]) and all(entry["kl"] > 1e-6 for entry in logs[1::2])
    assert all(entry["rounds/effective_share"] > 0.999 for entry in logs[::2])
    assert all(entry["engine/logp_gap"] < 1e-4 for entry in logs)
    for number in range(3):
        pool = ReferencePool.open(tmp_path / "rounds" / f"round-{number:04d}" / "pool")
        assert pool.is_complete and pool.manifest.fingerprint["round"] == number
        assert (pool.manifest.fingerprint["adapter"] is None) == (number == 0)
    assert trainer._engine is not None


# --- exactness, in float64


DOUBLE = {"model_init_kwargs": {"dtype": "float64"}}
ALL = ValueOptions(solved_between=[0, 4])
"""Keeps groups whose completions all earned the same, so that small pools fill an update."""


def gradients(trainer, batch):
    """Loss and gradients of a batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(found, wanted):
    (loss, grads), (other_loss, other_grads) = found, wanted
    torch.testing.assert_close(loss, other_loss, rtol=1e-10, atol=0)
    scale = max(float(grad.abs().max()) for grad in other_grads.values())
    assert scale > 1e-6
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-10, atol=1e-10 * scale)


@pytest.fixture(scope="module")
def double_run(tiny_model, tmp_path_factory):
    """A finished run of three rounds in float64."""
    folder = tmp_path_factory.mktemp("double")
    trainer = rounds_trainer(tiny_model, folder, values=ALL, **DOUBLE)
    trainer.train()
    return folder


@pytest.mark.parametrize("is_moved", [False, True])
def test_round_0_is_todays_loss_on_the_same_episodes(tiny_model, tmp_path, double_run, is_moved):
    pool = str(double_run / "rounds" / "round-0000" / "pool")
    trainer = rounds_trainer(tiny_model, tmp_path / "rounds", values=ALL, pool=pool, **DOUBLE)
    rows = trainer._rows_of_round(4)
    episodes = [row[STORED].episode for row in rows]
    today = AStarPOTrainer(
        tiny_model,
        parity,
        AStarPOConfig(
            **{**trainer.args.to_dict(), "output_dir": str(tmp_path / "today"), "pool": None, "num_value_samples": 3}
        ),
        type(trainer.train_dataset).from_list(
            [{n: v for n, v in row.items() if n not in (STORED, "v_star")} for row in rows]
        ),
        peft_config=LoraConfig(**LORA),
    )

    def sample(prompts, seeds, on_turn=lambda: None):
        return [type(episode)(tuple(prompt), episode.turns) for prompt, episode in zip(prompts, episodes, strict=True)]

    today.sampler.sample = sample
    if is_moved:
        move(trainer.model)
        move(today.model)
    same = [today.train_dataset[row] for row in range(4)]
    assert_equal(
        gradients(trainer, trainer.make_batch(rows, "train")), gradients(today, today.make_batch(same, "train"))
    )


def round_of(model, folder, run, number):
    """A trainer that stands at the beginning of a round of a finished run, with the policy that sampled it; and the rows of an update."""
    trainer = rounds_trainer(model, folder, values=ALL, rounds={"rounds_dir": str(run / "rounds")}, **DOUBLE)
    trainer.round_progress.number = number
    rows = trainer._rows_of_round(4)
    saved = SavedLora.open(str(trainer._round.adapter)).layers()
    for name, live in LiveLora(trainer.model).layers().items():
        live.a.copy_(saved[name].a)
        live.b.copy_(saved[name].b)
    return trainer, rows


def log_probs(trainer, batch):
    return trainer.scorer(trainer.model, batch, 4, compute_entropy=False)[0]


def test_the_first_update_of_a_later_round_is_the_policy_gradient(tiny_model, tmp_path, double_run):
    trainer, rows = round_of(tiny_model, tmp_path, double_run, 2)
    batch = trainer.make_batch(rows, "train")
    found = gradients(trainer, batch)
    logps = log_probs(trainer, batch)
    ratios = turn_log_ratios(logps, batch["ref_logps"], batch["turn_ids"], 1)
    assert ratios.dtype == torch.float64 and ratios.abs().max() < 1e-12
    # The gradient of Σ (V̂ - r)·log π, by the definition of both.
    log_pi = torch.where(batch["turn_ids"] > 0, logps, 0.0).sum(1)
    rewards = torch.tensor([row[STORED].grades[0].reward for row in rows])
    rest = torch.tensor([row["reference_rewards"] for row in rows], dtype=torch.float64)
    values = optimal_values(rest, trainer.args.beta1).float()  # V̂ is kept in float32
    trainer.model.zero_grad()
    ((values.double() - rewards) * log_pi).mean().backward()
    wanted = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert_equal((torch.zeros(()), found[1]), (torch.zeros(()), wanted))


def test_the_second_update_of_a_round_is_the_regression_on_the_lagged_policy(tiny_model, tmp_path, double_run):
    trainer, rows = round_of(tiny_model, tmp_path, double_run, 2)
    before = log_probs(trainer, trainer.make_batch(rows, "train")).detach()
    move(trainer.model)  # what the first update did
    batch = trainer.make_batch(rows, "train")
    torch.testing.assert_close(batch["ref_logps"], before, rtol=1e-12, atol=1e-12)
    found = gradients(trainer, batch)
    beta2, written = trainer.args.beta2, batch["turn_ids"] > 0
    log_ratio = torch.where(written, log_probs(trainer, batch) - before, 0.0).sum(1)
    assert log_ratio.abs().min() > 1e-4
    loss = ((beta2 * log_ratio + batch["values"][:, 0] - batch["rewards"][:, 0]) ** 2 / (2 * beta2)).mean()
    trainer.model.zero_grad()
    loss.backward()
    assert_equal(
        found, (loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    )
    # What the engine's log-probs would change, which it computed in another order (and in float32 where it is vLLM).
    deviation = float(torch.where(written, batch["sampling_logps"] - before, 0.0).abs().max())
    assert deviation < 1e-5


def test_the_policy_is_back_after_the_lagged_one_was_used(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path)
    save_adapter(trainer.model, tmp_path / "adapter")
    move(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), lagged_policy(trainer.model, tmp_path / "adapter"):
        changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed and all("lora" in name for name in changed)
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_effective_share():
    assert effective_share(torch.zeros(8)) == pytest.approx(1)
    assert effective_share(torch.tensor([0.0, -60, -60, -60])) == pytest.approx(1 / 4)
    # Of weights 1, 1, 2: 16 / (3 · 6).
    assert effective_share(torch.tensor([0.0, 0.0, math.log(2)])) == pytest.approx(16 / 18)
    assert effective_share(torch.empty(0)) == 1


def test_prompts_of_rounds_follow_permutations():
    rounds = [prompts_of_round(number, 4, 10, seed=3) for number in range(5)]
    assert all(len(set(chosen)) == 4 for chosen in rounds)
    assert sorted(rounds[0] + rounds[1])[:1] and len(set(rounds[0] + rounds[1])) == 8
    assert set(rounds[2][:2]) == set(range(10)) - set(rounds[0] + rounds[1])
    assert prompts_of_round(7, 10, 10, seed=3) == list(range(10))


# --- engines, kinds of episode, options


def test_the_engine_is_ended_while_the_trainer_works(tiny_model, tmp_path, monkeypatch):
    """One copy of the weights, and an engine that is started anew for every round; adapter bytes as with an engine that stays."""
    adapters = []
    for closing, sharing in (("on", "on"), ("off", "off")):
        folder, states = tmp_path / closing, []
        trainer = rounds_trainer(
            tiny_model,
            folder,
            values=ALL,
            rounds={"close_engine": closing},
            engine_options=EngineOptions(engine="vllm", kv_cache_gb=0.05, max_num_seqs=16, share_base_weights=sharing),
        )
        inner = trainer.training_step

        def step(*args, inner=inner, trainer=trainer, states=states):
            states.append(trainer._engine is None)
            return inner(*args)

        monkeypatch.setattr(trainer, "training_step", step)
        trainer.train()
        assert states == [closing == "on"] * 6
        trainer.save_model(str(folder))
        trainer.close()
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-3, atol=1e-5)


def test_pag_episodes_in_rounds(guesser, guessing_engine, tmp_path):
    trainer = rounds_trainer(
        guesser,
        tmp_path,
        rows=Dataset.from_list([{"prompt": [dict(m) for m in p.messages], "solution": p.gold} for p in PROBLEMS]),
        reward=math_reward,
        engine=guessing_engine,
        rounds={"rounds": 3, "updates_per_round": 1, "num_samples": 4},
        turns=TurnOptions(episode="pag", verify_prompt=VERIFY, revise_prompt=REVISE, balance_labels=True),
        require_eos=True,
        max_completion_length=32,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all(math.isfinite(entry["loss"]) for entry in logs)
    assert [entry["rounds/number"] for entry in logs] == [0, 1, 2]
    pool = ReferencePool.open(tmp_path / "rounds" / "round-0002" / "pool")
    rows = pool.read(["role", "completion_ids", "logprobs", "finish_reason"]).to_pylist()
    assert {row["role"] for row in rows} == {"attempt", "verify", "revise"}
    assert all(len(row["completion_ids"]) == len(row["logprobs"]) for row in rows)


def test_stored_log_probs_save_the_pass_under_the_lagged_policy(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL, rounds={"lagged_logprobs": "stored"})
    trainer.train()
    batch = trainer.make_batch(trainer._round.rows[:4], "train")
    assert batch["ref_logps"] is batch["sampling_logps"]
    logs = [entry for entry in trainer.state.log_history if "rounds/number" in entry]
    assert len(logs) == 6 and all(abs(entry["kl"]) < 1e-5 for entry in logs[::2])
    assert "engine/logp_gap" not in logs[0]


class WeightsAfterUpdates(TrainerCallback):
    """Notes of each update whether it has moved the policy."""

    def __init__(self):
        self.has_moved: list[bool] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._before = {name: one.clone() for name, one in model.named_parameters() if one.requires_grad}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = dict(model.named_parameters())
        self.has_moved.append(any(not torch.equal(before, now[name]) for name, before in self._before.items()))


def test_the_guard_ends_a_round_early_and_the_last_one_ends_the_run(tiny_model, tmp_path):
    rounds = {"rounds": 2, "updates_per_round": 50, "num_iterations": 50, "least_effective_share": 0.6}
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL, rounds=rounds, learning_rate=3e-2)
    seen = WeightsAfterUpdates()
    trainer.add_callback(seen)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rounds/number" in entry]
    ends = [entry for entry in logs if entry["rounds/ended_early"]]
    # The update that the guard judged is not made, and the optimizer does not remember it.
    assert seen.has_moved == [entry not in ends for entry in logs]
    optimizer: Any = trainer.optimizer
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {len(logs) - len(ends)}
    assert [entry["rounds/number"] for entry in ends] == [0, 1] and logs[-1] is ends[-1]
    assert all((entry["rounds/effective_share"] < 0.6) == (entry in ends) for entry in logs)
    assert len(logs) < 100


def test_a_loss_scaler_needs_clipping_in_rounds(tmp_path):
    args = AStarPOConfig(str(tmp_path), bf16=False, max_grad_norm=0.0)
    args.fp16 = True  # the constructor takes it on a GPU only
    with pytest.raises(ValueError, match="`max_grad_norm=0` is refused in rounds: under fp16"):
        with_rounds(args, RoundOptions(rounds=2), ValueOptions(), LoraConfig())


def test_a_loss_scaler_takes_an_update_that_is_not_made():
    # What the guard does under fp16: transformers has unscaled the gradients by then, and the scaler must not miss them.
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    weight.grad = None
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, torch.ones(3)) and scaler.get_scale() == 8.0


def test_a_pool_made_beforehand_is_round_0(tiny_model, tmp_path):
    first = rounds_trainer(tiny_model, tmp_path / "first", values=ALL, rounds={"rounds": 1})
    first.train()
    pool = tmp_path / "first" / "rounds" / "round-0000" / "pool"
    before = (pool / "manifest.json").read_bytes()
    trainer = rounds_trainer(tiny_model, tmp_path / "second", values=ALL, rounds={"rounds": 2}, pool=str(pool))
    trainer.train()
    assert (pool / "manifest.json").read_bytes() == before
    assert [path.name for path in sorted((tmp_path / "second" / "rounds").glob("round-*/pool"))] == ["pool"]


# --- bad input: a defined outcome or one paragraph, and nothing lost


def edited(pool, **fields):
    manifest = json.loads((pool / "manifest.json").read_text())
    manifest["fingerprint"] |= fields
    (pool / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def finished(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL)
    trainer.train()
    return tmp_path / "rounds"


def again(model, tmp_path, number=2, reward=parity, **rounds):
    trainer = rounds_trainer(model, tmp_path, values=ALL, reward=reward, rounds=rounds)
    trainer.round_progress.number = number
    return trainer._rows_of_round(4)


def odd(completion_ids, **kwargs):
    return [float(len(ids) % 2) for ids in completion_ids]


def test_a_pool_of_another_policy_is_refused(tiny_model, tmp_path, finished):
    assert again(tiny_model, tmp_path)
    edited(finished / "round-0002" / "pool", adapter="local 1234")
    with pytest.raises(ValueError, match="sampled by another policy than the adapter of round 2"):
        again(tiny_model, tmp_path)


def test_a_pool_is_not_continued_with_another_policy(tiny_model, tmp_path, finished):
    """Half of a round by one policy and half by another would be the samples of neither."""
    pool = finished / "round-0002" / "pool"
    edited(pool, adapter="local 1234")
    manifest = json.loads((pool / "manifest.json").read_text())
    (pool / "manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL)
    trainer.round_progress.number, trainer.round_progress.is_over = 1, True
    with pytest.raises(ValueError, match=r"(?s)created with different settings:.*adapter: 'local 1234' in the pool"):
        trainer._rows_of_round(4)
    assert (pool / manifest["shards"][0]["file"]).is_file() or (pool / "quarantine").is_dir()


def test_a_lag_beyond_the_bound_is_refused(tiny_model, tmp_path, finished):
    edited(finished / "round-0002" / "pool", adapter=None, adapter_round=0)
    with pytest.raises(
        ValueError, match="was sampled by the adapter of round 0, and --lag 1 allows none older than that of round 1"
    ):
        again(tiny_model, tmp_path, lag=1)
    assert again(tiny_model, tmp_path, lag=2)


def test_another_reward_is_refused(tiny_model, tmp_path, finished):
    with pytest.raises(
        ValueError, match=r"graded by reward_functions=train_run.parity, training is set to test_rounds.odd"
    ):
        again(tiny_model, tmp_path, reward=odd)
    with pytest.raises(
        ValueError, match=r"(?s)holds the rounds of another run:.*reward_functions: \['train_run.parity'\] there"
    ):
        agree(RoundFolder(finished), rounds_trainer(tiny_model, tmp_path, reward=odd)._round_job().shared)


def test_stored_log_probs_that_are_not_there_are_refused(tiny_model, tmp_path, finished):
    edited(finished / "round-0002" / "pool", logprobs=False)
    with pytest.raises(ValueError, match=r"keeps no log-probs\. Set --lagged_logprobs recomputed"):
        again(tiny_model, tmp_path, lagged_logprobs="stored")
    assert again(tiny_model, tmp_path)


def test_check_finds_missing_log_probs(finished):
    pool = finished / "round-0001" / "pool"
    manifest = json.loads((pool / "manifest.json").read_text())
    shard = pool / manifest["shards"][0]["file"]
    table = pq.read_table(shard)
    column = pa.array([ids[:-1] for ids in table["logprobs"].to_pylist()], type=pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.get_field_index("logprobs"), "logprobs", column), shard)
    manifest["shards"][0] |= {"blake2b": file_hash(shard), "bytes": shard.stat().st_size}
    (pool / "manifest.json").write_text(json.dumps(manifest))
    assert [fault.problem for fault in check_pool(pool)] == ["does not have a log-prob for every token"]


def test_a_pool_that_is_being_written_is_waited_for(finished, caplog):
    """The trainer reads a round once all of it is there: the manifest of a pool that grows says that it is not."""
    folder = RoundFolder(finished)
    manifest = json.loads((folder.pool(2) / "manifest.json").read_text())
    whole, part = json.dumps(manifest), json.dumps({**manifest, "shards": []})
    (folder.pool(2) / "manifest.json").write_text(part)
    assert not folder.is_sampled(2)
    # Atomically, as a sampler does: half a manifest is never there.
    threading.Timer(1.0, lambda: write_text(folder.pool(2) / "manifest.json", whole)).start()
    wait_for(lambda: folder.is_sampled(2), "the samples of round 2")
    assert "waiting for the samples of round 2" in caplog.text


def test_a_full_disk_loses_nothing(tiny_model, tmp_path, monkeypatch):
    trainer = rounds_trainer(tiny_model, tmp_path, values=ALL, save_strategy="steps", save_steps=1)
    inner, calls = writing.write_parquet, []

    def full(path, table):
        calls.append(path)
        if "round-0001" in str(path) and "samples" in path.name and len(calls) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(path, table)

    monkeypatch.setattr(writing, "write_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    resumed = rounds_trainer(tiny_model, tmp_path, values=ALL, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=True)
    whole = rounds_trainer(tiny_model, tmp_path / "whole", values=ALL)
    whole.train()
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_nothing_to_learn_from_is_an_error_in_round_0(tiny_model, tmp_path):
    with pytest.raises(
        ValueError, match=r"Round 0: none of its 2 prompts has completions that earned different rewards"
    ):
        rounds_trainer(tiny_model, tmp_path, reward=lambda completions, **kwargs: [0.0] * len(completions)).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "at least 2"),
        ({"rounds": 0}, "at least 1"),
        ({"lag": -1}, "at least 0"),
        ({"part": "some"}, "Choose both, sampler, trainer"),
        ({"least_effective_share": 1.0}, "below 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RoundOptions(**{"rounds": 2, **options})


def test_an_unfinished_pool_is_no_round_0(tiny_model, tmp_path, finished):
    pool = finished / "round-0000" / "pool"
    manifest = json.loads((pool / "manifest.json").read_text())
    (pool / "manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    with pytest.raises(ValueError, match=r"has 0 of 8 samples. Run the same `astarpo-rollout` command again"):
        rounds_trainer(tiny_model, tmp_path / "second", pool=str(pool)).train()


def test_a_beta2_that_cannot_hold_a_round_is_said(tiny_model, tmp_path, caplog):
    rounds_trainer(tiny_model, tmp_path)
    assert "beta2=0.001 is too little to hold the policy" in caplog.text
    caplog.clear()
    rounds_trainer(tiny_model, tmp_path, beta2=0.3)
    rounds_trainer(tiny_model, tmp_path, rounds={"updates_per_round": 1})
    assert "beta2" not in caplog.text


def test_options_of_rounds_need_rounds():
    with pytest.raises(ValueError, match="`--lag` is for training in rounds"):
        RoundOptions(lag=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mismatch_correction": "sequence_mis"}, "`mismatch_correction` is refused in rounds"),
        ({"values": ValueOptions(value="critic")}, "`value=critic` is refused in rounds"),
        ({"values": ValueOptions(value_prior="network")}, "`value_prior=network` is refused in rounds"),
        (
            {"values": ValueOptions(value_tracking=True), "rounds": {"num_iterations": 2}},
            "`value_tracking` is refused in rounds: at its second use",
        ),
        ({"rounds": {"part": "sampler"}}, "A trainer cannot be the sampler"),
    ],
)
def test_options_that_rounds_refuse(tiny_model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        rounds_trainer(tiny_model, tmp_path, **settings)


# --- what an earlier run left


def test_rounds_of_another_run_are_refused_or_warned_of(tiny_model, tmp_path, finished, caplog):
    """`finished` is sampled to its end, so nothing but the check could tell."""
    with pytest.raises(ValueError, match=r"(?s)holds the rounds of another run:\n  seed: 42 there, 7 asked for"):
        rounds_trainer(tiny_model, tmp_path, values=ALL, rounds={"rounds_dir": str(finished)}, seed=7).train()
    assert "holds another policy" not in caplog.text
    other = rounds_trainer(tiny_model, tmp_path, values=ALL, rounds={"rounds_dir": str(finished)}, learning_rate=1e-3)
    other.train()
    assert f"`{finished / 'round-0001' / 'adapter'}` holds another policy than the one in training" in caplog.text


def test_rounds_are_deleted_and_nothing_else(finished):
    (finished / "notes.txt").write_text("mine")
    RoundFolder(finished).delete()
    assert [path.name for path in finished.iterdir()] == ["notes.txt"]


def test_parts_agree_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*paths):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", link)
    agree(RoundFolder(tmp_path / "rounds"), {"seed": 1})
    agree(RoundFolder(tmp_path / "rounds"), {"seed": 1})
    with pytest.raises(ValueError, match="seed: 1 there, 2 asked for"):
        agree(RoundFolder(tmp_path / "rounds"), {"seed": 2})
    assert [path.name for path in (tmp_path / "rounds").iterdir()] == ["rounds.json"]


def test_an_evaluation_before_round_0_needs_no_values(tiny_model, tmp_path):
    trainer = rounds_trainer(tiny_model, tmp_path, values=ValueOptions(value_tracking=True, solved_between=[0, 4]))
    held_out: Any = toy_rows()
    before = trainer.evaluate(held_out)
    assert 0 <= before["eval_reward"] <= 1
    trainer.train()
    assert 0 <= trainer.evaluate(held_out)["eval_reward"] <= 1
