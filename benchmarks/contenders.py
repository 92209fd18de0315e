"""The trainers that `benchmarks/trainer.py` compares, on one task, with one clock.

All train on the same prompts of a task (`benchmarks/tasks.py`), with the same lengths and number of completions an update, and all are evaluated by
the same code. TRL's A*-PO trains all weights (it has no LoRA); GRPO trains the same LoRA as ours; ours trains either.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from tasks import TASKS
from transformers import AutoTokenizer, DynamicCache, TrainerCallback

from astarpo.verifier import Verifier, math_reward

PROMPTS_PER_UPDATE = 32
GENERATIONS = 8


def lora() -> LoraConfig:
    """The adapter that ours and GRPO train."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def rows(which: str, model: str, task: str = "division", limit: int | None = None, as_text: bool = False) -> Dataset:
    """The `train` problems of a task, at most `limit`, or `heldout`; as text where a trainer cannot grade chat completions."""
    tokenizer, found = AutoTokenizer.from_pretrained(model), TASKS[task]()
    chosen = found.train[:limit] if which == "train" else found.heldout

    def prompt(chat: Any) -> Any:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) if as_text else chat

    return Dataset.from_list([{"prompt": prompt(chat), "solution": answer} for chat, answer in chosen])


def _train(options: argparse.Namespace, as_text: bool = False) -> Dataset:
    return rows("train", options.model, options.task, options.rows, as_text)


def _length(options: argparse.Namespace) -> int:
    return TASKS[options.task]().length


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
        "max_completion_length": _length(options),
        "temperature": 1.0,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "max_steps": options.updates,
        "seed": options.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


VALUES: dict[str, dict[str, Any]] = {
    "tracked": {"value_tracking": True, "value_estimate": "mean"},
    "mean": {"value_estimate": "mean"},
    "optimal": {},
}
"""Where our V comes from: as in the quickstart, and what that is compared with (`optimal` is the paper's table). There is no network as
prior here: it was no better than the constants in any of the trials of `benchmarks/rates.json`, which used it where it was."""


def ours(
    options: argparse.Namespace, folder: str, trains_all: bool = False, rounds: dict[str, Any] | None = None
) -> Any:
    """Our trainer, vLLM in process, stage 1 by the trainer itself: LoRA on bfloat16 weights, or all weights as the others hold them."""
    from astarpo.rollout import EngineOptions
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer, RoundOptions, ValueOptions

    weights = {"dtype": "bfloat16", "attn_implementation": options.attention}
    return AStarPOTrainer(
        options.model,
        args=AStarPOConfig(
            **settings(options, folder) | ({"beta2": ROUND_BETA2} if rounds else {}) | json.loads(options.more),
            num_value_samples=options.value_samples,
            model_init_kwargs=_float32(options) if trains_all else weights,
        ),
        train_dataset=_train(options),
        peft_config=None if trains_all else lora(),
        engine_options=EngineOptions(engine=options.engine, kv_cache_gb=0.5, max_num_seqs=128),
        value_options=ValueOptions(**VALUES["mean" if rounds else options.value]),
        round_options=RoundOptions(**rounds or {}),
    )


def ours_full(options: argparse.Namespace, folder: str) -> Any:
    """Ours with all weights."""
    return ours(options, folder, trains_all=True)


ROUNDS = {"rounds": 1000, "updates_per_round": 8, "num_samples": 4, "num_iterations": 2}
"""Rounds as they are compared; `--rounds` changes them."""
ROUND_BETA2 = 0.3


def ours_rounds(options: argparse.Namespace, folder: str) -> Any:
    """Ours in rounds: eight updates from the completions of one policy, which never has to be there while another is sampled."""
    return ours(options, folder, rounds=ROUNDS | json.loads(options.rounds))


def a2po(options: argparse.Namespace, folder: str) -> Any:
    """`trl.experimental.a2po`: float32 weights with bfloat16 autocast, all of them trained."""
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    tokenizer, most = AutoTokenizer.from_pretrained(options.model, padding_side="left"), _length(options)

    def reward(completions: list[str], solution: list[str | None], **kwargs: Any) -> list[float]:
        # It gives reward functions no token ids: a completion that was cut is told by its length.
        cut = [len(tokenizer(text)["input_ids"]) >= most for text in completions]
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
        _train(options, as_text=True),
        processing_class=tokenizer,
    )
    _stop_at_end_of_turn(trainer)
    return trainer


def grpo(options: argparse.Namespace, folder: str) -> Any:
    """TRL's GRPO, 8 generations a prompt, by transformers: its weight push fails on vLLM's CPU engine."""
    from trl import GRPOConfig, GRPOTrainer

    most = _length(options)

    def reward(
        completions: list[str], completion_ids: list[list[int]], solution: list[str | None], **kwargs: Any
    ) -> list[float]:
        graded = math_reward(prompts=completions, completions=completions, solution=solution)
        return [0.0 if len(ids) >= most else score or 0.0 for score, ids in zip(graded, completion_ids, strict=True)]

    reward_function: Any = reward
    return GRPOTrainer(
        options.model,
        reward_function,
        GRPOConfig(
            **settings(options, folder), bf16=True, num_generations=GENERATIONS, model_init_kwargs=_float32(options)
        ),
        _train(options, as_text=True),
        processing_class=AutoTokenizer.from_pretrained(options.model, padding_side="left"),
        peft_config=lora(),
    )


def _float32(options: argparse.Namespace) -> dict[str, Any]:
    return {"dtype": "float32", "attn_implementation": options.attention}


def _stop_at_end_of_turn(trainer: Any) -> None:
    trainer.model.generation_config.eos_token_id = trainer.processing_class.eos_token_id
    trainer.ref_model.generation_config.eos_token_id = trainer.processing_class.eos_token_id


TRAINERS: dict[str, Callable[[argparse.Namespace, str], Any]] = {
    "ours": ours,
    "ours_full": ours_full,
    "ours_rounds": ours_rounds,
    "grpo": grpo,
    "a2po": a2po,
}


def watch(name: str, trainer: Any, phases: Phases) -> None:
    """Time the phases of a trainer."""

    def scoring() -> str:
        return "policy forward" if torch.is_grad_enabled() else "reference forward"

    phases.wrap(trainer.accelerator, "backward", "backward")
    if name.startswith("ours"):
        # Objects that are called are wrapped in their class, where Python looks for `__call__`.
        phases.wrap(type(trainer.reward_functions), "__call__", "rewards")
        phases.wrap(type(trainer.scorer), "__call__", scoring)
        if not trainer.in_rounds:
            phases.wrap(trainer.sampler, "sample", "generate")
        if trainer.probe is not None:
            phases.wrap(trainer.probe, "check", "probe")
        return
    phases.wrap(trainer, "_calculate_rewards", "rewards")
    phases.wrap(trainer.accelerator.unwrap_model(trainer.model), "generate", "generate")
    phases.wrap(trainer, "_get_sequence_logps" if name == "a2po" else "_get_per_token_logps_and_entropies", scoring)


class Heldout:
    """The held-out problems, answered greedily by `generate` of transformers: the same for all contenders."""

    def __init__(self, model: str, task: str = "division"):
        self._tokenizer, self._verifier, self._task = AutoTokenizer.from_pretrained(model), Verifier(), TASKS[task]()
        problems = rows("heldout", model, task, as_text=True)
        self._golds: list[str] = list(problems["solution"])
        encoded = self._tokenizer(list(problems["prompt"]), add_special_tokens=False)
        self._prompts: list[list[int]] = encoded["input_ids"]
        columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*self._prompts, strict=False))
        self._shared = [column[0] for column in columns]

    def evaluate(self, trainer: Any) -> dict[str, float]:
        """`accuracy` (a completion that is cut counts as wrong), and `answered`, the share that states an answer."""
        policy = trainer.accelerator.unwrap_model(trainer.model)
        was_training = policy.training
        policy.eval()
        is_float32 = next(policy.parameters()).dtype == torch.float32
        with torch.no_grad(), torch.autocast(policy.device.type, torch.bfloat16) if is_float32 else nullcontext():
            completions = self._complete(policy, range(len(self._prompts)), self._task.short)
            # A row that is still going when most have ended is answered again at full length, so that all others need not wait.
            cut = [number for number, ids in enumerate(completions) if self._tokenizer.eos_token_id not in ids]
            for number, ids in zip(cut, self._complete(policy, cut, self._task.length), strict=True):
                completions[number] = ids
        policy.train(was_training)
        texts = self._tokenizer.batch_decode(completions, skip_special_tokens=True)
        grades = self._verifier.grade_batch(texts, self._golds)
        ended = [self._tokenizer.eos_token_id in ids for ids in completions]
        right = sum(grade.correct and end for grade, end in zip(grades, ended, strict=True))
        stated = sum(
            re.search(r"\d", text.rpartition(" is ")[2]) is not None and end
            for text, end in zip(texts, ended, strict=True)
        )
        return {"accuracy": right / len(texts), "answered": stated / len(texts)}

    def _complete(self, policy: Any, numbers: Sequence[int], length: int) -> list[list[int]]:
        """Token ids of greedy completions. The worked examples that all prompts share are read once."""
        if not numbers:
            return []
        shared, prompts = len(self._shared), [self._prompts[number] for number in numbers]
        longest, pad = max(map(len, prompts)), self._tokenizer.pad_token_id
        ids = [self._shared + [pad] * (longest - len(ids)) + ids[shared:] for ids in prompts]
        mask = [[1] * shared + [0] * (longest - len(ids)) + [1] * (len(ids) - shared) for ids in prompts]
        cache = DynamicCache(config=policy.config)
        policy(input_ids=torch.tensor([self._shared], device=policy.device), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        return policy.generate(
            input_ids=torch.tensor(ids, device=policy.device),
            attention_mask=torch.tensor(mask, device=policy.device),
            past_key_values=cache,
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=pad,
        )[:, longest:].tolist()
