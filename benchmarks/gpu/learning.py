"""Does it learn? A small chat model on divisions, and on the word problems that the reference sometimes solves; A*-PO and TRL's GRPO."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Options, Skipped, lora, on_gpu, parity, settings
from contenders import EachUpdate, Heldout
from contenders import rows as divisions
from datasets import Dataset

RATE = 3e-4
"""Chosen for both by `benchmarks/tune.py`."""
EVALUATIONS = 10


def measure_division(options: Options) -> dict[str, Any]:
    """Held-out accuracy over the updates of both, with the seconds of each evaluation."""
    model = _model(options)
    train, heldout = divisions("train", model), Heldout(model)
    curves = {}
    for name in ("ours", "grpo"):
        curve: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(name, options, folder, model, train, length=24)
            began, every = time.perf_counter(), max(1, trainer.args.max_steps // EVALUATIONS)

            def evaluate(
                step: int, seconds: float, trainer: Any = trainer, curve: Any = curve, began: float = began, every: int = every
            ) -> bool:  # fmt: skip
                if step % every == 0:
                    point = {"update": step, "seconds": round(time.perf_counter() - began, 1)}
                    curve.append(point | ({} if options.tiny else heldout.evaluate(trainer)))
                return False

            trainer.add_callback(EachUpdate(evaluate))
            trainer.train()
            if name == "ours":
                trainer.close()
        curves[name] = curve
    return {"learning_rate": RATE, "curves": curves}


def measure_words(options: Options) -> dict[str, Any]:
    """Reward of the first and of the last updates on word problems that the reference solves 1 to 7 times of 8."""
    if not options.data and not options.tiny:
        raise Skipped("no word problems were given (--data)")
    model = _model(options)
    train = Dataset.from_list(_problems(options))
    found: dict[str, Any] = {}
    for name in ("ours", "grpo"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = _trainer(name, options, folder, model, train, length=options.count(320, 8), solved=True)
            if name == "ours":  # both train on the same problems
                train = trainer.train_dataset.select_columns(["prompt", "solution"])
                found["problems"] = len(train)
            began = time.perf_counter()
            trainer.train()
            if name == "ours":
                trainer.close()
        rewards = [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
        tenth = max(1, len(rewards) // 10)
        found[name] = {
            "first": statistics.fmean(rewards[:tenth]),
            "last": statistics.fmean(rewards[-tenth:]),
            "seconds": round(time.perf_counter() - began, 1),
            "updates": len(rewards),
        }
    return found


def _model(options: Options) -> str:
    if options.tiny:
        return options.random()
    if not options.model:
        raise Skipped("no chat model was given (--model)")
    return options.model


def _problems(options: Options) -> list[dict[str, Any]]:
    if options.tiny:
        return [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "solution": str(i + 1)} for i in range(8)]
    lines = [json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()[:1000]]
    return [
        {
            "prompt": [{"role": "user", "content": line.get("question") or line["problem"]}],
            "solution": str(line["answer"]).rpartition("####")[2].strip(),
        }
        for line in lines
    ]


def _trainer(
    name: str, options: Options, folder: str, model: str, train: Dataset, length: int, solved: bool = False
) -> Any:
    from astarpo.verifier import math_reward

    # Random weights solve nothing: to try the program, any reward will do.
    reward: Any = parity if options.tiny else math_reward
    precision = {} if options.tiny or not on_gpu() else {"bf16": True, "fp16": False}
    dtype = "float32" if options.tiny else "bfloat16"
    made = settings(
        options, folder, options.count(300, 2), learning_rate=RATE, max_completion_length=length,
        model_init_kwargs={"dtype": dtype}, **precision,
    )  # fmt: skip
    if name == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        generations = min(8, options.batch)
        return GRPOTrainer(model, reward, GRPOConfig(**made, num_generations=generations), train, peft_config=lora())
    from astarpo.rollout import EngineOptions
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer, ValueOptions

    values = ValueOptions(solved_between=[1, 7]) if solved and not options.tiny else ValueOptions()
    return AStarPOTrainer(
        model,
        reward,
        AStarPOConfig(**made, num_value_samples=8 if solved else 2, require_eos=not options.tiny),
        train,
        peft_config=lora(),
        engine_options=EngineOptions(
            kv_cache_gb=0.2 if options.tiny else 4.0, max_num_seqs=8 if options.tiny else 256
        ),
        value_options=values,
    )
