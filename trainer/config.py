"""`AStarPOConfig`: TRL's `GRPOConfig` with the fields of A*-PO, and without those that its loss would ignore."""

from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

import torch
from peft import PeftModel
from trl import GRPOConfig

from .guards import parse_deadline


class _One(int):
    """The number of generations per prompt, 1, until `GRPOConfig` has checked that it is not below 2."""

    def __lt__(self, other: object) -> bool:
        return False


# What the loss would silently ignore, and why. The value is the only one allowed: `GRPOConfig`'s own default.
_NO_GROUPS = "A*-PO has no groups: its baseline is V*, from stage 1"
_NO_RATIO = "A*-PO has no importance ratio and no clipping"
_NO_ENTROPY = "the A*-PO loss has no entropy term"
_REFUSED = {
    **dict.fromkeys(
        ("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "off_policy_mask_threshold"),
        _NO_RATIO,
    ),
    **dict.fromkeys(
        (
            "sapo_temperature_neg",
            "sapo_temperature_pos",
            "vespo_k_pos",
            "vespo_lambda_pos",
            "vespo_k_neg",
            "vespo_lambda_neg",
            "use_bias_correction_kl",
        ),
        _NO_RATIO,
    ),
    **dict.fromkeys(
        ("entropy_coef", "use_adaptive_entropy", "top_entropy_quantile", "entropy_coef_min", "entropy_coef_max"),
        _NO_ENTROPY,
    ),
    "multi_objective_aggregation": _NO_GROUPS,
    "sync_ref_model": "V* belongs to the frozen reference; a moving one would make it stale",
    "mask_truncated_completions": "a truncated completion has a reward; see `require_eos`",
}
# vLLM is ours to start: these TRL fields would have no effect on it.
_REFUSED |= dict.fromkeys(
    (
        "vllm_mode",
        "vllm_model_impl",
        "vllm_enable_sleep_mode",
        "vllm_structured_outputs_regex",
        "vllm_server_base_url",
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "generation_kwargs",
        "use_transformers_continuous_batching",
    ),
    "the engine is astarpo's own; set its sizes with `EngineOptions`",
)


@dataclass
class AStarPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`AStarPOTrainer`].

    This class includes only the parameters that are specific to A*-PO. For the others, see [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`]. Defaults that differ: `num_generations=1`, `scale_rewards="none"`,
    `vllm_importance_sampling_correction=False`, `beta` follows `beta2`, `use_vllm=True`, `gradient_checkpointing=None` (planned), `ddp_broadcast_buffers=False`. Options of GRPO that this loss
    would ignore are refused when set.

    Parameters:
        > Parameters that control stage 1

        beta1 (`float`, *optional*, defaults to `0.5`):
            Temperature of V* = β1 ln mean exp(r/β1), applied to the pool's rewards.
        num_value_samples (`int`, *optional*, defaults to `8`):
            How many reference samples per prompt V* is computed from; the pool may hold more.
        filter_all_incorrect (`bool`, *optional*, defaults to `False`):
            Leave out prompts that the reference never solved.
        pool (`str`, *optional*):
            Folder of the reference pool, for the training script.

        > Parameters that control stage 2

        beta2 (`float`, *optional*, defaults to `1e-3`):
            KL temperature of the regression (β2·ℓ + V* − r)².
        require_eos (`bool`, *optional*, defaults to `True`):
            Whether a completion cut at `max_completion_length` earns reward 0. The pool must follow the same rule.
        probe_rows (`int`, *optional*, defaults to `4`):
            Completions per update on which the engine's log-probs are compared with the trainer's, to stop when the
            engine samples an old policy; 0 turns the check off.

        max_prompt_length (`int`, *optional*):
            Longest prompt allowed, in tokens; a longer one is an error, never cut.

        > Parameters that control the run

        save_by (`str`, *optional*):
            When to have saved and stopped: a duration from the start (`3h50m`), a time of day (`18:30`) or a date and time.
        engine_timeout_s (`float`, *optional*, defaults to `1800.0`):
            Seconds without a finished completion after which the engine counts as hanging: the stacks of all threads are
            printed and the process ends with exit code 1. 0 turns this off.
    """

    beta1: float = field(default=0.5, metadata={"help": "Temperature of V*, applied to the pool's rewards."})
    num_value_samples: int = field(
        default=8, metadata={"help": "Reference samples per prompt that V* is computed from; the pool may hold more."}
    )
    filter_all_incorrect: bool = field(
        default=False, metadata={"help": "Leave out prompts that the reference never solved."}
    )
    pool: str | None = field(default=None, metadata={"help": "Folder of the reference pool from astarpo-rollout."})
    beta2: float = field(default=1e-3, metadata={"help": "KL temperature of the regression."})
    require_eos: bool = field(
        default=True,
        metadata={"help": "Whether a completion cut at max_completion_length earns reward 0, as in the pool."},
    )
    probe_rows: int = field(
        default=4,
        metadata={"help": "Completions per update on which engine and trainer are compared; 0 turns the check off."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt allowed, in tokens; a longer one is an error, never cut."}
    )
    save_by: str | None = field(
        default=None,
        metadata={
            "help": "When to have saved and stopped: a duration (3h50m), a time of day (18:30) or a date and time."
        },
    )
    engine_timeout_s: float = field(
        default=1800.0,
        metadata={"help": "Seconds without a finished completion after which the run is ended as hanging; 0: never."},
    )

    num_generations: int | None = field(default=1, metadata={"help": "Completions per prompt; always 1."})
    scale_rewards: str = field(default="none", metadata={"help": "Always `none`: rewards are not normalised."})
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Always off: log-probs are recomputed by the trainer."}
    )
    gradient_checkpointing: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Compute blocks again in the backward pass; planned when not given (on without a GPU)."},
    )
    use_vllm: bool = field(
        default=True, metadata={"help": "Sample with vLLM; off, with the far slower `generate` of transformers."}
    )

    def __post_init__(self):
        self._check_own()
        self._check_inherited()
        self._choose_precision()
        self.beta = self.beta2  # switches TRL's reference log-probs on
        if self.ddp_broadcast_buffers is None:
            # DDP would broadcast them (they are constant) at every pass, and processes may make different numbers of passes.
            self.ddp_broadcast_buffers = False
        self.num_generations = _One(1)
        super().__post_init__()
        self.num_generations = 1
        self._check_freshness()

    def _check_own(self) -> None:
        for name in ("beta1", "beta2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.num_value_samples < 1:
            raise ValueError(f"`num_value_samples` must be at least 1, got {self.num_value_samples}.")
        if self.probe_rows < 0:
            raise ValueError(f"`probe_rows` must be 0 (off) or more, got {self.probe_rows}.")
        if self.engine_timeout_s < 0:
            raise ValueError(f"`engine_timeout_s` must be 0 (off) or more, got {self.engine_timeout_s}.")
        if self.save_by is not None:
            parse_deadline(self.save_by, datetime.now())
        if self.beta not in (0.0, self.beta2):
            raise ValueError(
                f"`beta` ({self.beta}) is GRPO's KL weight; A*-PO's KL temperature is `beta2` ({self.beta2}). Set beta2."
            )

    def _check_inherited(self) -> None:
        defaults = {f.name: f.default for f in fields(GRPOConfig)}
        for name, reason in _REFUSED.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}={getattr(self, name)!r}` would have no effect: {reason}. Remove it.")
        if self.num_generations != 1:
            raise ValueError(
                f"`num_generations={self.num_generations}`: A*-PO samples one completion per prompt. Remove it; "
                "the number of reference samples is `num_value_samples`."
            )
        if self.scale_rewards != "none" or self.vllm_importance_sampling_correction:
            raise ValueError(
                f"`scale_rewards={self.scale_rewards!r}` and `vllm_importance_sampling_correction="
                f"{self.vllm_importance_sampling_correction}` must stay 'none' and False: the regression target is r − V*, "
                "neither scaled nor reweighted. Remove them."
            )
        self._check_sampling()

    def _check_sampling(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be positive to train, got {self.temperature}: greedy completions teach nothing."
            )
        altered = {
            "top_p": self.top_p != 1.0,
            "top_k": self.top_k not in (0, -1, None),
            "min_p": self.min_p not in (None, 0.0),
            "repetition_penalty": self.repetition_penalty != 1.0,
        }
        found = [f"{name}={getattr(self, name)}" for name, is_altered in altered.items() if is_altered]
        if found:
            raise ValueError(
                f"{', '.join(found)} would sample from another distribution than the one that is scored, so ℓ would be "
                "wrong. Remove it (temperature may be changed: both sides use it)."
            )

    def _choose_precision(self) -> None:
        """bf16 only where the GPU really has it: transformers' own check counts a T4's emulation as support."""
        if not torch.cuda.is_available():
            self.use_cpu = True
        elif not self.fp16 and torch.cuda.get_device_capability() < (8, 0):
            if self.bf16:
                raise ValueError(
                    f"`bf16=True`, but {torch.cuda.get_device_name()} has no bf16 arithmetic (it needs compute capability "
                    "8.0). Remove it; fp16 is chosen by itself."
                )
            self.fp16 = True

    def _check_freshness(self) -> None:
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        if self.num_iterations != 1 or steps > self.gradient_accumulation_steps:
            raise ValueError(
                f"`num_iterations={self.num_iterations}` and `steps_per_generation={self.steps_per_generation}` (above "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}) would train on samples of an older "
                "policy, which A*-PO does not correct for. Keep num_iterations=1 and remove steps_per_generation."
            )
        if self.gradient_accumulation_steps % steps:
            raise ValueError(
                f"`gradient_accumulation_steps={self.gradient_accumulation_steps}` is no multiple of `steps_per_generation="
                f"{steps}`, so an update would end in the middle of a generation. Remove steps_per_generation."
            )


def checked_args(model: Any, args: AStarPOConfig | None) -> AStarPOConfig:
    """The configuration, a default one where there is none; a `ValueError` for a model or a class that will not do."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "A*-PO's reference is the model with the adapter off, which a ready PeftModel is not. Pass the base model (merge "
            "an earlier adapter into it first) and a `peft_config`."
        )
    if args is None:
        name = model if isinstance(model, str) else str(model.config._name_or_path)
        return AStarPOConfig(f"{name.rstrip('/').split('/')[-1]}-AStarPO")
    if not isinstance(args, AStarPOConfig):
        raise ValueError(
            f"`args` must be an AStarPOConfig, got {type(args).__name__}. Its fields are GRPOConfig's and more."
        )
    return args
