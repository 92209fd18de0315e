"""`astarpo-train`: stage 2, from a reference pool to a LoRA adapter. Also `accelerate launch -m astarpo.trainer`."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli import OptionGroup, parse_command, run_command
from ..rollout.options import EngineOptions

HIDDEN_MODEL = (
    *("trust_remote_code", "attn_implementation", "use_rslora", "use_dora", "load_in_8bit", "bnb_4bit_quant_type"),
    *(
        "use_bnb_nested_quant",
        "bnb_4bit_quant_storage",
        "lora_target_parameters",
        "lora_modules_to_save",
        "lora_task_type",
    ),
)
HIDDEN_TRAINING = (
    *("num_generations", "vllm_mode", "vllm_gpu_memory_utilization", "disable_dropout", "trust_remote_code"),
    *("remove_unused_columns", "model_init_kwargs", "cast_lm_head_to_fp32", "shuffle_dataset", "log_unique_prompts"),
    *("reward_weights", "engine_timeout_s", "probe_rows", "use_vllm", "num_generations_eval"),
)
HIDDEN_ENGINE = ("adapter_dir", "max_num_batched_tokens", "share_base_weights", "ray_workers", "ray_address")


def options() -> list[Any]:
    """The command's groups of options; a function, because defining them loads TRL."""
    from trl import ModelConfig

    from .config import AStarPOConfig, TurnOptions, ValueOptions

    @dataclass
    class PolicyConfig(ModelConfig):
        """TRL's `ModelConfig` with LoRA by default, on all linear layers and without dropout."""

        dtype: str | None = field(
            default="auto", metadata={"help": "Type of the base weights; auto: as stored, float16 on a T4."}
        )
        use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; off: all weights."})
        lora_dropout: float = field(default=0.0, metadata={"help": "Taken as 0: sampling knows no dropout."})
        lora_target_modules: list[str] | None = field(
            default_factory=lambda: ["all-linear"], metadata={"help": "Modules with a LoRA adapter."}
        )

    return [
        OptionGroup(PolicyConfig, "model and LoRA", HIDDEN_MODEL),
        OptionGroup(AStarPOConfig, "A*-PO", HIDDEN_TRAINING),
        OptionGroup(EngineOptions, "engine", HIDDEN_ENGINE),
        OptionGroup(TurnOptions, "episodes"),
        OptionGroup(ValueOptions, "values"),
    ]


def train(
    model_config: Any, args: Any, engine_options: EngineOptions, episode_options: Any, value_options: Any
) -> int:
    """Train, save the adapter into `output_dir`, and print a summary."""
    from trl import get_peft_config, get_quantization_config

    from ..rollout.prompts import load_tokenizer
    from .summary import print_training_summary
    from .trainer import AStarPOTrainer

    if not model_config.model_name_or_path:
        raise ValueError("No model given: set --model_name_or_path to a hub id or a folder.")
    if args.pool is None:
        raise ValueError("Stage 2 needs V*: name a reference pool with --pool, made by `astarpo-rollout`.")
    tokenizer = load_tokenizer(model_config.model_name_or_path, model_config.model_revision)
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": base_dtype(model_config, args),
    }
    trainer = AStarPOTrainer(
        model=model_config.model_name_or_path,
        args=args,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
        engine_options=engine_options,
        episode_options=episode_options,
        value_options=value_options,
    )
    trainer.train(resume_from_checkpoint=_checkpoint(args.resume_from_checkpoint))
    trainer.save_model(args.output_dir)
    trainer.close()
    if trainer.accelerator.is_main_process:
        print_training_summary(trainer.state.log_history, args.output_dir)
    if trainer.interrupt.requested:
        print(f"interrupted after update {trainer.state.global_step}; continue with --resume_from_checkpoint true")
        return 130
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=Path(args.pool).name)
    return 0


def base_dtype(model_config: Any, args: Any) -> str | None:
    """Type of the base weights: as asked for; by itself as stored, and float16 where training is in fp16."""
    return "float16" if args.fp16 and model_config.dtype == "auto" else model_config.dtype


def _checkpoint(value: str | None) -> str | bool | None:
    """The flag's text as `Trainer.train` wants it: a folder, or whether to look for the last checkpoint."""
    if value is None or value.lower() in ("false", "no", "0"):
        return None
    return True if value.lower() in ("true", "yes", "1") else value


def main() -> None:
    """Entry point of `astarpo-train`."""
    # In a script max_prompt_length may come from a GRPO habit; here the help says what it does.
    warnings.filterwarnings("ignore", message="max_prompt_length")

    def command() -> int:
        from .config import BYPASSED, REFUSED

        refused = {**REFUSED, **{name: reason for name, (_, reason) in BYPASSED.items()}}
        return train(
            *parse_command(
                options(),
                section="train",
                prog="astarpo-train",
                description="Stage 2 of A*-PO: train a LoRA adapter (or all weights, with --use_peft false) on the "
                "problems of a reference pool, one on-policy completion per prompt, or one PAG episode with --episode pag.",
                refused=refused,
            )
        )

    run_command(command)


if __name__ == "__main__":
    main()
