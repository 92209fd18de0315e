"""`AStarPOConfig`: `TrainingArguments` with the fields of A*-PO, under GRPO's names wherever they mean the same."""

import functools
import math
import warnings
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ..rollout.episode import EpisodeKind
from ..rollout.options import EpisodeOptions
from .callbacks import parse_deadline

_NO_GROUPS = "A*-PO has no groups: its baseline is V*, from stage 1"
_NO_RATIO = "A*-PO has no importance ratio and no clipping (for the engine's own deviation see `mismatch_correction`)"
_FIXED_ENTROPY = "the entropy bonus has one fixed weight, `entropy_coef`"
_ONE_GENERATION = "an update samples all of its completions at once, from the present policy"
_OWN_ENGINE = "the engine is astarpo's own; set its sizes with EngineOptions"
_SAME_DISTRIBUTION = "completions must come from the distribution that is scored; only the temperature may be changed"
_TWO_MODELS = "V* belongs to the frozen reference; a moving one would make it stale"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("scale_rewards", "multi_objective_aggregation"), _NO_GROUPS),
    **dict.fromkeys(
        "loss_type epsilon epsilon_high delta importance_sampling_level off_policy_mask_threshold sapo_temperature_neg "
        "sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg use_bias_correction_kl "
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min vllm_importance_sampling_cap".split(),
        _NO_RATIO,
    ),
    **dict.fromkeys(
        "use_adaptive_entropy top_entropy_quantile entropy_coef_min entropy_coef_max entropy_coef_delta "
        "entropy_target".split(),
        _FIXED_ENTROPY,
    ),
    **dict.fromkeys(("num_iterations", "steps_per_generation", "generation_batch_size"), _ONE_GENERATION),
    **dict.fromkeys(
        "vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host "
        "vllm_server_port vllm_server_timeout vllm_group_port vllm_max_model_length vllm_tensor_parallel_size "
        "generation_kwargs cache_implementation use_transformers_continuous_batching use_transformers_paged "
        "transformers_continuous_batching_config".split(),
        _OWN_ENGINE,
    ),
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty"), _SAME_DISTRIBUTION),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _TWO_MODELS),
    "beta": "A*-PO's KL temperature is `beta2`",
    "mask_truncated_completions": "a truncated completion has a reward; see `require_eos`",
    "max_tool_calling_iterations": "tools are not supported",
    "router_aux_loss_coef": "the A*-PO loss has no router term",
    "ds3_gather_for_generation": "the engine holds whole weights of its own",
    "pad_to_multiple_of": "rows are scored without padding",
    "log_multimodal": "prompts with images are not supported",
    "trust_remote_code": "astarpo runs no code that comes with a model",
    "log_completions_hub_repo": "completions stay in output_dir/completions",
}
"""Fields of `GRPOConfig` that would change the objective or do nothing, and why. Each is refused in one sentence."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "scale_rewards": ("none", False),
    "beta": (0.0,),
    "num_iterations": (1,),
    "top_p": (1.0,),
    "top_k": (0, -1, None),
    "min_p": (0.0, None),
    "repetition_penalty": (1.0,),
    "vllm_importance_sampling_correction": (False,),
    "mask_truncated_completions": (False,),
    "sync_ref_model": (False,),
    "trust_remote_code": (False,),
}
"""Values of these fields that say what A*-PO does anyway."""

BYPASSED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (False, "the trainer splits a pass that runs out of memory by itself"),
    "enable_jit_checkpoint": (False, "the trainer saves a checkpoint on SIGTERM by itself"),
    "label_smoothing_factor": (0.0, "the loss has no labels"),
    "neftune_noise_alpha": (None, "noise in the policy's embeddings would make its log-probs wrong"),
    **dict.fromkeys(
        ("fp16_full_eval", "bf16_full_eval"), (False, "evaluation scores with the weights that are trained")
    ),
    "label_names": (None, "the loss has no labels"),
    "use_liger_kernel": (False, "log-probs come from the trainer's own language-model head"),
    "liger_kernel_config": (None, "log-probs come from the trainer's own language-model head"),
    "logging_nan_inf_filter": (
        True,
        "an update whose gradient is not finite is left out and counted in `skipped_updates`",
    ),
    "parallelism_config": (None, "every process scores whole completions with a whole model"),
    "ignore_data_skip": (False, "a resumed run goes on with the prompts that the uninterrupted one would have taken"),
    "dataloader_drop_last": (False, "no batch is ever short, so no row is dropped"),
    "dataloader_in_order": (True, "the order of prompts follows from the seed"),
    "data_seed": (None, "the order of prompts follows from `seed`"),
    "group_by_length": (False, "the order of prompts follows from the seed"),
    "length_column_name": ("length", "the order of prompts follows from the seed, not from lengths"),
    "train_sampling_strategy": ("random", "the order of prompts follows from the seed; see `shuffle_dataset`"),
    "batch_eval_metrics": (False, "evaluation reports rewards, not metrics of logits"),
    "eval_do_concat_batches": (True, "evaluation reports rewards, not metrics of logits"),
    "include_for_metrics": ([], "evaluation reports rewards, not metrics of logits"),
    "prediction_loss_only": (False, "evaluation reports rewards"),
    "average_tokens_across_devices": (True, "the loss is a mean over the episodes of all processes"),
    "remove_unused_columns": (False, "reward functions see every column of the data set"),
}
"""Fields of `TrainingArguments` that this trainer does not read: the one value allowed, and why."""


def _refusing(init: Any) -> Any:
    """Refuse, by name and in one sentence, arguments that `GRPOConfig` has and this class has not."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in [name for name in kwargs if name in REFUSED]:
            value = kwargs.pop(name)
            if value not in NEUTRAL.get(name, ()):
                raise ValueError(f"`{name}={value!r}` is not an option of AStarPOConfig: {REFUSED[name]}.")
        init(self, *args, **kwargs)

    return __init__


@dataclass
class AStarPOConfig(TrainingArguments):
    r"""
    Configuration class for the [`AStarPOTrainer`].

    The fields are those of [`~transformers.TrainingArguments`] and these. Where a field of [`~trl.GRPOConfig`] means the same,
    it has the same name; fields that the A*-PO loss has no use for are refused in one sentence. Defaults that differ from
    `TrainingArguments`: `learning_rate` follows what is trained (1e-5 for LoRA, 1e-6 for all weights), `logging_steps=10`, `bf16` unless `fp16` is set, `gradient_checkpointing=None`
    (planned), `remove_unused_columns=False`, `ddp_broadcast_buffers=False`.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]  # noqa: RUF012

    # Stage 1
    beta1: float = field(default=0.5, metadata={"help": "Temperature of V*, applied to the pool's rewards."})
    num_value_samples: int = field(
        default=8, metadata={"help": "Reference samples per prompt that V* is computed from; the pool may hold more."}
    )
    filter_all_incorrect: bool = field(
        default=False,
        metadata={
            "help": "Leave out prompts that the reference never solved: solved_between from 1 to num_value_samples."
        },
    )
    pool: str | None = field(default=None, metadata={"help": "Folder or hub id of the reference pool."})

    accept_undeclared: bool = field(
        default=False,
        metadata={"help": "Train on an imported pool although it does not say what it was sampled with."},
    )

    # Stage 2
    beta2: float = field(default=1e-3, metadata={"help": "KL temperature of the regression."})
    require_eos: bool = field(
        default=True,
        metadata={
            "help": "Whether a completion truncated at max_completion_length earns reward 0. The pool must follow the same rule."
        },
    )
    entropy_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the entropy bonus (mean over tokens) in the loss, which is divided by 2 beta2: the authors' 0.001 is "
            "0.5 here."
        },
    )
    mismatch_correction: str = field(
        default="off",
        metadata={
            "help": "sequence_mis: weigh each completion by the ratio of the trainer's probability to the engine's, and leave it out "
            "above 3. off: do not; mismatch/* shows what that costs.",
            "choices": ["off", "sequence_mis"],
        },
    )
    probe_rows: int = field(
        default=4,
        metadata={
            "help": "Completions on which the engine is compared with an earlier policy where it is far from the present one; 0 turns "
            "the check off."
        },
    )

    # Under GRPO's names
    learning_rate: float | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Learning rate. Default: 1e-5 for a LoRA adapter, the paper's 1e-6 for all weights."},
    )
    max_completion_length: int | None = field(
        default=1024, metadata={"help": "Maximum number of tokens of a completion, or of one turn of an episode."}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Longest prompt allowed, in tokens. A longer one is an error, never truncated."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; log-probs are computed at the same."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the reward functions; all 1 by default."}
    )
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in an evaluation, the k of avg@k; 1 by default."}
    )
    shuffle_dataset: bool | None = field(default=True, metadata={"help": "Whether to shuffle the training set."})
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template, as a dictionary (JSON)."}
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` for a model given by name, as a dictionary (JSON)."},
    )
    cast_lm_head_to_fp32: bool = field(
        default=False, metadata={"help": "Compute the logits in float32; the engine then keeps its own base weights."}
    )
    use_vllm: bool = field(
        default=True,
        metadata={
            "help": "Sample with the engine of EngineOptions (vLLM by default). Off: `generate` of transformers."
        },
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Show some completions of every update in the terminal and in the trackers."}
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "How many completions to show; all by default."}
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "Show at most one completion per prompt."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Always on: completions are sampled and scored without dropout."}
    )
    # GRPO scripts of TRL 1.7 and later read it here. No field: `ModelConfig` of earlier ones has the option itself, and one
    # parser cannot take it twice.
    trust_remote_code: ClassVar[bool] = False

    # The run
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

    # Taken from GRPO scripts with a warning
    num_generations: int | None = field(
        default=None, metadata={"help": "From GRPO; ignored, since A*-PO samples one completion per prompt."}
    )
    vllm_mode: str | None = field(
        default=None,
        metadata={"help": "From GRPO; `colocate` is what happens anyway, for `server` set --engine server."},
    )
    vllm_gpu_memory_utilization: float | None = field(
        default=None,
        metadata={
            "help": "From GRPO: share of the GPU for the engine. What its weights and its steps leave of that becomes kv_cache_gb. By default "
            "memory is planned in bytes (--budget_gb)."
        },
    )

    # Defaults that differ from TrainingArguments
    logging_steps: float = field(default=10, metadata={"help": "Log every that many updates."})
    remove_unused_columns: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=False, metadata={"help": "Always off: reward functions see every column."}
    )
    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Train in bfloat16; on unless fp16 is set or the GPU has no bf16 arithmetic."}
    )
    gradient_checkpointing: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass. Default: planned; without a GPU, on if they would take a quarter of the memory."
        },
    )

    def __post_init__(self):
        self._check_own()
        self._check_inherited()
        self._warn_of_grpo()
        self._choose_precision()
        if self.ddp_broadcast_buffers is None:
            # DDP would broadcast them (they are constant) at every pass, and processes may make different numbers of passes.
            self.ddp_broadcast_buffers = False
        super().__post_init__()
        if getattr(self.accelerator_config, "split_batches", False):
            raise ValueError(
                "`split_batches` of `accelerator_config` is refused: per_device_train_batch_size is the rows of one process. "
                "Remove it, and divide that by the number of processes."
            )

    def _check_own(self) -> None:
        for name in ("beta1", "beta2"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.num_value_samples < 1:
            raise ValueError(f"`num_value_samples` must be at least 1, got {self.num_value_samples}.")
        if not self.temperature > 0:
            raise ValueError(
                f"`temperature` must be positive to train, got {self.temperature}: greedy completions teach nothing."
            )
        if self.mismatch_correction not in ("off", "sequence_mis"):
            raise ValueError(
                f"There is no mismatch_correction `{self.mismatch_correction}`. Choose off or sequence_mis."
            )
        for name in ("probe_rows", "engine_timeout_s", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 (off) or more, got {getattr(self, name)}.")
        if self.save_by is not None:
            parse_deadline(self.save_by, datetime.now())

    def _check_inherited(self) -> None:
        for name, (value, reason) in BYPASSED.items():
            given = getattr(self, name, value)
            if given != value and getattr(given, "value", given) != value:
                raise ValueError(f"`{name}={given!r}` would have no effect: {reason}. Remove it.")
        if not self.disable_dropout:
            raise ValueError(
                "`disable_dropout=False` is refused: sampling knows no dropout, so scoring would disagree."
            )

    def _warn_of_grpo(self) -> None:
        """Fields that nearly every GRPO script sets: say once what happens instead, and forget them."""
        taken = {
            "num_generations": "A*-PO samples one completion per prompt; the number of reference samples is num_value_samples",
            "vllm_mode": "the engine runs in this process; for a vLLM server pass EngineOptions(engine='server', server_url=...)",
        }
        given = [name for name in taken if getattr(self, name) is not None]
        sentences = [f"{name}={getattr(self, name)!r}: {taken[name]}" for name in given]
        if self.max_prompt_length is not None:  # last, so that the commands can leave it out where it stands alone
            sentences.append(
                f"max_prompt_length={self.max_prompt_length}: a longer prompt is an error, none is truncated"
            )
        if sentences:
            warnings.warn(f"{'. '.join(sentences)}.", stacklevel=5)
        for name in given:
            setattr(self, name, None)

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
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16  # pyright: ignore[reportIncompatibleVariableOverride]


AStarPOConfig.__init__ = _refusing(AStarPOConfig.__init__)  # pyright: ignore[reportAttributeAccessIssue]


def completion_length(args: AStarPOConfig) -> int:
    """Most tokens of a completion, or of one turn; `max_completion_length=None` is the default of all commands."""
    return args.max_completion_length or 1024


VALUES, PRIORS, ESTIMATES = ("posterior", "critic"), ("constant", "network"), ("optimal", "mean")


@dataclass
class ValueOptions:
    """Where V comes from."""

    value: str = field(
        default="posterior",
        metadata={
            "help": "posterior: V from the chance of success, by reference samples, value_prior and value_tracking. critic: V learnt from "
            "what the policy earns, without reference samples.",
            "choices": list(VALUES),
        },
    )
    value_prior: str = field(
        default="constant",
        metadata={
            "help": "What is expected of a state before its own samples are looked at: the mean by role and label (constant), or a "
            "network on the reference's hidden states where it beats that.",
            "choices": list(PRIORS),
        },
    )
    value_kappa: float | None = field(
        default=None,
        metadata={
            "help": "How many reference samples the prior is worth; 0 leaves V to a prompt's own samples. Default: fitted to the pool with "
            "value_prior network or value_tracking, else 0."
        },
    )
    value_network: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an earlier run whose value network is the prior, instead of training one; with value_prior network."
        },
    )
    value_tracking: bool = field(
        default=False,
        metadata={
            "help": "Let V follow the policy: by what each prompt, and all prompts together, have earned in earlier updates."
        },
    )
    value_estimate: str = field(
        default="optimal",
        metadata={
            "help": "optimal: V* at beta1. mean: the mean reward, beta1 at infinity.",
            "choices": list(ESTIMATES),
        },
    )
    solved_between: list[int] | None = field(
        default=None,
        metadata={
            "help": "LO HI: train only on prompts that the reference solved at least LO and at most HI times in num_value_samples."
        },
    )

    def __post_init__(self):
        choices = {"value": VALUES, "value_prior": PRIORS, "value_estimate": ESTIMATES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"There is no {name} `{getattr(self, name)}`. Choose {' or '.join(allowed)}.")
        if self.value_kappa is not None and not (math.isfinite(self.value_kappa) and self.value_kappa >= 0):
            raise ValueError(f"value_kappa must be a number of at least 0, got {self.value_kappa}.")
        if self.value_network is not None and self.value_prior != "network":
            raise ValueError(
                "value_network names a network that nothing would read: set value_prior=network too, or remove it."
            )
        if self.value == "critic":
            defaults = ValueOptions()
            names = ("value_prior", "value_kappa", "value_tracking", "value_estimate", "solved_between")
            found = [name for name in names if getattr(self, name) != getattr(defaults, name)]
            if found:
                raise ValueError(
                    f"{', '.join(found)} has no effect with value=critic, which reads no reference samples."
                )

    @property
    def kappa(self) -> float | None:
        """κ; None where it is fitted to the pool."""
        if self.value_kappa is None and self.value_prior == "constant" and not self.value_tracking:
            return 0.0
        return self.value_kappa

    @property
    def reads_chances(self) -> bool:
        """Whether V of a prompt is more than its own reference samples say: then rewards must be 0 or 1."""
        return self.kappa != 0 or self.value_tracking

    def temperature(self, beta1: float) -> float:
        """Temperature of V in rewards: β1 for V*, infinity for the mean reward."""
        return math.inf if self.value_estimate == "mean" else beta1

    def solved_range(self, args: AStarPOConfig) -> tuple[int, int]:
        """How often the reference must have solved a prompt that is trained on: at least, and at most.

        Raises:
            ValueError: If that is no range, or is said twice.
        """
        if self.solved_between is None:
            return int(args.filter_all_incorrect), args.num_value_samples
        if args.filter_all_incorrect:
            raise ValueError("filter_all_incorrect is solved_between from 1 on: set one of the two.")
        if len(self.solved_between) != 2 or not (
            0 <= self.solved_between[0] <= self.solved_between[1] <= args.num_value_samples
        ):
            raise ValueError(
                f"solved_between must be two numbers between 0 and num_value_samples ({args.num_value_samples}), the lower one first, "
                f"got {self.solved_between}."
            )
        return self.solved_between[0], self.solved_between[1]


PARTS, LAGGED, CLOSING = ("both", "sampler", "trainer"), ("recomputed", "stored"), ("auto", "on", "off")


ROUND_PLACES = ("rounds", "part", "trainers", "rounds_dir", "close_engine")
"""Fields of `RoundOptions` that say how long, who and where: with others the run is the same."""


@dataclass
class RoundOptions:
    """Training in rounds: sample with the engine alone, then train on those samples with the trainer alone."""

    rounds: int | None = field(
        default=None,
        metadata={"help": "Sample, then train, so many times."},
    )
    updates_per_round: int = field(default=16, metadata={"help": "Updates of a round, at most."})
    num_samples: int = field(default=4, metadata={"help": "Completions a prompt in a round; V is that of its others."})
    num_iterations: int = field(default=1, metadata={"help": "Updates that use a completion of a round."})
    lag: int | None = field(
        default=None,
        metadata={
            "help": "A round is sampled by the adapter with which the round so many before it began. Default: 0, and 1 for parts on their "
            "own, which then work at the same time."
        },
    )
    part: str = field(
        default="both",
        metadata={
            "help": "Which part of the rounds this process does; sampler and trainer share only rounds_dir.",
            "choices": list(PARTS),
        },
    )
    trainers: int = field(
        default=1,
        metadata={"help": "For --part sampler: processes of the trainer, which decide how many prompts a round has."},
    )
    rounds_dir: str | None = field(
        default=None, metadata={"help": "Folder of the rounds' samples and adapters. Default: output_dir/rounds."}
    )
    close_engine: str = field(
        default="auto",
        metadata={
            "help": "Whether the engine is ended while the trainer works, so that each has the whole memory: on, off, or auto (on a GPU).",
            "choices": list(CLOSING),
        },
    )
    lagged_logprobs: str = field(
        default="recomputed",
        metadata={
            "help": "Log-probs of the policy that sampled: recomputed by the trainer, or as stored by the engine, which saves a pass.",
            "choices": list(LAGGED),
        },
    )
    least_effective_share: float = field(
        default=0.5,
        metadata={
            "help": "End a round, without the update, where its effective sample size is below this share of its completions; 0: never."
        },
    )

    def __post_init__(self):
        for name in ("rounds", "updates_per_round", "num_iterations", "trainers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")
        if self.num_samples < 2:
            raise ValueError(
                f"`--num_samples` must be at least 2, got {self.num_samples}: V of a completion is that of the others of its prompt."
            )
        if self.lag is not None and self.lag < 0:
            raise ValueError(f"`--lag` must be at least 0, got {self.lag}.")
        for name, allowed in (("part", PARTS), ("lagged_logprobs", LAGGED), ("close_engine", CLOSING)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"There is no {name} `{getattr(self, name)}`. Choose {', '.join(allowed)}.")
        if not 0 <= self.least_effective_share < 1:
            raise ValueError(
                f"`--least_effective_share` must be at least 0 and below 1, got {self.least_effective_share}."
            )
        if self.rounds is None:
            changed = [one.name for one in fields(self) if getattr(self, one.name) != one.default]
            if changed:
                raise ValueError(f"`--{changed[0]}` is for training in rounds: set --rounds too, or remove it.")

    @property
    def bound(self) -> int:
        """The lag in rounds."""
        return self.lag if self.lag is not None else int(self.part != "both")

    @property
    def most_updates(self) -> int:
        """Updates of a run, at most."""
        assert self.rounds is not None
        return self.rounds * self.updates_per_round

    def prompts_per_round(self, update_rows: int) -> int:
        """Prompts whose completions are enough for a round's updates of `update_rows`."""
        return math.ceil(self.updates_per_round * update_rows / (self.num_samples * self.num_iterations))


@dataclass
class TurnOptions(EpisodeOptions):
    """The kind of episode, and the weights of its turns in the loss."""

    alpha: float = field(default=1.0, metadata={"help": "PAG: weight of acc2 - acc1 in the revision's reward."})
    turn_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights in the loss, one number a turn; all 1 by default."}
    )
    role_weighting: bool = field(
        default=False, metadata={"help": "Divide weights by the spread of the role's residuals in earlier updates."}
    )
    balance_labels: bool = field(
        default=False,
        metadata={
            "help": "Let turns that judge a right and a wrong attempt count alike in each update (PAG's verifications)."
        },
    )
    centre_residuals: bool = field(
        default=False, metadata={"help": "Add to V the mean residual of earlier updates for the same role and label."}
    )


def check_turns(options: TurnOptions, kind: EpisodeKind) -> None:
    """Raise a `ValueError` where the options do not suit the kind of episode; the message names the fix."""
    turns = len(kind.roles)
    if options.turn_weights is not None:
        weights = options.turn_weights
        if len(weights) != turns or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"turn_weights must be one number of at least 0 for each turn, not all 0 ({', '.join(kind.roles)}), got "
                f"{weights}."
            )
    lagged = [name for name in ("role_weighting", "balance_labels", "centre_residuals") if getattr(options, name)]
    if turns == 1:
        found = [*lagged, *(name for name in ("alpha",) if getattr(options, name) != 1.0)]
        found += ["turn_weights"] if options.turn_weights not in (None, [1.0]) else []
        if found:
            raise ValueError(f"{', '.join(found)} has no effect on completions. Set --episode pag, or remove it.")
    if options.balance_labels and set(kind.answers) == set(kind.roles):
        raise ValueError(f"balance_labels has no effect: every turn of `{kind.name}` is an answer. Remove it.")
