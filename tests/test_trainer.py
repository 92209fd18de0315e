"""The real trainer with the real engine on the tiny model."""

import copy
import math
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import LORA, move, tiny_policy, toy_rows
from pag_model import REVISE, VERIFY
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl.experimental.a2po import A2POConfig, A2POTrainer

from astarpo.rollout import ReferencePool
from astarpo.rollout.engines.transformers_engine import TransformersEngine
from astarpo.rollout.evaluation import confidence_interval
from astarpo.rollout.values import optimal_values
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, TurnOptions
from astarpo.trainer.logprobs import TokenLogProbs
from astarpo.verifier import math_reward


def vowel_reward(completions, **kwargs):
    """Some signal that a random model earns at times."""
    return [float("a" in completion[0]["content"].lower()) for completion in completions]


def make_trainer(
    model, folder, dataset=None, *, lora=True, reward=vowel_reward, engine=None, eval_dataset=None, **settings
):
    settings = {
        "bf16": False,
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "num_value_samples": 4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_vllm": engine is not None,
        "require_eos": False,
        **settings,
    }
    return AStarPOTrainer(
        model,
        reward,
        AStarPOConfig(str(folder), **settings),
        toy_rows() if dataset is None else dataset,
        eval_dataset,
        peft_config=LoraConfig(**LORA) if lora else None,
        engine=engine,
    )


def batch(count=4, tokens=6, seed=0):
    """A batch as `compute_loss` receives it, with random tokens, masks and scores."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, tokens + 1, (count,), generator=generator)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(3, 259, (count, tokens), generator=generator)
    return {
        "prompt_ids": torch.randint(3, 259, (count, 5), generator=generator),
        "prompt_mask": torch.ones(count, 5, dtype=torch.long),
        "completion_ids": ids.masked_fill(mask == 0, 0),
        "completion_mask": mask,
        "ref_logps": -torch.rand(count, tokens, generator=generator) * 5,
        "turn_ids": mask,
        "rewards": torch.randint(0, 2, (count, 1), generator=generator).float(),
        "values": torch.rand(count, 1, generator=generator),
        "weights": torch.ones(count, 1),
    }


def gradients(trainer, inputs, num_episodes=4):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(num_episodes))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["inline", "adapter", "copied"])
def test_trains_by_every_way(way, request, tiny_model, tmp_path):
    name = {"inline": "engine", "adapter": "adapter_engine", "copied": "writable_engine"}[way]
    trainer = make_trainer(tiny_model, tmp_path, lora=way != "copied", engine=request.getfixturevalue(name))
    before = copy.deepcopy({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    trainer.train()
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if n in before)
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 3
    assert all(float(entry["engine/logp_gap"]) < 1e-3 for entry in logs)
    assert "frac_reward_zero_std" not in logs[0]
    assert float(logs[0]["v_star"]) == pytest.approx(0.5 * math.log((math.e**2 + 1) / 2), abs=1e-3)
    trainer.close()


@pytest.mark.parametrize("way", ["inline", "adapter", "copied"])
def test_training_stops_when_the_engine_is_left_behind(way, request, tiny_model, tmp_path, monkeypatch):
    name = {"inline": "engine", "adapter": "adapter_engine", "copied": "writable_engine"}[way]
    engine = request.getfixturevalue(name)
    words = "This prompt is longer than two blocks of the key-value cache. " * 5
    rows = toy_rows(4).map(lambda row: {"prompt": [{"role": "user", "content": words + row["solution"]}]})
    trainer = make_trainer(tiny_model, tmp_path, rows, lora=way != "copied", engine=engine, max_steps=4)
    if way == "inline":
        monkeypatch.setattr(engine, "reset_prefix_cache", lambda: None)
    else:
        link: Any = trainer.sampler.policy.link
        sync, left = link.sync, iter([True])
        monkeypatch.setattr(link, "sync", lambda: sync() if next(left, False) else False)
    try:
        with pytest.raises(RuntimeError, match="samples an old policy"):
            trainer.train()
    finally:
        monkeypatch.undo()
        trainer.close()
        engine.reset_prefix_cache()


def test_transformers_generation_and_defaults_work(tiny_model, tmp_path, monkeypatch):
    """The engine is then the trainer's own model, and samples follow from the prompt and the update alone."""
    trainer = make_trainer(tiny_model, tmp_path, max_steps=1)
    assert isinstance(trainer.engine, TransformersEngine)
    assert trainer.engine.model is trainer.model
    rows = [row for row in trainer.train_dataset]
    move(trainer.model)
    forwards, backwards = (trainer.make_batch(some, "train") for some in (rows, rows[::-1]))
    assert torch.equal(forwards["completion_ids"], backwards["completion_ids"].flip(0))
    gaps = (trainer._score(trainer.model, forwards, trainer._metrics["train"]) - forwards["sampling_logps"]).abs()
    assert gaps.max() < 1e-3, "completions are those of the policy, not of the reference"
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    monkeypatch.chdir(tmp_path)
    assert AStarPOConfig("x").use_vllm
    trainer.create_model_card(model_name="tiny")
    assert "2505.20686" in (tmp_path / "README.md").read_text()


def test_loss_equals_trl_a2po_on_the_same_tensors(tiny_model, tmp_path):
    """Theirs is the bare square, ours is divided by 2·β2; the rest is the same to rounding."""
    ours = make_trainer(tiny_model, tmp_path, lora=False)
    inputs = batch()
    config = A2POConfig(str(tmp_path), bf16=False, use_cpu=True, beta2=1e-3, report_to="none")
    policy = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = A2POTrainer(policy, vowel_reward, config, toy_rows(), processing_class=ours.tokenizer)
    theirs_inputs = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        "logits_to_keep": 6,
        "ref_logps": (inputs["ref_logps"] * inputs["completion_mask"]).sum(1),
        "rewards": inputs["rewards"][:, 0],
        "v_star": inputs["values"][:, 0],
    }
    model: Any = theirs.model
    their_loss = theirs.compute_loss(model, theirs_inputs)
    their_loss.backward()
    loss, grads = gradients(ours, inputs)
    assert loss * 2e-3 == pytest.approx(their_loss.item(), rel=1e-5)
    their_grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == their_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad * 2e-3, their_grads[name], atol=1e-6), name


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_equals_the_formula_of_the_authors_code(tiny_model, tmp_path, temperature):
    """ZhaolinGao/A-PO, without its undocumented entropy bonus: naive V*, logits over temperature, sums over tokens."""
    trainer = make_trainer(tiny_model, tmp_path, lora=False, temperature=temperature, beta1=0.25)
    move(trainer.model, 0.02)
    inputs = batch()
    offline_rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    naive_values = 0.25 * torch.log(torch.mean(torch.exp(offline_rewards / 0.25), dim=1))
    inputs["values"] = optimal_values(offline_rewards, 0.25).float()[:, None]
    assert torch.allclose(inputs["values"][:, 0], naive_values, atol=1e-6)
    loss, grads = gradients(trainer, inputs)

    trainer.model.zero_grad()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask, rows = inputs["completion_mask"], []
    for row, length in zip(ids, mask.sum(1) + 5, strict=True):  # prompts have 5 tokens
        logits = trainer.model(input_ids=row[None, :length]).logits[0, 4:-1] / temperature
        rows.append(logits.log_softmax(-1).gather(1, row[5:length, None]).sum())
    log_ratio = torch.stack(rows) - (inputs["ref_logps"] * mask).sum(1)
    authors_loss = ((1e-3 * log_ratio + naive_values - inputs["rewards"][:, 0]) ** 2).mean()
    authors_loss.backward()
    assert loss * 2e-3 == pytest.approx(authors_loss.item(), rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(grads[name] * 2e-3, parameter.grad, atol=2e-6), name


def test_loss_does_not_depend_on_padding_order_or_micro_batches(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path)
    move(trainer.model)
    inputs = batch()
    loss, grads = gradients(trainer, inputs)

    order = torch.tensor([2, 0, 3, 1])
    changed = {k: v[order] for k, v in inputs.items()}
    for key, side, value in (
        ("prompt_ids", (3, 0), 0),
        ("prompt_mask", (3, 0), 0),
        ("completion_ids", (0, 2), 0),
        ("completion_mask", (0, 2), 0),
        ("turn_ids", (0, 2), 0),
        ("ref_logps", (0, 2), 9.0),
    ):
        changed[key] = torch.nn.functional.pad(changed[key], side, value=value)
    other_loss, other = gradients(trainer, changed)
    assert other_loss == pytest.approx(loss, rel=1e-5)

    halves = [{k: v[i : i + 2] for k, v in inputs.items()} for i in (0, 2)]
    trainer.model.zero_grad()
    split_loss = 0.0
    for half in halves:
        part = trainer.compute_loss(trainer.model, half, num_items_in_batch=torch.tensor(4))
        part.backward()
        split_loss += part.item()
    assert split_loss == pytest.approx(loss, rel=1e-5)
    for name, parameter in trainer.model.named_parameters():
        if name in grads:
            assert torch.allclose(grads[name], other[name], rtol=1e-3, atol=1e-4), name
            assert torch.allclose(grads[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_a_sample_without_signal_changes_nothing(tiny_model, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path)
    move(trainer.model)
    inputs = batch()
    inputs["weights"] = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    loss, grads = gradients(trainer, inputs, 3)
    kept = torch.tensor([0, 2, 3])
    without_loss, without = gradients(trainer, {k: v[kept] for k, v in inputs.items()}, 3)
    assert loss == pytest.approx(without_loss, rel=1e-5)
    assert all(torch.allclose(grads[name], without[name], rtol=1e-3, atol=1e-4) for name in grads)


def test_end_of_sequence_is_scored_also_when_it_is_the_padding(tiny_model, tmp_path, engine):
    trainer = make_trainer(
        tiny_model, tmp_path, engine=engine, max_completion_length=40, per_device_train_batch_size=8
    )
    trainer.tokenizer.pad_token = trainer.tokenizer.eos_token
    eos = trainer.tokenizer.eos_token_id
    rows = [row for row in trainer.train_dataset] * 8
    output = trainer.make_batch(rows, "train")
    ended = 0
    for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert eos not in ids[: length - 1]
        ended += int(ids[length - 1] == eos)
    assert ended > 0
    trainer.close()


def test_truncated_completions_earn_nothing_and_none_is_no_signal(tiny_model, tmp_path, engine):
    def reward(completions, solution, **kwargs):
        return [None if text == "1" else 1.0 for text in solution]

    trainer = make_trainer(
        tiny_model, tmp_path, reward=reward, engine=engine, require_eos=True, max_completion_length=3
    )
    rows = [row for row in trainer.train_dataset]
    output = trainer.make_batch(rows, "train")
    eos = trainer.tokenizer.eos_token_id
    for row, ids, value, weight in zip(
        rows, output["completion_ids"], output["rewards"], output["weights"], strict=True
    ):
        has_signal = row["solution"] != "1"
        assert bool(weight) == has_signal
        assert value == (1.0 if has_signal and eos in ids else 0.0)
    assert output["present"].sum() == 7
    num_episodes = trainer.get_batch_samples(iter([rows]), 1, trainer.args.device)[1]
    assert num_episodes is not None and int(num_episodes) == 7, "the loss is a mean over the episodes with a signal"
    trainer.close()


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (toy_rows(2, rewards=(0.0, 0.0)), {"num_value_samples": 2}, "never solved any of the 2 prompts"),
        (toy_rows(2, rewards=(1.0,)), {}, "a prompt has 1"),
        (toy_rows(2).select([]), {}, "empty"),
    ],
)
def test_bad_training_sets_name_the_fix(tiny_model, tmp_path, dataset, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_model, tmp_path, dataset, **settings)


def test_missing_pool_and_ready_peft_model_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="--pool"):
        AStarPOTrainer(tiny_model, math_reward, AStarPOConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="peft_config"):
        AStarPOTrainer(tiny_policy(tiny_model), math_reward, AStarPOConfig(str(tmp_path)), toy_rows())


def test_a_prompt_above_the_limit_is_refused_not_truncated(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"longest prompt has \d+ tokens, max_prompt_length is 9"):
        make_trainer(tiny_model, tmp_path, max_prompt_length=9)


def test_filter_is_a_view(tiny_model, tmp_path):
    rows = concatenate_datasets([toy_rows(3), toy_rows(2, rewards=(0.0,) * 4)])
    assert len(make_trainer(tiny_model, tmp_path, rows).train_dataset) == 5
    assert len(make_trainer(tiny_model, tmp_path, rows, filter_all_incorrect=True).train_dataset) == 3
    assert len(rows) == 5


@pytest.mark.parametrize("has_values", [True, False])
def test_evaluation_reports_rewards_and_with_values_the_loss(tiny_model, tmp_path, engine, has_values):
    rows = toy_rows() if has_values else toy_rows().remove_columns("reference_rewards")
    trainer = make_trainer(tiny_model, tmp_path, engine=engine, eval_dataset=rows, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_reward"] <= 1
    assert (metrics["eval_loss"] > 0) == has_values
    assert metrics["eval_no_signal"] == (0 if has_values else 1)
    assert 0 <= metrics["eval_reward/ci95_low"] <= metrics["eval_reward"] <= metrics["eval_reward/ci95_high"] <= 1
    trainer.close()


def test_evaluation_by_several_completions_per_prompt(tiny_model, tmp_path, engine):
    rows = toy_rows(4)
    settings: dict[str, Any] = {"per_device_eval_batch_size": 8, "num_generations_eval": 4}
    trainer = make_trainer(tiny_model, tmp_path, engine=engine, eval_dataset=rows, **settings)
    rates = []

    def reward(completions, solution, **kwargs):
        rates.extend(solution)
        return [float(text == "1") if number % 4 else 0.0 for number, text in enumerate(solution)]

    trainer.reward_functions.functions[:] = [reward]
    metrics = trainer.evaluate()
    assert [solution for solution in rates if solution == "1"] == ["1"] * 4
    assert metrics["eval_reward"] == pytest.approx(3 / 16)
    low, high = confidence_interval([0.75, 0.0, 0.0, 0.0], 4)
    assert metrics["eval_reward/ci95_low"] == pytest.approx(low)
    assert metrics["eval_reward/ci95_high"] == pytest.approx(high)
    trainer.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_plain_softmax(temperature):
    torch.manual_seed(0)
    hidden = torch.randn(150, 8, requires_grad=True)
    weight, bias = torch.randn(50, 8, requires_grad=True), torch.randn(50, requires_grad=True)
    labels = torch.randint(0, 50, (150,))
    logps, entropy = TokenLogProbs.apply(hidden, weight, bias, labels, temperature)
    all_logps = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    expected = all_logps.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(logps, expected, atol=1e-5)
    assert torch.allclose(entropy, -(all_logps.exp() * all_logps).sum(-1), atol=1e-4)
    weights = torch.randn(150)
    ours = torch.autograd.grad((logps * weights).sum(), (hidden, weight, bias))
    theirs = torch.autograd.grad((expected * weights).sum(), (hidden, weight, bias), retain_graph=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))
    logps, entropy = TokenLogProbs.apply(hidden, weight, bias, labels, temperature)
    plain = -(all_logps.exp() * all_logps).sum(-1)
    for mine, other in (
        ((logps + entropy) * weights, (expected + plain) * weights),
        (entropy * weights, plain * weights),
    ):
        ours = torch.autograd.grad(mine.sum(), (hidden, weight, bias), retain_graph=True)
        theirs = torch.autograd.grad(other.sum(), (hidden, weight, bias), retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_a_policy_from_scratch_learns_a_solvable_task(tiny_model, tmp_path, engine):
    """Which half of the byte range to answer with depends on the prompt; the reference is right half of the time."""
    half = 130

    def reward(completion_ids, solution, **kwargs):
        return [float((ids[0] < half) == (text == "low")) for ids, text in zip(completion_ids, solution, strict=True)]

    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{kind} {i}"}],
                "solution": kind,
                "reference_rewards": [1.0, 0.0, 1.0, 0.0],
            }
            for i in range(16)
            for kind in ("low", "high")
        ]
    )
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        rows,
        reward=reward,
        engine=engine,
        max_steps=60,
        max_completion_length=1,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
    )
    trainer.train()
    rewards = [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[:3]) / 3 < 0.75
    assert sum(rewards[-5:]) / 5 >= 0.95
    trainer.close()


def test_pag_over_the_trainers_own_model_asks_the_judge_once_per_answer(guesser, tmp_path):
    """Stage 1 and two updates with `use_vllm=False`: a judge that costs money sees every answer exactly once."""
    asked: list[tuple[int, str]] = []

    def judge(completions, solution, trainer_state, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        asked.extend((trainer_state.global_step, text) for text in texts)
        return [float(f"\\boxed{{{gold}}}" in text) for text, gold in zip(texts, solution, strict=True)]

    rows = [{"prompt": [{"role": "user", "content": f"Guess {n}"}], "solution": str(n % 2)} for n in range(8)]
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=32,
        num_value_samples=2,
        learning_rate=1e-3,
        max_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
    )
    trainer = AStarPOTrainer(
        guesser,
        judge,
        AStarPOConfig(str(tmp_path), **settings),
        Dataset.from_list(rows),
        peft_config=LoraConfig(**LORA),
        episode_options=TurnOptions("pag", VERIFY, REVISE),
    )
    sample, sampled = trainer.sampler.sample, []

    def watching(*args):
        sampled.append(sample(*args))
        return sampled[-1]

    trainer.sampler.sample = watching  # pyright: ignore[reportAttributeAccessIssue]
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    trainer.close()
    pool = ReferencePool.open(tmp_path / "reference_pool")
    of_pool = [
        row["text"] for row in pool.read().to_pylist() if row["role"] != "verify" and row["finish_reason"] != "none"
    ]
    of_updates = [
        [turn.text for episode in episodes for turn in episode.turns if turn.role != "verify"] for episodes in sampled
    ]
    assert len(of_updates) == 2 and all(len(texts) > 8 for texts in of_updates), "some attempts were revised"
    assert sorted(asked[: len(of_pool)]) == sorted((0, text) for text in of_pool)
    assert asked[len(of_pool) :] == [(step, text) for step, texts in enumerate(of_updates) for text in texts]
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2 and all("revise/rate" in entry for entry in logs)
