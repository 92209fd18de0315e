"""The three trainers that `benchmarks/trainer.py` compares, on one task, with one clock.

All train on divisions (factors from 2 to 20, 200 of 358 held out) with the same prompts, lengths and number of completions an update, and all are
evaluated by the same code. TRL's A*-PO trains all weights (it has no LoRA); GRPO trains the same LoRA as ours.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback

from astarpo.rollout import load_problems
from astarpo.trainer.division import write_problems
from astarpo.verifier import Verifier, math_reward

LARGEST, HELD_OUT, LENGTH = 20, 200, 24
PROMPTS_PER_UPDATE = 32
GENERATIONS = 8
DATA = Path("runs/benchmarks/data")


def lora() -> LoraConfig:
    """The adapter that ours and GRPO train."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def rows(which: str, options: argparse.Namespace, as_text: bool = False) -> Dataset:
    """The `train` problems, at most `options.rows`, or `heldout`; as text where a trainer cannot grade chat completions."""
    train_file, heldout_file = write_problems(DATA, LARGEST, HELD_OUT)
    problems = load_problems(str(train_file if which == "train" else heldout_file))
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def prompt(messages: Any) -> Any:
        chat = list(messages)
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) if as_text else chat

    chosen = problems[: options.rows] if which == "train" else problems
    return Dataset.from_list([{"prompt": prompt(p.messages), "solution": p.gold} for p in chosen])


class Phases:
    """Seconds by phase, and of whole updates."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.updates: list[float] = []
        self._is_inside = False

    def wrap(self, owner: Any, method: str, name: str | Callable[[], str]) -> None:
        """Count the seconds of a method of `owner` under `name`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:  # of phases within one another the outer one counts
                return inner(*args, **kwargs)
            phase = name if isinstance(name, str) else name()
            began, self._is_inside = time.perf_counter(), True
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[phase] += time.perf_counter() - began
                self._is_inside = False

        setattr(owner, method, timed)

    def forget(self) -> None:
        """Start anew, after warming up."""
        self.seconds.clear()
        self.updates.clear()

    def report(self) -> dict[str, Any]:
        """Median seconds of an update, and mean seconds by phase; `other` is what no phase covers."""
        count = len(self.updates)
        phases = {name: seconds / count for name, seconds in self.seconds.items()}
        phases["other"] = sum(self.updates) / count - sum(phases.values())
        return {
            "update_s": round(statistics.median(self.updates), 3),
            "updates_s": [round(seconds, 2) for seconds in self.updates],
            "phases_s": {name: round(seconds, 3) for name, seconds in phases.items()},
        }


class EachUpdate(TrainerCallback):
    """Calls back after every update with its seconds; what the call itself takes is not counted."""

    def __init__(self, call: Callable[[int, float], bool]):
        self._call = call
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell, and stop training when told to."""
        if self._call(state.global_step, time.perf_counter() - self._began):
            control.should_training_stop = True
        self._began = time.perf_counter()


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What all three trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": PROMPTS_PER_UPDATE,
        "max_completion_length": LENGTH,
        "temperature": 1.0,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "max_steps": options.updates,
        "seed": options.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def ours(options: argparse.Namespace, folder: str) -> Any:
    """Our trainer: bfloat16 weights, LoRA, the engine in process; stage 1 by the trainer itself."""
    from astarpo.rollout import EngineOptions
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer

    return AStarPOTrainer(
        options.model,
        args=AStarPOConfig(
            **settings(options, folder),
            num_value_samples=options.value_samples,
            model_init_kwargs={"dtype": "bfloat16", "attn_implementation": options.attention},
        ),
        train_dataset=rows("train", options),
        peft_config=lora(),
        engine_options=EngineOptions(kv_cache_gb=0.5, max_num_seqs=128),
    )


def a2po(options: argparse.Namespace, folder: str) -> Any:
    """`trl.experimental.a2po`: float32 weights with bfloat16 autocast, all of them trained."""
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")

    def reward(completions: list[str], solution: list[str | None], **kwargs: Any) -> list[float]:
        # It gives reward functions no token ids: a completion that was cut is told by its length.
        cut = [len(tokenizer(text)["input_ids"]) >= LENGTH for text in completions]
        graded = math_reward(prompts=completions, completions=completions, solution=solution)
        return [0.0 if is_cut else score or 0.0 for score, is_cut in zip(graded, cut, strict=True)]

    trainer = A2POTrainer(
        options.model,
        reward,
        A2POConfig(
            **settings(options, folder),
            bf16=True,
            num_value_samples=options.value_samples,
            model_init_kwargs=_float32(options),
            filter_all_incorrect=False,
        ),
        rows("train", options, as_text=True),
        processing_class=tokenizer,
    )
    _stop_at_end_of_turn(trainer)
    return trainer


def grpo(options: argparse.Namespace, folder: str) -> Any:
    """TRL's GRPO, 8 generations a prompt, by transformers: its weight push fails on vLLM's CPU engine."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(
        completions: list[str], completion_ids: list[list[int]], solution: list[str | None], **kwargs: Any
    ) -> list[float]:
        graded = math_reward(prompts=completions, completions=completions, solution=solution)
        return [0.0 if len(ids) >= LENGTH else score or 0.0 for score, ids in zip(graded, completion_ids, strict=True)]

    reward_function: Any = reward
    return GRPOTrainer(
        options.model,
        reward_function,
        GRPOConfig(
            **settings(options, folder), bf16=True, num_generations=GENERATIONS, model_init_kwargs=_float32(options)
        ),
        rows("train", options, as_text=True),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        peft_config=lora(),
    )


def _float32(options: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": "float32", "attn_implementation": options.attention}


def _stop_at_end_of_turn(trainer: Any) -> None:
    trainer.model.generation_config.eos_token_id = trainer.processing_class.eos_token_id
    trainer.ref_model.generation_config.eos_token_id = trainer.processing_class.eos_token_id


TRAINERS: dict[str, Callable[[argparse.Namespace, str], Any]] = {"ours": ours, "a2po": a2po, "grpo": grpo}


def watch(name: str, trainer: Any, phases: Phases) -> None:
    """Time the phases of a trainer."""

    def scoring() -> str:
        return "policy forward" if torch.is_grad_enabled() else "reference forward"

    phases.wrap(trainer.accelerator, "backward", "backward")
    if name == "ours":
        # Objects that are called are wrapped in their class, where Python looks for `__call__`.
        phases.wrap(type(trainer.reward_functions), "__call__", "rewards")
        phases.wrap(type(trainer.scorer), "__call__", scoring)
        phases.wrap(trainer.sampler, "sample", "generate")
        phases.wrap(trainer.probe, "check", "probe")
        return
    phases.wrap(trainer, "_calculate_rewards", "rewards")
    phases.wrap(trainer.accelerator.unwrap_model(trainer.model), "generate", "generate")
    phases.wrap(trainer, "_get_sequence_logps" if name == "a2po" else "_get_per_token_logps_and_entropies", scoring)


@torch.no_grad()
def heldout_accuracy(trainer: Any, options: argparse.Namespace) -> float:
    """Accuracy of greedy completions on the held-out problems; a completion that is cut counts as wrong."""
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    problems = rows("heldout", options, as_text=True)
    batch = tokenizer(list(problems["prompt"]), return_tensors="pt", padding=True, add_special_tokens=False)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    was_training = policy.training
    policy.eval()
    is_float32 = next(policy.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16) if is_float32 else nullcontext():
        ids = policy.generate(
            **batch, max_new_tokens=LENGTH, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
    policy.train(was_training)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    with Verifier() as verifier:
        grades = verifier.grade_batch(texts, list(problems["solution"]))
    ended = (ids == tokenizer.eos_token_id).any(1).tolist()
    return sum(grade.correct and end for grade, end in zip(grades, ended, strict=True)) / len(texts)
