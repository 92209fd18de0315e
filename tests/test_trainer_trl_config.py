"""`AStarPOConfig` as a user of `GRPOConfig` meets it: what is taken, with or without a warning, and what is refused."""

import dataclasses
import inspect
import json
import os
import pickle
import warnings
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments
from trl import ModelConfig, ScriptArguments, TrlParser
from trl_helpers import config

from astarpo.trainer import AStarPOConfig

# With GRPO's default where it has the field.
SHARED = {
    "temperature": 1.0,
    "logging_steps": 10,
    "shuffle_dataset": True,
    "remove_unused_columns": False,
    "log_completions": False,
    "num_completions_to_print": None,
    "log_unique_prompts": False,
    "num_generations_eval": None,
    "reward_weights": None,
    "chat_template_kwargs": None,
    "cast_lm_head_to_fp32": False,
    "trust_remote_code": False,
}

# Each with a value that asks for another objective, or for another distribution to sample from.
REFUSED = [
    ("beta", 0.04),
    ("delta", 1.5),
    ("entropy_coef_max", 0.01),
    ("epsilon", 0.3),
    ("epsilon_high", 0.28),
    ("generation_batch_size", 64),
    ("importance_sampling_level", "sequence"),
    ("loss_type", "dr_grpo"),
    ("mask_truncated_completions", True),
    ("min_p", 0.1),
    ("num_iterations", 2),
    ("repetition_penalty", 1.1),
    ("scale_rewards", "group"),
    ("scale_rewards", True),
    ("steps_per_generation", 4),
    ("sync_ref_model", True),
    ("top_entropy_quantile", 0.2),
    ("top_k", 50),
    ("top_p", 0.9),
    ("trust_remote_code", True),
    ("vllm_importance_sampling_correction", True),
    ("vllm_server_base_url", "http://localhost:8000"),
]

# What scripts set although it says what A*-PO does anyway.
NEUTRAL = [
    ("beta", 0.0),
    ("num_iterations", 1),
    ("scale_rewards", False),
    ("scale_rewards", "none"),
    ("top_k", 0),
    ("top_p", 1.0),
    ("repetition_penalty", 1.0),
    ("mask_truncated_completions", False),
    ("sync_ref_model", False),
]


def test_it_is_training_arguments(tmp_path):
    args = AStarPOConfig(str(tmp_path), warmup_steps=3, seed=7)
    assert isinstance(args, TrainingArguments)
    assert (args.output_dir, args.warmup_steps, args.seed) == (str(tmp_path), 3, 7)


@pytest.mark.parametrize(("name", "default"), SHARED.items())
def test_defaults_are_those_of_grpo(tmp_path, name, default):
    assert getattr(AStarPOConfig(str(tmp_path)), name) == default


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: str(value))
def test_another_objective_is_refused_in_a_sentence(tmp_path, name, value):
    with pytest.raises(ValueError, match=name) as refusal:
        AStarPOConfig(str(tmp_path), **{name: value})
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(("name", "value"), NEUTRAL, ids=lambda value: str(value))
def test_a_value_that_changes_nothing_is_taken(tmp_path, name, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AStarPOConfig(str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("num_generations", 8, "one completion per prompt"),
        ("vllm_mode", "colocate", "engine"),
        ("max_prompt_length", 256, "error"),
    ],
)
def test_what_every_grpo_script_sets_is_taken_with_one_warning(tmp_path, name, value, instead):
    with pytest.warns(UserWarning, match=name) as caught:
        args = AStarPOConfig(str(tmp_path), **{name: value})
    told = [str(warning.message) for warning in caught if name in str(warning.message)]
    assert len(told) == 1
    assert instead in told[0]
    assert caught[0].filename == __file__, "it points to the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dataclasses.replace(args, max_prompt_length=None)  # told once, not again for a copy


def test_all_of_them_in_one_warning(tmp_path):
    script: dict[str, Any] = {
        "num_generations": 8,
        "vllm_mode": "colocate",
        "use_vllm": True,
    }
    with pytest.warns(UserWarning) as caught:
        args = AStarPOConfig(str(tmp_path), **script, max_prompt_length=256)
    told = [str(warning.message) for warning in caught if "num_generations" in str(warning.message)]
    assert len(told) == 1
    assert all(name in told[0] for name in ("vllm_mode", "max_prompt_length"))
    assert args.use_vllm
    assert args.max_prompt_length == 256


def test_no_warning_without_cause(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AStarPOConfig(str(tmp_path), use_vllm=True)


def test_every_field_of_grpo_config_is_known_by_name(tmp_path):
    """Whatever TRL is installed: no field of its configuration is answered with "unexpected keyword argument"."""
    from trl import GRPOConfig

    own = {field.name for field in dataclasses.fields(AStarPOConfig)}
    strangers = [field.name for field in dataclasses.fields(GRPOConfig) if field.init and field.name not in own]
    assert len(own & {field.name for field in dataclasses.fields(GRPOConfig)}) > 100
    assert strangers
    unnamed = []
    for name in strangers:
        try:
            config(tmp_path, **{name: "something else"})
        except ValueError as refusal:
            unnamed += [name] * (name not in str(refusal))
        except TypeError:
            unnamed.append(name)
    assert not unnamed


def test_a_misspelt_field_is_no_field(tmp_path):
    with pytest.raises(TypeError, match="num_generation"):
        AStarPOConfig(str(tmp_path), num_generation=4)  # pyright: ignore[reportCallIssue]


def test_help_lists_own_fields_with_a_text():
    parser = HfArgumentParser(AStarPOConfig)  # pyright: ignore[reportArgumentType]
    text = parser.format_help()
    assert "--beta2" in text and "--num_value_samples" in text
    own = {field.name: field for field in dataclasses.fields(AStarPOConfig)}
    assert all(own[name].metadata.get("help") for name in ("beta1", "beta2", "max_completion_length", "use_vllm"))


def test_it_is_copied_and_written_like_training_arguments(tmp_path):
    import torch

    args = config(tmp_path, model_init_kwargs={"dtype": torch.float32}, reward_weights=[1.0, 0.5])
    longer = dataclasses.replace(args, max_steps=9)
    assert (longer.max_steps, longer.reward_weights, args.max_steps) == (9, [1.0, 0.5], 1)
    written = json.loads(args.to_json_string())
    assert written["beta2"] == args.beta2
    assert written["model_init_kwargs"] == {"dtype": "float32"}
    assert args.to_sanitized_dict()["num_value_samples"] == 4
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    assert AStarPOConfig(**{**args.to_dict(), "hub_token": None}).to_dict() == args.to_dict()


def test_from_a_command_line(tmp_path):
    line = "--beta1 0.25 --reward_weights 1 0.5 --use_vllm false --num_train_epochs 2 --bf16 false"
    dictionaries = ["--model_init_kwargs", '{"dtype": "float32"}', "--chat_template_kwargs", '{"thinking": false}']
    (args,) = HfArgumentParser(AStarPOConfig).parse_args_into_dataclasses(  # pyright: ignore[reportArgumentType]
        ["--output_dir", str(tmp_path), *line.split(), *dictionaries]
    )
    assert (args.beta1, args.reward_weights, args.use_vllm, args.bf16) == (0.25, [1.0, 0.5], False, False)
    assert args.model_init_kwargs == {"dtype": "float32"}
    assert args.chat_template_kwargs == {"thinking": False}


@pytest.mark.parametrize(("name", "value"), [("epsilon", "0.3"), ("loss_type", "grpo"), ("beta", "0.04")])
def test_a_command_line_with_another_objective_is_refused_by_name(tmp_path, name, value, capsys):
    parser = TrlParser((ModelConfig, AStarPOConfig))  # pyright: ignore[reportArgumentType]
    line = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), f"--{name}", value]
    with pytest.raises((ValueError, SystemExit)) as refusal:
        parser.parse_args_and_config(line)
    assert name in f"{refusal.value}{capsys.readouterr().err}"


def test_from_a_recipe_of_trl_parser(tmp_path):
    """A YAML file as TRL's scripts take it; the command line goes before it."""
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "dataset_name": "trl-lib/DeepMath-103K",
        "use_peft": True,
        "lora_r": 8,
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 2.0e-5,
        "max_completion_length": 64,
        "num_generations": 8,
        "use_vllm": True,
        "vllm_mode": "colocate",
        "reward_weights": [1.0, 0.5],
        "bf16": False,
        "env": {"ASTARPO_TEST_RECIPE": "yes"},
    }
    recipe.write_text(yaml.safe_dump(settings))
    parser = TrlParser((ScriptArguments, AStarPOConfig, ModelConfig))  # pyright: ignore[reportArgumentType]
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="num_generations"):
        patch.setenv("ASTARPO_TEST_RECIPE", "no")  # and taken away again with what the recipe sets
        script, args, model = parser.parse_args_and_config(["--config", str(recipe), "--max_completion_length", "32"])
        assert os.environ["ASTARPO_TEST_RECIPE"] == "yes"
    assert (script.dataset_name, model.lora_r) == ("trl-lib/DeepMath-103K", 8)
    assert (args.learning_rate, args.max_completion_length, args.reward_weights) == (2e-5, 32, [1.0, 0.5])


def test_positional_output_dir_comes_first():
    assert next(iter(inspect.signature(AStarPOConfig).parameters)) == "output_dir"
