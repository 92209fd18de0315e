"""Pools and trainers of PAG episodes on the tiny model that knows their form."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

from helpers import graded_pool
from pag_model import REVISE, VERIFY, problem
from peft import LoraConfig
from transformers import AutoTokenizer

from astarpo.rollout import EpisodeKind, Pag, sample_pool
from astarpo.rollout.fingerprint import pool_fingerprint
from astarpo.rollout.options import EngineOptions, ModelOptions, SampleOptions
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, TurnOptions, ValueOptions
from astarpo.verifier import Verifier

PROBLEMS = [problem(number) for number in range(20)]
PAG = Pag(VERIFY, REVISE)
VALUE_OPTIONS = {field.name for field in fields(ValueOptions)}


def make_pool(folder, guesser, engine, kind: EpisodeKind = PAG, problems=PROBLEMS):
    options = SampleOptions(str(folder), num_samples=4, max_completion_length=32)
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    fingerprint = pool_fingerprint(ModelOptions(guesser), EngineOptions(), tokenizer, problems, options)
    with Verifier() as verifier:
        return sample_pool(engine, tokenizer, problems, options, fingerprint, verifier, kind=kind)


class Maker:
    def __init__(self, guesser, engine, pool):
        self.guesser, self.engine, self.pool = guesser, engine, pool

    def __call__(self, folder, options: dict[str, Any] | None = None, **settings):
        words: dict[str, Any] = dict(
            per_device_train_batch_size=8,
            max_completion_length=32,
            num_value_samples=4,
            learning_rate=1e-3,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
            pool=str(self.pool.folder),
        )
        engine = settings.pop("engine", self.engine)
        kwargs = {
            name: settings.pop(name)
            for name in ("reward_funcs", "train_dataset", "eval_dataset", "callbacks", "episode")
            if name in settings
        }
        if "reward_funcs" in kwargs and "pool" not in settings:
            graded = graded_pool(
                self.pool, Path(folder) / "graded_pool", kwargs["reward_funcs"], settings.get("reward_weights")
            )
            words["pool"] = str(graded.folder)
        values = {name: settings.pop(name) for name in VALUE_OPTIONS if name in settings}
        pag = {"episode": "pag", "verify_prompt": VERIFY, "revise_prompt": REVISE}
        turns: dict[str, Any] = {} if "episode" in kwargs else pag
        return AStarPOTrainer(
            self.guesser,
            args=AStarPOConfig(str(folder), **(words | settings)),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            engine=engine,
            episode_options=TurnOptions(**(turns | (options or {}))),
            value_options=ValueOptions(**values),
            **kwargs,
        )


def batches(trainer):
    """Every batch that the loss reads, with the episodes and the rows that it was made of."""
    seen, episodes = [], []
    sample, make_batch = trainer.sampler.sample, trainer.make_batch

    def sampling(*args, **kwargs):
        episodes.append(sample(*args, **kwargs))
        return episodes[-1]

    def making(rows, mode):
        batch = make_batch(rows, mode)
        seen.append((copy.deepcopy(batch), episodes[-1], list(rows)))
        return batch

    trainer.sampler.sample, trainer.make_batch = sampling, making
    return seen
