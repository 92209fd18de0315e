"""The sanity test of arXiv 2510.26788 in small: can training solve what the reference sometimes solves?

    python benchmarks/sanity.py

Keeps the times-table problems that SmolLM2-135M solves 20 to 80 % of the time, trains on them, and prints one JSON line with
the accuracy of sampled completions on those same problems, update by update. A sound trainer comes to 0.95. Reference,
training and accuracy are all at temperature 0.5: at 1 the model solves only three of the problems that often.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from peft import LoraConfig

from astarpo.rollout import (
    EngineOptions,
    ModelOptions,
    SampleOptions,
    VLLMEngine,
    load_problems,
    pool_fingerprint,
    sample_pool,
)
from astarpo.rollout.prompts import load_tokenizer, tokenize_prompts
from astarpo.trainer import AStarPOConfig, AStarPOTrainer
from astarpo.trainer.division import write_problems
from astarpo.trainer.quickstart import fetch_model
from astarpo.verifier import Verifier

LENGTH = 40


def reference_pool(options: argparse.Namespace, model: str, folder: Path, engine: VLLMEngine, problems: Any) -> Any:
    """Reference samples of all problems."""
    sample = SampleOptions(
        str(folder / "pool"),
        num_samples=options.num_samples,
        max_completion_length=LENGTH,
        temperature=options.temperature,
        seed=options.seed,
    )
    tokenizer = load_tokenizer(model)
    fingerprint = pool_fingerprint(ModelOptions(model), EngineOptions(), tokenizer, problems, sample)
    with Verifier() as verifier:
        return sample_pool(engine, tokenizer, problems, sample, fingerprint, verifier)


def train(options: argparse.Namespace, model: str, folder: Path, engine: VLLMEngine, rows: Any) -> list[float]:
    """Mean reward of each update's completions."""
    trainer = AStarPOTrainer(
        model,
        args=AStarPOConfig(
            str(folder / "run"),
            per_device_train_batch_size=options.batch,
            max_steps=options.updates,
            num_value_samples=options.num_samples,
            max_completion_length=LENGTH,
            temperature=options.temperature,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
            seed=options.seed,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        engine=engine,
    )
    trainer.train()
    return [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="default: SmolLM2-135M-Instruct, fetched into runs/models")
    parser.add_argument("--num_samples", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    folder = Path("runs/sanity")
    model = options.model_name_or_path or str(fetch_model(Path("runs/models")))
    files = write_problems(folder / "data")
    problems = [p for file in files for p in load_problems(str(file))]
    longest = max(map(len, tokenize_prompts(problems, load_tokenizer(model))))
    engine = VLLMEngine(model, longest + LENGTH, dtype="bfloat16", options=EngineOptions(kv_cache_gb=0.5))
    pool = reference_pool(options, model, folder, engine, problems)
    rates = {prompt_id: sum(r or 0 for r in rewards) / len(rewards) for prompt_id, rewards in pool.rewards().items()}
    rows = pool.to_dataset().filter(lambda row: 0.2 <= rates[row["prompt_id"]] <= 0.8)
    rewards = train(options, model, folder, engine, rows)
    last = rewards[-5:]
    print(
        json.dumps(
            {
                "problems": len(rows),
                "reference_accuracy": round(sum(rates[i] for i in rows["prompt_id"]) / len(rows), 4),
                "training_accuracy": round(sum(last) / len(last), 4),
                "reward_by_update": [round(reward, 3) for reward in rewards],
                "seconds": round(time.perf_counter() - began, 1),
                "settings": vars(options),
            }
        )
    )


if __name__ == "__main__":
    main()
