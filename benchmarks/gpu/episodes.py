"""PAG episodes at the size of a real run: 512 episodes an update."""

import statistics
import tempfile
from typing import Any

from common import Options, Skipped, lora, on_gpu, parity, settings
from contenders import rows as divisions

METRICS = ("reward", "attempt/reward", "verify/correct_recall", "verify/wrong_recall", "revise/rate", "step_time")


def measure(options: Options) -> dict[str, Any]:
    """Seconds of an update, and metrics of the first and of the last one."""
    from astarpo.rollout import EngineOptions
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer, TurnOptions
    from astarpo.verifier import math_reward

    if not options.tiny and not options.model:
        raise Skipped("no chat model was given (--model)")
    model = options.random() if options.tiny else options.model
    train = divisions("train", model, limit=8 if options.tiny else None)
    reward: Any = parity if options.tiny else math_reward
    precision = {} if options.tiny or not on_gpu() else {"bf16": True, "fp16": False}
    with tempfile.TemporaryDirectory() as folder:
        made = settings(
            options, folder, options.count(10, 1), learning_rate=1e-4, max_completion_length=options.count(48, 8),
            gradient_accumulation_steps=options.count(16, 2),
            model_init_kwargs={"dtype": "float32" if options.tiny else "bfloat16"}, **precision,
        )  # fmt: skip
        trainer = AStarPOTrainer(
            model,
            reward,
            AStarPOConfig(**made, num_value_samples=2, require_eos=not options.tiny),
            train,
            peft_config=lora(),
            engine_options=EngineOptions(kv_cache_gb=0.2 if options.tiny else 4.0, max_num_seqs=8 if options.tiny else 256),
            episode_options=TurnOptions(episode="pag", verdict_parser="lenient"),
        )  # fmt: skip
        trainer.train()
        trainer.close()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    ends = [{name: float(entry[name]) for name in METRICS if name in entry} for entry in (logged[0], logged[-1])]
    seconds = [float(entry["step_time"]) for entry in logged[1:] or logged]
    return {"episodes": made["per_device_train_batch_size"] * made["gradient_accumulation_steps"],
            "update_s": round(statistics.median(seconds), 2), "first": ends[0], "last": ends[1]}  # fmt: skip
