"""A small training run as a program: `python train_run.py '{"model": ..., "output_dir": ..., ...}'`; writes `result.json`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from accelerate import PartialState
from helpers import LORA, toy_rows
from peft import LoraConfig
from transformers import TrainerCallback

from astarpo.rollout import EngineOptions
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, TurnOptions, ValueOptions, logprobs
from astarpo.trainer import trainer as trainer_module
from astarpo.verifier import math_reward


def parity(completion_ids, **kwargs) -> list[float | None]:
    """A reward that a random model earns half of the time."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class KillAt(TrainerCallback):
    """SIGKILL when an update begins whose completions are sampled already."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_in_checkpoint(trainer, step):
    """SIGKILL when all of a checkpoint is on disk but the marker that makes it count."""
    mark_complete = trainer_module.mark_complete

    def kill(folder, fingerprint):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        mark_complete(folder, fingerprint)

    trainer_module.mark_complete = kill


class Memory(TrainerCallback):
    """Resident memory after each update."""

    def __init__(self):
        self.rss = []

    def on_step_end(self, args, state, control, **kwargs):
        self.rss.append(psutil.Process().memory_info().rss)


def hang_in_engine(trainer, step):
    engine = trainer.engine
    stream = engine.stream

    def hang(*args, **kwargs):
        if trainer.state.global_step == step:
            time.sleep(1000)
        yield from stream(*args, **kwargs)

    engine.stream = hang


def count_passes():
    """A list that gets, for each scoring of the policy in training, the number of groups and whether a prefix was shared."""
    inner, passes, key_values = logprobs.score_completions, [], logprobs._key_values

    def counting(model, ids, mask, columns, groups, *args):
        before = shared[0]
        result = inner(model, ids, mask, columns, groups, *args)
        if torch.is_grad_enabled():
            passes.append([len(groups), shared[0] - before])
        return result

    shared = [0]

    def counting_shared(*args):
        shared[0] += 1
        return key_values(*args)

    logprobs.score_completions, logprobs._key_values = counting, counting_shared
    return passes


def train(
    model,
    output_dir,
    rows=14,
    kill_at=None,
    where="update",
    resume=False,
    hang_at=None,
    policy_link="auto",
    watch_memory=False,
    stage1=False,
    call_cost=None,
    episode=None,
    episode_options=None,
    value_options=None,
    **settings,
):
    torch.set_num_threads(1)
    if call_cost is not None:
        logprobs.CALL_COST["cpu"] = call_cost
    passes = count_passes()
    settings = {
        **dict(per_device_train_batch_size=4, max_steps=10, learning_rate=1e-2, num_value_samples=4, seed=5),
        **dict(logging_steps=1, save_strategy="steps", save_steps=1, save_total_limit=2, report_to="none"),
        **dict(max_completion_length=8, bf16=False, disable_tqdm=True, gradient_checkpointing=False),
        **dict(model_init_kwargs={"dtype": "float32"}, require_eos=False),
        **settings,
    }
    has_pool = not stage1 and (episode or episode_options)  # a pool of episodes brings its problems
    data = None if has_pool else toy_rows(rows)
    if data is not None and stage1:
        data = data.remove_columns("reference_rewards")
    trainer = AStarPOTrainer(
        model,
        parity if data is not None and not stage1 else math_reward,
        AStarPOConfig(output_dir, **settings),
        data,
        peft_config=None if policy_link == "copied" else LoraConfig(**LORA),
        engine_options=EngineOptions(kv_cache_gb=0.05, max_num_seqs=16, policy_link=policy_link),
        callbacks=[KillAt(kill_at if where == "update" else None), memory := Memory()],
        episode=episode,
        episode_options=None if episode_options is None else TurnOptions(**episode_options),
        value_options=ValueOptions(**(value_options or {})),
    )
    if hang_at is not None:
        hang_in_engine(trainer, hang_at)
    if where == "checkpoint":
        kill_in_checkpoint(trainer, kill_at)
    trainer.train(resume_from_checkpoint=resume)
    Path(output_dir, f"passes{trainer.accelerator.process_index}.json").write_text(json.dumps(passes))
    if trainer.accelerator.is_main_process:
        trainer.save_model(output_dir)
        if watch_memory:
            Path(output_dir, "rss.json").write_text(json.dumps(memory.rss))
        Path(output_dir, "result.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    PartialState(cpu=True)
    train(**json.loads(sys.argv[1]))
