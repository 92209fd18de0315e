"""Does a run keep to its plan? Planned and measured memory per phase, drift, and decoding speed, under a hard cap.

    python benchmarks/gpu_memory.py

Needs one NVIDIA GPU and no download: random weights of Qwen2.5-1.5B's shape, whose completions never end, which is the worst
case. Prints one JSON line. Each part runs in a process of its own: ours with shared and unshared base weights and over each
policy link (20 updates), 200 short generate/train cycles, and TRL's GRPO with vLLM colocated at the same sizes. With
`--tiny` a tiny model on the CPU shows that the program works; its memory is then resident memory, and says nothing of a GPU.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig
from random_model import QWEN_1_5B, TINY, random_model
from transformers import TrainerCallback

GB = 1e9
PARTS = {
    "shared, inline": {"link": "inline", "share": "on"},
    "unshared, inline": {"link": "inline", "share": "off"},
    "shared, adapter": {"link": "adapter", "share": "on"},
    "cycles": {"link": "inline", "share": "on"},
    "grpo": {},
}


def reserved() -> float:
    """GB that the process holds of the GPU now; resident memory at its peak without one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def most_held() -> float:
    """GB that the process held at most since the peak was reset, its context included, as plans count."""
    if not torch.cuda.is_available():
        return reserved()
    free, total = torch.cuda.mem_get_info()  # this process is alone on the GPU
    besides = total - free - torch.cuda.memory_reserved()
    return (torch.cuda.max_memory_reserved() + besides) / GB


class Peaks:
    """The most that was held inside each phase."""

    def __init__(self) -> None:
        self.gb: dict[str, float] = {}
        self.after_update: list[float] = []

    def wrap(self, owner: Any, method: str, name: str, when: Callable[[], bool] = lambda: True) -> None:
        """Note what a method of `owner` held, in calls where `when` is true."""
        inner = getattr(owner, method)

        def noting(*args: Any, **kwargs: Any) -> Any:
            return self.during(name, lambda: inner(*args, **kwargs)) if when() else inner(*args, **kwargs)

        setattr(owner, method, noting)

    def during(self, name: str, call: Callable[[], Any]) -> Any:
        """Note what a call held."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            return call()
        finally:
            self.gb[name] = max(self.gb.get(name, 0.0), most_held())


class AfterUpdate(TrainerCallback):
    """Notes what is held after each update."""

    def __init__(self, peaks: Peaks):
        self._peaks = peaks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note it."""
        self._peaks.after_update.append(reserved())


def is_scoring() -> bool:
    """Whether log-probs are computed without gradients now; with gradients it is part of the backward phase."""
    return not torch.is_grad_enabled()


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What ours and GRPO are told."""
    return {
        **{"output_dir": folder, "max_completion_length": options.completion, "max_steps": options.updates},
        **{"per_device_train_batch_size": options.batch, "learning_rate": 1e-5, "logging_steps": 1, "seed": 0},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "temperature": 1.0},
        "model_init_kwargs": {"dtype": options.dtype},
        **({"fp16": True} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}),
    }


def rows(options: argparse.Namespace) -> Dataset:
    """Prompts of `options.prompt` tokens."""
    return Dataset.from_list(
        [
            {"prompt": f"{i:04d} ".ljust(options.prompt, "x"), "solution": str(i)}
            for i in range(options.batch * options.updates)
        ]
    )


def parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """A reward that random completions earn half of the time."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def lora() -> LoraConfig:
    """The adapter that all train."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def measure_ours(options: argparse.Namespace, model: str, link: str, share: str) -> dict[str, Any]:
    """Stage 1 and the updates; peaks by phase, what is held over the updates, tokens/s of the engine."""
    from astarpo.rollout import EngineOptions
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer

    peaks = Peaks()
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = AStarPOTrainer(
            model,
            parity,
            AStarPOConfig(
                **settings(options, folder),
                max_prompt_length=options.prompt,
                num_value_samples=2,
                require_eos=False,
            ),
            rows(options),
            peft_config=lora(),
            engine_options=EngineOptions(budget_gb=options.budget_gb, policy_link=link, share_base_weights=share),
        )
        started = reserved()
        peaks.wrap(trainer, "_sample_reference", "stage 1")
        peaks.wrap(trainer.sampler, "sample", "generate")
        peaks.wrap(type(trainer.scorer), "__call__", "score", is_scoring)  # where Python looks for `__call__`
        peaks.wrap(trainer, "training_step", "backward")
        trainer.add_callback(AfterUpdate(peaks))
        trainer.train()
    return {
        "measured_gb": {"started": started, **peaks.gb},
        "drift": _drift(peaks.after_update),
        "tokens_per_s": _decoding(trainer, options),
        "rows_at_once": trainer.rows_at_once,
        "sequences": trainer.engine_options.max_num_seqs,
    }


def _drift(held: list[float]) -> float:
    """Growth of what is held from the tenth part of the updates to the end, relative."""
    first = held[max(1, len(held) // 10)]
    return max(held) / first - 1


def _decoding(trainer: Any, options: argparse.Namespace) -> dict[str, float]:
    from astarpo.rollout import SamplingSettings

    prompts = [[5 + i % 200] * 16 for i in range(64)]
    found = {}
    for name, policy in (("plain weights", None), ("policy", trainer.sampler.policy.link)):
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            stream = trainer.engine.stream(
                prompts, list(range(64)), SamplingSettings(min(128, options.completion), 1.0), policy
            )
            tokens = sum(len(completion.token_ids) for _, completion in stream)
            found[name] = tokens / (time.perf_counter() - began)
    return found


def measure_grpo(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """TRL's GRPO with vLLM in the same process, at the same sizes."""
    if not torch.cuda.is_available():
        return {"skipped": "TRL's weight push fails on vLLM's CPU engine"}
    from trl import GRPOConfig, GRPOTrainer

    peaks, reward = Peaks(), parity
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = GRPOTrainer(
            model,
            reward,  # pyright: ignore[reportArgumentType]
            GRPOConfig(
                **settings(options, folder), num_generations=8, use_vllm=True, vllm_mode="colocate",
                vllm_gpu_memory_utilization=options.budget_gb * 0.5e9 / torch.cuda.mem_get_info()[1],
                vllm_max_model_length=options.prompt + options.completion, gradient_checkpointing=True,
            ),
            rows(options),
            peft_config=lora(),
        )  # fmt: skip
        peaks.wrap(trainer, "training_step", "update")
        trainer.train()
    return {"measured_gb": peaks.gb}


def plan(options: argparse.Namespace, model: str, share: bool, link: str) -> dict[str, Any]:
    """What `astarpo-plan` says of the same run."""
    from astarpo.rollout.memory import ModelShape, RunSizes, plan_run

    shape, budget = ModelShape.of(model), int(options.budget_gb * GB)
    sizes = RunSizes(
        options.prompt + options.completion, options.completion, batch=options.batch, width=shape.stored_width,
        policy_link=link, share_base_weights=share,
    )  # fmt: skip
    report = plan_run(shape, sizes, budget).to_json()
    return {name: report[name] for name in ("peak_gb", "phases_gb", "fits")}


def run_part(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One part, in a process of its own."""
    words = [word for field, value in vars(options).items() if field not in ("part", "tiny") and value is not None
             for word in (f"--{field}", str(value))]  # fmt: skip
    command = [sys.executable, __file__, "--part", name, *words, *(["--tiny"] if options.tiny else [])]
    print(f"running: {name}", file=sys.stderr, flush=True)
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if finished.returncode:
        return {"failed": f"exit code {finished.returncode}; the log above says why"}
    return json.loads(finished.stdout.splitlines()[-1])


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What one part finds."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(options.budget_gb * GB / torch.cuda.mem_get_info()[1])
    sizes = TINY if options.tiny else QWEN_1_5B
    model = random_model(Path(options.folder), sizes, getattr(torch, options.dtype))
    if name == "grpo":
        return measure_grpo(options, model)
    if name == "cycles":
        options.updates, options.completion = options.cycles, min(64, options.completion)
    how = PARTS[name]
    planned = plan(options, model, how["share"] == "on", how["link"])
    return {"planned": planned, **measure_ours(options, model, how["link"], how["share"])}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the program on a CPU")
    parser.add_argument("--folder", help="where the random model is kept (3 GB); default: runs/benchmarks/...")
    parser.add_argument("--budget_gb", type=float, default=10.0)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--batch", type=int, default=32, help="completions of an update")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--dtype", default=None, help="default: float16; float32 with --tiny")
    parser.add_argument("--part", choices=list(PARTS), help="run one part (as the benchmark calls itself)")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.tiny else "float16")
    options.folder = options.folder or f"runs/benchmarks/{'tiny' if options.tiny else 'qwen2.5-1.5b-random'}"
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("error: this needs an NVIDIA GPU; `--tiny` tries the program on a CPU")
    if options.part:
        print(json.dumps(measure(options.part, options)))
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        json.dumps({"gpu": gpu, "parts": {name: run_part(name, options) for name in PARTS}, "settings": vars(options)})
    )


if __name__ == "__main__":
    main()
