"""Does a run keep to its plan? Planned and measured memory by phase, under a hard cap, and whether it grows.

Random weights of Qwen2.5-1.5B's shape: completions never end, which is the worst case.
"""

import resource
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from common import GB, Options, Skipped, lora, on_gpu, ours, parity, rows, settings
from transformers import TrainerCallback

CYCLES = 200


def reserved() -> float:
    """GB that the process holds of the GPU now; resident memory at its peak without one."""
    if on_gpu():
        return torch.cuda.memory_reserved() / GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB


def context() -> float:
    """GB that the process holds beside torch's memory: the CUDA context and what libraries take. It is alone on the GPU."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / GB


def cap(budget_gb: float) -> None:
    """Refuse memory beyond the budget, of which the context is a part: torch's own cap knows nothing of it."""
    if on_gpu():
        torch.zeros(1, device="cuda")  # makes the context
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction((budget_gb - context()) * GB / total)


def most_held() -> float:
    """GB that the process held at most since the peak was reset, its context included, as plans count."""
    return torch.cuda.max_memory_reserved() / GB + context() if on_gpu() else reserved()


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
        if on_gpu():
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


def measure(options: Options, link: str = "inline", share: str = "on") -> dict[str, Any]:
    """Stage 1 and 20 updates: the plan's peaks by phase beside the measured ones."""
    return _measure_ours(options, options.count(20, 2), link, share)


def measure_cycles(options: Options) -> dict[str, Any]:
    """200 short cycles of sampling and training: whether memory grows, and whether the base weights stay what they were."""
    return _measure_ours(options, options.count(CYCLES, 6), "inline", "on", completion=options.count(64, 8))


def _measure_ours(
    options: Options, updates: int, link: str, share: str, completion: int | None = None
) -> dict[str, Any]:
    cap(options.budget_gb)
    changes = {} if completion is None else {"max_completion_length": completion}
    peaks = Peaks()
    with tempfile.TemporaryDirectory() as folder:
        engine = {"budget_gb": options.budget_gb, "policy_link": link, "share_base_weights": share}
        trainer = ours(options, folder, updates, engine, **changes)
        frozen = [parameter for parameter in trainer.model.parameters() if not parameter.requires_grad]
        before = [float(parameter.double().sum()) for parameter in frozen]
        started = reserved()
        peaks.wrap(trainer, "sample_reference", "stage 1")
        peaks.wrap(trainer.sampler, "sample", "generate")
        peaks.wrap(type(trainer.scorer), "__call__", "score", is_scoring)  # where Python looks for `__call__`
        peaks.wrap(trainer, "training_step", "backward")
        trainer.add_callback(AfterUpdate(peaks))
        trainer.train()
        after = [float(parameter.double().sum()) for parameter in frozen]
        trainer.close()
    return {
        "planned_gb": _plan(options, trainer, link, share, completion or options.completion),
        "measured_gb": {"started": round(started, 3), **{name: round(gb, 3) for name, gb in peaks.gb.items()}},
        "growth": round(max(peaks.after_update) / peaks.after_update[max(1, len(peaks.after_update) // 10)] - 1, 4),
        "base_weights_are_the_same": before == after,
        "rows_at_once": trainer.rows_at_once,
        "sequences": trainer.engine_options.max_num_seqs,
    }


def _plan(options: Options, trainer: Any, link: str, share: str, completion: int) -> dict[str, float]:
    """What `astarpo plan` says of the same run."""
    from astarpo.rollout.memory import ModelShape, plan_run, training_sizes

    shape = ModelShape.of(options.random())
    sizes = training_sizes(
        options.prompt + 32, completion, width=shape.stored_width, rank=16, batch=options.batch, policy_link=link,
        share_base_weights=share == "on", max_num_seqs=trainer.engine_options.max_num_seqs,
        kv_cache_gb=trainer.engine_options.kv_cache_gb,
    )  # fmt: skip
    return plan_run(shape, sizes, int(options.budget_gb * GB)).to_json()["phases_gb"]


def measure_grpo(options: Options) -> dict[str, Any]:
    """TRL's GRPO with vLLM in the same process, at the same sizes."""
    if not on_gpu():
        raise Skipped("TRL's weight push fails on vLLM's CPU engine")
    from trl import GRPOConfig, GRPOTrainer

    cap(options.budget_gb)
    peaks, reward = Peaks(), parity
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = GRPOTrainer(
            options.random(),
            reward,  # pyright: ignore[reportArgumentType]
            GRPOConfig(
                **settings(options, folder, 20), num_generations=8, use_vllm=True, vllm_mode="colocate",
                vllm_gpu_memory_utilization=options.budget_gb * 0.5e9 / torch.cuda.mem_get_info()[1],
                vllm_max_model_length=options.prompt + options.completion, gradient_checkpointing=True,
            ),
            rows(options, options.batch * 20),
            peft_config=lora(),
        )  # fmt: skip
        peaks.wrap(trainer, "training_step", "update")
        trainer.train()
    return {"measured_gb": peaks.gb}
