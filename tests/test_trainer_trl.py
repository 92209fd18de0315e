"""`AStarPOTrainer` as a user of `GRPOTrainer` meets it: construction, training, evaluation, resuming, saving."""

import inspect
import logging
import math
from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, RepoUrl
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from trl_helpers import (
    StopAfter,
    chat_rows,
    completions_table,
    config,
    every_trained_parameter_changes,
    load_model,
    logged,
    make,
    parameters,
    plain_rows,
    text_of,
    vowels,
)

from astarpo.rollout import EngineOptions, ReferencePool
from astarpo.trainer import AStarPOConfig, AStarPOTrainer

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
ROWS = {"chat": chat_rows(), "plain": plain_rows()}


def lora(**settings: Any) -> dict[str, Any]:
    return {"peft_config": LoraConfig(**{**LORA, **settings})}


class Watch(TrainerCallback):
    """Counts the events of a run."""

    def __init__(self):
        self.events: Counter[str] = Counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.events["train_begin"] += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.events["step_end"] += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.events["evaluate"] += 1
        assert "eval_reward" in kwargs["metrics"]

    def on_log(self, args, state, control, **kwargs):
        self.events["log"] += 1
        assert kwargs["logs"]

    def on_save(self, args, state, control, **kwargs):
        self.events["save"] += 1

    def on_train_end(self, args, state, control, **kwargs):
        self.events["train_end"] += 1
        assert all(kwargs[name] is not None for name in ("model", "processing_class", "optimizer", "train_dataloader"))


# Construction


def test_minimal(tiny_model, tmp_path, monkeypatch):
    """Only a model, a reward and a data set, as in TRL's quick start; the engine that can do without vLLM keeps it short."""
    monkeypatch.chdir(tmp_path)
    trainer: Any = AStarPOTrainer(
        model=tiny_model,
        reward_funcs=vowels,
        train_dataset=chat_rows().remove_columns("reference_rewards"),
        engine_options=EngineOptions(engine="transformers"),
    )
    assert isinstance(trainer.args, AStarPOConfig)
    assert trainer.args.output_dir.endswith("-AStarPO")
    assert trainer.processing_class.eos_token == "<|im_end|>"


def test_arguments_stand_in_the_order_of_grpo_trainer():
    from trl import GRPOTrainer

    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = inspect.signature(AStarPOTrainer.__init__).parameters
    positional = [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert set(theirs) <= set(positional)
    assert [name for name in positional if name in theirs] == theirs


def test_by_position(tiny_model, tmp_path, tokenizer):
    trainer: Any = AStarPOTrainer(
        tiny_model, [vowels], config(tmp_path), chat_rows(), chat_rows(2), tokenizer, None, [Watch()], (None, None)
    )
    assert len(trainer.train_dataset) == 8
    assert len(trainer.eval_dataset) == 2
    assert trainer.processing_class is tokenizer


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_what_a_completion_of_one_turn_has_no_use_for_is_refused(tiny_model, tmp_path, name):
    value = [print] if name == "tools" else print
    with pytest.raises(ValueError, match=name) as refusal:
        make(tiny_model, tmp_path, trainer={name: value})
    assert "\n" not in str(refusal.value)


def test_a_ready_peft_model_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="peft_config"):
        make(get_peft_model(load_model(tiny_model), LoraConfig(**LORA)), tmp_path)


def test_a_streaming_data_set_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"IterableDataset|streaming"):
        make(tiny_model, tmp_path, chat_rows().to_iterable_dataset())


def test_another_configuration_is_refused(tiny_model, tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="AStarPOConfig"):
        AStarPOTrainer(tiny_model, vowels, TrainingArguments(str(tmp_path), use_cpu=True), chat_rows())  # pyright: ignore


def test_code_that_comes_with_a_model_is_refused(tiny_model, tmp_path):
    """TRL's scripts set this after the configuration is made."""
    args = config(tmp_path)
    args.model_init_kwargs = {"trust_remote_code": True}
    with pytest.raises(ValueError, match="trust_remote_code"):
        AStarPOTrainer(tiny_model, vowels, args, chat_rows())
    args.model_init_kwargs = {"trust_remote_code": False, "dtype": "float32"}
    AStarPOTrainer(tiny_model, vowels, args, chat_rows())


def test_a_data_set_without_prompts_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="`prompt`"):
        make(tiny_model, tmp_path, chat_rows().rename_column("prompt", "question"))


def test_a_tokenizer_without_a_padding_token(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = None
    trainer = make(tiny_model, tmp_path, trainer={"processing_class": tokenizer})
    with every_trained_parameter_changes(trainer):
        trainer.train()
    assert tokenizer.pad_token == tokenizer.eos_token


# Training


@pytest.mark.parametrize("given", ["name", "instance"])
@pytest.mark.parametrize("prompts", ROWS)
def test_training(tiny_model, tmp_path, prompts, given):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return vowels(completions)

    trainer = make(tiny_model if given == "name" else load_model(tiny_model), tmp_path, ROWS[prompts], reward)
    with every_trained_parameter_changes(trainer):
        output = trainer.train()
    assert math.isfinite(output.training_loss)
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    prompt, completion = seen[0]
    if prompts == "plain":
        assert isinstance(prompt, str) and isinstance(completion, str)
    else:
        assert prompt[0]["role"] == "user"
        assert [message["role"] for message in completion] == ["assistant"]


def test_the_log_has_the_names_of_grpo(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, max_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    own = {"kl", "v_star", "no_signal"}
    shared = {"loss", "grad_norm", "learning_rate", "reward", "reward_std", "entropy", "num_tokens", "epoch", "step"}
    functions = {"rewards/vowels/mean", "rewards/vowels/std"}
    lengths = {f"completions/{name}_length" for name in ("mean", "min", "max")}
    terminated = {f"completions/{name}_terminated_length" for name in ("mean", "min", "max")}
    assert own | shared | functions | lengths | terminated | {"completions/clipped_ratio"} <= set(entry)
    assert float(entry["reward"]) == pytest.approx(float(entry["rewards/vowels/mean"]))
    assert float(entry["completions/mean_length"]) <= 8
    assert logged(trainer, "num_tokens")[1] > logged(trainer, "num_tokens")[0] > 0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
    ids=str,
)
def test_type_of_the_weights(tiny_model, tmp_path, asked, expected):
    init = None if asked is None else {"dtype": asked}
    trainer = make(tiny_model, tmp_path, model_init_kwargs=init, learning_rate=0.1)
    assert trainer.model.dtype == expected
    before = parameters(trainer.model)
    trainer.train()
    assert any(not torch.equal(value, trainer.model.get_parameter(name)) for name, value in before.items())


def test_mixed_precision(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, bf16=True)
    with every_trained_parameter_changes(trainer):
        trainer.train()
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]], ids=str)
def test_an_adapter(tiny_model, tmp_path, targets):
    trainer = make(tiny_model, tmp_path, trainer=lora(target_modules=targets), max_steps=2)
    assert isinstance(trainer.model, PeftModel)
    with every_trained_parameter_changes(trainer):
        trainer.train()


def test_an_adapter_on_an_instance(tiny_model, tmp_path):
    trainer = make(load_model(tiny_model), tmp_path, trainer=lora(), max_steps=2)
    with every_trained_parameter_changes(trainer):
        trainer.train()


def test_dropout_of_an_adapter_is_taken_as_none(tiny_model, tmp_path, caplog):
    """`ModelConfig` asks for 0.05 by default; sampling knows no dropout, so scoring has none either, and a line says so."""
    adapters = []
    for dropout in (0.0, 0.9):
        torch.manual_seed(0)
        given = lora(lora_dropout=dropout)
        with caplog.at_level(logging.INFO):
            trainer = make(tiny_model, tmp_path / str(dropout), trainer=given, max_steps=2)
        assert ("lora_dropout" in caplog.text) == (dropout > 0)
        trainer.train()
        adapters.append(parameters(trainer.model, True))
        assert given["peft_config"].lora_dropout == dropout, "the caller's own object stays as it is"
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=lambda value: f"reentrant-{value}")
def test_gradient_checkpointing(tiny_model, tmp_path, adapter, reentrant):
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    trainer = make(
        tiny_model,
        tmp_path,
        trainer=lora() if adapter else None,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=kwargs,
        max_steps=2,
    )
    with every_trained_parameter_changes(trainer):
        trainer.train()


def test_gradient_accumulation_is_one_update(tiny_model, tmp_path):
    """Four rows at once, or one after another: the same completions and the same update."""
    after = []
    for rows, passes in ((4, 1), (1, 4)):
        folder = tmp_path / str(rows)
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
        trainer = make(tiny_model, folder, plain_rows(), optim="sgd", learning_rate=0.1, **sizes)
        trainer.train()
        after.append((completions_table(folder), parameters(trainer.model), logged(trainer, "reward")))
    (table, model, rewards), (other_table, other_model, other_rewards) = after
    assert len(table) == len(other_table) == 4
    assert sorted(table["completion"]) == sorted(other_table["completion"])
    assert rewards == pytest.approx(other_rewards)
    assert all(torch.allclose(value, other_model[name], atol=1e-5) for name, value in model.items())


@pytest.mark.parametrize(
    ("settings", "updates"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": -1, "num_train_epochs": 1}, 2),
        ({"max_steps": -1, "num_train_epochs": 2}, 4),
        ({"max_steps": -1, "num_train_epochs": 0.5}, 1),
        ({"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2}, 1),
    ],
    ids=str,
)
def test_length_of_a_run(tiny_model, tmp_path, settings, updates):
    trainer = make(tiny_model, tmp_path, plain_rows(), **settings)
    trainer.train()
    assert trainer.state.global_step == updates
    assert trainer.state.epoch == pytest.approx(updates * 4 * trainer.args.gradient_accumulation_steps / 8)


@pytest.mark.parametrize("shuffle", [True, False])
def test_order_of_prompts(tiny_model, tmp_path, shuffle):
    numbers = []

    def reward(completions, solution, **kwargs):
        numbers.extend(int(text) for text in solution)
        return vowels(completions)

    make(tiny_model, tmp_path, plain_rows(12), reward, shuffle_dataset=shuffle, max_steps=3).train()
    assert sorted(numbers) == list(range(1, 13)), "each prompt once an epoch"
    assert (numbers == sorted(numbers)) != shuffle


def test_the_seed_decides(tiny_model, tmp_path):
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(tiny_model, tmp_path / name, plain_rows(), shuffle_dataset=False, seed=seed).train()
        written.append(list(completions_table(tmp_path / name)["completion"]))
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"beta1": 0.1, "beta2": 0.01},
        {"max_grad_norm": 0.1, "weight_decay": 0.1, "warmup_steps": 1, "lr_scheduler_type": "cosine", "max_steps": 3},
        {"optim": "adafactor"},
        {"torch_empty_cache_steps": 1},
        {"logging_steps": 0.5, "max_steps": 2},
        {"num_generations": 4, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5},
        {"max_prompt_length": 100},
        {"dataloader_num_workers": 0, "dataloader_pin_memory": False},
        {"logging_strategy": "no"},
        {"include_num_input_tokens_seen": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_settings_that_scripts_have(tiny_model, tmp_path, settings):
    trainer = make(tiny_model, tmp_path, **settings)
    with every_trained_parameter_changes(trainer):
        trainer.train()


def test_a_head_in_float32(tiny_model, tmp_path):
    """As in TRL, for models whose head is not their embedding."""
    shape = AutoConfig.from_pretrained(tiny_model, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    trainer = make(model, tmp_path, cast_lm_head_to_fp32=True)
    head, embedding = trainer.model.get_output_embeddings().weight, trainer.model.get_input_embeddings().weight
    assert (head.dtype, embedding.dtype) == (torch.float32, torch.bfloat16)
    before = head.detach().clone()
    trainer.train()
    assert not torch.equal(before, head)
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32"):
        make(tiny_model, tmp_path, cast_lm_head_to_fp32=True)


def test_a_prompt_above_max_prompt_length_is_refused(tiny_model, tmp_path):
    with pytest.warns(UserWarning, match="max_prompt_length"), pytest.raises(ValueError, match="max_prompt_length"):
        make(tiny_model, tmp_path, max_prompt_length=5)


def test_optimizers_that_are_given(tiny_model, tmp_path):
    model = load_model(tiny_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make(model, tmp_path, trainer={"optimizers": (optimizer, scheduler)}, max_steps=3)
    with every_trained_parameter_changes(trainer):
        trainer.train()
    assert [float(rate) for rate in logged(trainer, "learning_rate")][1:] == pytest.approx([0.025, 0.0125])


def test_callbacks(tiny_model, tmp_path):
    """One that is made already, one by its class, one added later."""
    given, late = Watch(), Watch()

    class Early(Watch):
        pass

    trainer = make(
        tiny_model,
        tmp_path,
        trainer={"callbacks": [given, Early], "eval_dataset": chat_rows(2)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    trainer.add_callback(late)
    trainer.train()
    assert given.events == late.events
    expected = {"train_begin": 1, "step_end": 2, "evaluate": 2, "save": 1, "train_end": 1}
    assert {name: given.events[name] for name in expected} == expected
    assert given.events["log"] >= 4
    assert trainer.pop_callback(Early).events == given.events


# Prompts


def test_system_prompts_and_earlier_turns(tiny_model, tmp_path):
    conversation = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is 1 plus 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 plus 2?"},
    ]
    rows = chat_rows(4, system="Answer briefly.").to_list()
    rows[0]["prompt"] = conversation
    roles = []

    def reward(prompts, completions, **kwargs):
        roles.extend([message["role"] for message in prompt] for prompt in prompts)
        return vowels(completions)

    make(tiny_model, tmp_path, Dataset.from_list(rows), reward).train()
    assert sorted(roles) == [["system", "user"]] * 3 + [["system", "user", "assistant", "user"]]


def test_chat_template_kwargs_reach_the_template(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{% if not thinking %}{{ raise_exception('no kwargs') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    with pytest.raises(Exception, match="no kwargs"):
        make(tiny_model, tmp_path, trainer={"processing_class": tokenizer}).train()
    trainer = make(
        tiny_model, tmp_path, trainer={"processing_class": tokenizer}, chat_template_kwargs={"thinking": True}
    )
    with every_trained_parameter_changes(trainer):
        trainer.train()


def test_messages_need_a_chat_template(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        make(tiny_model, tmp_path, trainer={"processing_class": tokenizer})
    make(tiny_model, tmp_path, plain_rows(), trainer={"processing_class": tokenizer}).train()


@pytest.mark.parametrize("prompts", ROWS)
def test_the_reference_is_sampled_where_nothing_is_known_of_it(tiny_model, tmp_path, prompts):
    rows = ROWS[prompts].remove_columns("reference_rewards").select(range(4))
    trainer = make(tiny_model, tmp_path, rows, num_value_samples=2)
    with every_trained_parameter_changes(trainer):
        trainer.train()
    pool = ReferencePool.open(tmp_path / "reference_pool")
    assert len(pool.samples) == 8
    assert all(0 <= value <= 1 for value in pool.values(0.5).values())
    again = make(tiny_model, tmp_path / "again", ROWS[prompts])
    again.train()
    assert not (tmp_path / "again" / "reference_pool").exists()


# Evaluation


def test_evaluation_during_training(tiny_model, tmp_path):
    trainer = make(
        tiny_model,
        tmp_path,
        trainer={"eval_dataset": chat_rows(5)},
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        max_steps=2,
    )
    with every_trained_parameter_changes(trainer):
        trainer.train()
    assert len(logged(trainer, "eval_reward")) == 3
    for name in ("eval_rewards/vowels/mean", "eval_completions/mean_length", "eval_runtime"):
        assert len(logged(trainer, name)) == 3


def test_evaluation_on_several_sets(tiny_model, tmp_path):
    sets = {"short": plain_rows(3), "long": plain_rows(5)}
    trainer = make(
        tiny_model,
        tmp_path,
        plain_rows(),
        trainer={"eval_dataset": sets},
        eval_strategy="epoch",
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train()
    assert len(logged(trainer, "eval_short_reward")) == len(logged(trainer, "eval_long_reward")) == 1
    metrics = trainer.evaluate()
    assert {"eval_short_reward", "eval_long_reward", "eval_short_rewards/vowels/mean"} <= set(metrics)


def test_evaluate_before_training_on_another_set_and_by_another_name(tiny_model, tmp_path):
    graded = []

    def reward(completions, solution, **kwargs):
        graded.extend(solution)
        return vowels(completions)

    trainer = make(tiny_model, tmp_path, plain_rows(), reward, trainer={"eval_dataset": plain_rows(2)})
    before = parameters(trainer.model)
    metrics = trainer.evaluate()
    assert sorted(graded) == ["1", "2"]
    assert 0 <= metrics["eval_reward"] <= 1
    graded.clear()
    metrics = trainer.evaluate(plain_rows(3), metric_key_prefix="test")
    assert sorted(graded) == ["1", "2", "3"]
    assert "test_reward" in metrics
    assert all(torch.equal(value, trainer.model.get_parameter(name)) for name, value in before.items())


def test_several_completions_a_prompt_in_an_evaluation(tiny_model, tmp_path):
    seen = []

    def reward(completions, solution, **kwargs):
        seen.extend(zip(solution, completions, strict=True))
        return vowels(completions)

    trainer = make(
        tiny_model,
        tmp_path,
        plain_rows(),
        reward,
        trainer={"eval_dataset": plain_rows(2)},
        num_generations_eval=4,
    )
    metrics = trainer.evaluate()
    assert sorted(solution for solution, _ in seen) == ["1"] * 4 + ["2"] * 4
    assert len(set(seen)) > 4, "they are different completions"
    assert metrics["eval_reward"] == pytest.approx(sum(vowels([text for _, text in seen])) / 8, abs=1e-4)


def test_an_evaluation_set_without_reference_rewards(tiny_model, tmp_path):
    rows = plain_rows(3).remove_columns("reference_rewards")
    metrics = make(tiny_model, tmp_path, plain_rows(), trainer={"eval_dataset": rows}).evaluate()
    assert 0 <= metrics["eval_reward"] <= 1


def test_the_best_model_by_reward(tiny_model, tmp_path):
    trainer = make(
        tiny_model,
        tmp_path,
        plain_rows(),
        trainer={"eval_dataset": plain_rows(2), "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
        max_steps=3,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert trainer.state.best_metric == max(logged(trainer, "eval_reward"))
    saved = load_model(best)
    assert all(torch.equal(value, saved.get_parameter(name)) for name, value in parameters(trainer.model).items())


# Completions


@pytest.mark.parametrize("prompts", ROWS)
def test_log_completions(tiny_model, tmp_path, prompts, capsys):
    def noted(completions, log_extra, **kwargs):
        log_extra("length", [len(text_of(text)) for text in completions])
        return vowels(completions)

    def second(completions, **kwargs):
        return [0.5] * len(completions)

    trainer = make(
        tiny_model, tmp_path, ROWS[prompts], [noted, second], log_completions=True, num_completions_to_print=2
    )
    trainer.train()
    table = completions_table(tmp_path)
    assert list(table.columns[:3]) == ["step", "prompt", "completion"]
    assert {"noted", "second", "length", "advantage"} <= set(table.columns)
    assert len(table) == 4
    assert set(table["step"]) == {1}
    assert list(table["length"]) == [
        len(text if prompts == "plain" else text[0]["content"]) for text in table["completion"]
    ]
    v_star = float(logged(trainer, "v_star")[0])
    expected = [a + b - v_star for a, b in zip(table["noted"], table["second"], strict=True)]
    assert list(table["advantage"]) == pytest.approx(expected, abs=1e-3)
    shown = capsys.readouterr().out
    assert "What is" in shown or "plus 1 is" in shown
    assert "noted" in shown and "advantage" in shown


def test_completions_of_every_update_with_unique_prompts(tiny_model, tmp_path):
    rows = plain_rows(2)
    trainer = make(tiny_model, tmp_path, rows, log_completions=True, log_unique_prompts=True, max_steps=2)
    trainer.train()
    assert all(len(completions_table(tmp_path, step)) == 4 for step in (1, 2))


# Saving and resuming


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_save_and_load(tiny_model, tmp_path, adapter):
    trainer = make(tiny_model, tmp_path / "run", trainer=lora() if adapter else None, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded: Any = (
        PeftModel.from_pretrained(load_model(tiny_model), tmp_path / "saved")
        if adapter
        else load_model(tmp_path / "saved")
    )
    assert all(torch.equal(value, loaded.get_parameter(name)) for name, value in parameters(trainer.model).items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == trainer.processing_class.chat_template
    assert (tmp_path / "saved" / "training_args.bin").exists()
    trainer.save_state()
    assert (tmp_path / "run" / "trainer_state.json").exists()


@pytest.mark.parametrize("named", [False, True], ids=["newest", "by-path"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_resume(tiny_model, tmp_path, adapter, named):
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    further = lora() if adapter else {}
    torch.manual_seed(0)
    whole = make(tiny_model, tmp_path / "whole", trainer=further, **settings)
    whole.train()
    torch.manual_seed(0)
    make(tiny_model, tmp_path / "cut", trainer={**further, "callbacks": [StopAfter(2)]}, **settings).train()
    assert {path.name for path in (tmp_path / "cut").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}

    resumed = make(tiny_model, tmp_path / "cut", trainer=further, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1") if named else True)
    assert resumed.state.global_step == 3
    assert [entry["reward"] for entry in resumed.state.log_history if "reward" in entry] == logged(whole, "reward")
    after = parameters(resumed.model)
    assert all(torch.equal(value, after[name]) for name, value in parameters(whole.model).items())


def test_resume_without_a_checkpoint_of_that_name(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path)
    with pytest.raises(ValueError, match="checkpoint-7"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_save_total_limit(tiny_model, tmp_path):
    make(tiny_model, tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_loads_as_a_model(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, trainer=lora(), save_strategy="epoch", max_steps=-1, num_train_epochs=1)
    trainer.train()
    loaded: Any = PeftModel.from_pretrained(load_model(tiny_model), tmp_path / "checkpoint-2")
    assert all(torch.equal(value, loaded.get_parameter(name)) for name, value in parameters(trainer.model).items())


def test_the_model_card(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, trainer=lora())
    trainer.create_model_card(model_name="my-adapter", dataset_name="my-rows", tags=["arithmetic"])
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert all(text in card for text in ("my-adapter", "my-rows", "arithmetic", "trl", "A*-PO", "2505.20686"))


def test_push_to_hub(tiny_model, tmp_path, monkeypatch):
    """The hub is a list here: no hub can be reached."""
    pushed = []

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def upload_folder(self, *, repo_id, folder_path, **kwargs):
        files = {path.name: path.stat().st_size for path in type(tmp_path)(folder_path).iterdir() if path.is_file()}
        pushed.append((repo_id, files, (type(tmp_path)(folder_path) / "README.md").read_text(encoding="utf-8")))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    trainer = make(tiny_model, tmp_path / "math", trainer=lora(), hub_model_id="me/math")
    trainer.train()
    trainer.push_to_hub(dataset_name="my-rows")
    ((repo_id, files, card),) = pushed
    assert repo_id == "me/math"
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"} <= set(files)
    assert "A*-PO" in card and "my-rows" in card


# With vLLM


@pytest.mark.parametrize("prompts", ROWS)
def test_training_with_vllm(tiny_model, tmp_path, engine, prompts):
    trainer = make(
        tiny_model,
        tmp_path,
        ROWS[prompts],
        use_vllm=True,
        trainer={**lora(), "engine": engine, "eval_dataset": ROWS[prompts].select(range(2))},
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
    )
    with every_trained_parameter_changes(trainer):
        trainer.train()
    assert len(logged(trainer, "reward")) == 2
    assert len(logged(trainer, "eval_reward")) == 1
    assert all(float(gap) < 1e-3 for gap in logged(trainer, "engine/logp_gap"))
    trainer.close()


def test_the_whole_method_with_vllm(tiny_model, tmp_path, engine):
    """No reference rewards and several reward functions: what a GRPO user brings, and nothing else."""

    async def judged(completions, **kwargs):
        return [0.5] * len(completions)

    trainer = make(
        tiny_model,
        tmp_path,
        chat_rows(4).remove_columns("reference_rewards"),
        [vowels, judged],
        use_vllm=True,
        trainer={**lora(lora_dropout=0.05), "engine": engine},
        reward_weights=[1.0, 0.5],
        log_completions=True,
        num_value_samples=2,
        max_steps=2,
    )
    with every_trained_parameter_changes(trainer):
        trainer.train()
    assert (tmp_path / "reference_pool").is_dir()
    assert {"vowels", "judged"} <= set(completions_table(tmp_path, 2).columns)
    trainer.close()
