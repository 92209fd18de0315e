"""What the tests in TRL's manner share: toy data sets, configurations, rewards, and trainers as a TRL user makes them."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)

from astarpo.trainer import AStarPOConfig, AStarPOTrainer

# Each `train` ends with a full garbage collection (accelerate's `free_memory`), which takes as long as a toy update: it looks
# through whatever vLLM, torch and transformers have brought along. What is imported by now is kept out of it.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)

REFERENCE_REWARDS = [1.0, 0.0, 0.0, 1.0]


def chat_rows(count: int = 8, system: str | None = None) -> Dataset:
    """Conversational prompts, with what A*-PO needs to know of the reference."""
    before = [] if system is None else [{"role": "system", "content": system}]
    prompts = [[*before, {"role": "user", "content": f"What is {number} plus 1?"}] for number in range(count)]
    return _rows(prompts)


def plain_rows(count: int = 8) -> Dataset:
    """Prompts that are text."""
    return _rows([f"{number} plus 1 is" for number in range(count)])


def _rows(prompts: list[Any]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "solution": [str(number + 1) for number in range(len(prompts))],
            "reference_rewards": [REFERENCE_REWARDS] * len(prompts),
        }
    )


def text_of(completion: Any) -> str:
    """A completion's text, in either format."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def vowels(completions, **kwargs):
    """Share of vowels among six letters at most: a signal that a random model earns at times."""
    return [min(6, sum(letter in "aeiou" for letter in text_of(text).lower())) / 6 for text in completions]


def config(folder: Path | str, **settings: Any) -> AStarPOConfig:
    """A configuration with which an update takes a fraction of a second on the CPU."""
    return AStarPOConfig(
        **{
            "output_dir": str(folder),
            "bf16": False,
            "gradient_checkpointing": False,
            "max_completion_length": 8,
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "num_value_samples": len(REFERENCE_REWARDS),
            "require_eos": False,
            "use_vllm": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "model_init_kwargs": {"dtype": "float32"},
            **settings,
        }
    )


def make(
    model: Any,
    folder: Path | str,
    rows: Any = None,
    rewards: Any = vowels,
    *,
    trainer: Any = None,
    **settings,
) -> Any:
    """A trainer; `trainer` has further arguments of `AStarPOTrainer`, `settings` are fields of the configuration."""
    return AStarPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config(folder, **settings),
        train_dataset=chat_rows() if rows is None else rows,
        **(trainer or {}),
    )


def parameters(model: Any, trainable: bool | None = None) -> dict[str, torch.Tensor]:
    """Copies of a model's parameters; only those that are trained, or are not, where asked for."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if trainable is None or parameter.requires_grad == trainable
    }


@contextmanager
def every_trained_parameter_changes(trainer: Any) -> Iterator[None]:
    """Check that what happens inside trains each parameter that is to be trained, and no other."""
    trained, frozen = parameters(trainer.model, True), parameters(trainer.model, False)
    assert trained
    yield
    for name, before in trained.items():
        assert not torch.equal(before, trainer.model.get_parameter(name)), f"{name} has not changed."
    for name, before in frozen.items():
        assert torch.equal(before, trainer.model.get_parameter(name)), f"{name} has changed."


def logged(trainer: Any, key: str) -> list[Any]:
    """What was logged under a name, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def completions_table(folder: Path | str, step: int = 1):
    """What the policy wrote in an update, as the parquet file has it."""
    import pandas as pd

    return pd.read_parquet(Path(folder) / "completions" / f"completions_{step:05d}.parquet")


def load_model(folder: Path | str, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), **{"dtype": torch.float32, **kwargs})


def build_reward_model(folder: Path, tokenizer_of: str, *, has_pad_token: bool = True) -> str:
    """A tiny reward model with the tokenizer of another model, without a padding token if asked for."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_labels": 1}
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    if not has_pad_token:
        tokenizer.pad_token = None
    shape = Qwen2Config(**sizes, **heads, vocab_size=320, pad_token_id=tokenizer.pad_token_id)
    Qwen2ForSequenceClassification(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class StopAfter(TrainerCallback):
    """Ends training after an update, as an interruption does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
