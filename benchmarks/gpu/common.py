"""What the parts of the kit share: their options, models, problems, and our trainer at the sizes of the kit."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset
from peft import LoraConfig
from random_model import QWEN_1_5B, TINY, random_model

GB = 1e9


@dataclass(frozen=True, slots=True)
class Options:
    """What the kit is asked to do.

    Attributes:
        tiny (`bool`):
            Whether a part only shows that it works, on a tiny model; what it prints then says nothing of a GPU.
        model (`str`):
            Folder of a small chat model that learns and verifies (SmolLM2-135M-Instruct); without one those parts are left out.
        data (`str`):
            JSONL file of word problems with `problem` or `question` and `answer`; without one that part is left out.
        folder (`str`):
            Where random models are kept (3 GB).
        budget_gb (`float`):
            Hard cap of the parts that measure memory.
    """

    tiny: bool
    model: str
    data: str
    folder: str
    budget_gb: float

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return 16 if self.tiny else 256

    @property
    def completion(self) -> int:
        """Tokens of a completion."""
        return 8 if self.tiny else 512

    @property
    def batch(self) -> int:
        """Completions of an update."""
        return 4 if self.tiny else 32

    def count(self, full: int, tiny: int) -> int:
        """One number for a GPU and one to try the program with."""
        return tiny if self.tiny else full

    @property
    def dtype(self) -> str:
        """Type of the base weights."""
        return "float32" if self.tiny else "float16"

    def random(self, dtype: str | None = None) -> str:
        """A model of Qwen2.5-1.5B's shape with random weights, whose completions never end."""
        dtype = dtype or self.dtype
        sizes = TINY if self.tiny else QWEN_1_5B
        name = f"{'tiny' if self.tiny else 'qwen2.5-1.5b'}-random-{dtype}"
        return random_model(Path(self.folder) / name, sizes, getattr(torch, dtype))


class Skipped(Exception):
    """A part that cannot run here; the text says why."""


def on_gpu() -> bool:
    """Whether torch can use a GPU."""
    return torch.cuda.is_available()


def rows(options: Options, count: int) -> Dataset:
    """Prompts of `options.prompt` tokens of the random model."""
    return Dataset.from_list(
        [{"prompt": f"{i:04d} ".ljust(options.prompt, "x"), "solution": str(i)} for i in range(count)]
    )


def parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """A reward that random completions earn half of the time."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def lora() -> LoraConfig:
    """The adapter that all train."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def settings(options: Options, folder: str, updates: int, **changes: Any) -> dict[str, Any]:
    """What ours and TRL's trainers are told."""
    precision = {"fp16": True} if on_gpu() else {"use_cpu": True, "bf16": False}
    return {
        **{"output_dir": folder, "max_completion_length": options.completion, "max_steps": updates},
        **{"per_device_train_batch_size": options.batch, "learning_rate": 1e-5, "logging_steps": 1, "seed": 0},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "temperature": 1.0},
        "model_init_kwargs": {"dtype": options.dtype},
        **precision,
        **changes,
    }


def ours(options: Options, folder: str, updates: int, engine: dict[str, Any], **changes: Any) -> Any:
    """Our trainer on the random model.

    Args:
        options ([`Options`]):
            The kit's.
        folder (`str`):
            For the trainer's files.
        updates (`int`):
            Updates to train.
        engine (`dict[str, Any]`):
            Fields of [`EngineOptions`].
        changes:
            Fields of [`AStarPOConfig`].
    """
    from astarpo.rollout import EngineOptions
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer

    made = settings(options, folder, updates, **changes)
    dtype = made["model_init_kwargs"]["dtype"]
    return AStarPOTrainer(
        options.random(dtype),
        parity,
        AStarPOConfig(**made, max_prompt_length=options.prompt + 32, num_value_samples=2, require_eos=False),
        rows(options, options.batch * max(1, min(updates, 20))),
        peft_config=lora(),
        engine_options=EngineOptions(**({"kv_cache_gb": 0.05, "max_num_seqs": 8} if options.tiny else {}), **engine),
    )
