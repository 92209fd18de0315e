"""`astarpo-plan`: what a run will hold in GPU memory, before anything is loaded."""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from ...cli import load_recipe, parse_command, run_command
from .job import RESERVE
from .plan import PHASES, Plan, RunSizes, describe, plan_run, training_sizes
from .shape import ModelShape

GPUS = {
    "t4": 15.8e9,
    "v100": 16.6e9,
    "v100-32gb": 33.4e9,
    "3060": 12.6e9,
    "4060ti": 16.8e9,
    "4060ti-8gb": 8.4e9,
    "3090": 25.2e9,
    "4090": 25.2e9,
    "5090": 33.5e9,
    "l4": 24.1e9,
    "l40s": 47.3e9,
    "a10": 24.1e9,
    "a6000": 50.5e9,
    "a100": 42.3e9,
    "a100-80gb": 84.9e9,
    "h100": 85.0e9,
    "h200": 149.5e9,
}
"""Bytes that a process can have: what `nvidia-smi` shows as total, less what the driver keeps. An A100 is planned with 40 GB."""
FOLLOW_UPS = 160
"""Tokens between the turns of an episode that are planned for; PAG's own prompts take 95 with SmolLM2's tokenizer."""


@dataclass
class PlanOptions:
    """The run to plan; sizes that are not given are chosen.

    Args:
        model_name_or_path (`str`):
            Hub id or folder; only its config is read.
        model_revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        gpu (`str`, *optional*, defaults to `"t4"`):
            A name such as `t4` or `rtx 4090`, or a size such as `24GB`.
        budget_gb (`float`, *optional*):
            What the run may take, in GB (10⁹ bytes); the GPU less 5 % when not given.
        max_prompt_length (`int`, *optional*, defaults to `512`):
            Longest prompt in tokens.
        max_completion_length (`int`, *optional*, defaults to `768`):
            Longest completion in tokens; with episodes, longest turn.
        episode (`str`, *optional*, defaults to `"single"`):
            `single` or `pag`: an episode is three turns and what stands between them.
        use_peft (`bool`, *optional*, defaults to `True`):
            Whether a LoRA adapter is trained, or all weights.
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapter.
        per_device_train_batch_size (`int`, *optional*):
            Completions of a micro-batch; the trainer divides it into as many passes as memory asks for.
        gradient_checkpointing (`bool`, *optional*):
            Whether blocks are computed again in the backward pass.
        policy_link (`str`, *optional*, defaults to `"auto"`):
            The policy's way to the engine.
        share_base_weights (`str`, *optional*, defaults to `"auto"`):
            Whether trainer and engine hold one copy of the base weights: `on`, `off`, or `auto`, which is on for LoRA.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the base weights; as stored when `auto`.
        max_num_seqs (`int`, *optional*):
            Most completions decoded at once.
        max_num_batched_tokens (`int`, *optional*):
            Most tokens of one engine step.
        kv_cache_gb (`float`, *optional*):
            Size of the KV cache in GB.
        cuda_graphs (`str`, *optional*, defaults to `"off"`):
            Whether the engine replays decoding steps as CUDA graphs: `off` or `on`.
        json (`bool`, *optional*, defaults to `False`):
            Print one JSON object.
    """

    model_name_or_path: str = field(
        metadata={"help": "Hub id or folder of the model; only its config is read.", "aliases": ["--model"]}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    gpu: str = field(default="t4", metadata={"help": f"{', '.join(GPUS)}, or a size such as 24GB."})
    budget_gb: float | None = field(
        default=None, metadata={"help": "What the run may take, in GB; the GPU less a twentieth when not given."}
    )
    max_prompt_length: int = field(default=512, metadata={"help": "Longest prompt in tokens."})
    max_completion_length: int = field(default=768, metadata={"help": "Longest completion in tokens."})
    episode: str = field(
        default="single",
        metadata={"help": "Completions, or PAG episodes of three turns.", "choices": ["single", "pag"]},
    )
    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; off: all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Completions of a micro-batch, divided into as many passes as needed."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Whether blocks are computed again in the backward pass."}
    )
    policy_link: str = field(
        default="auto",
        metadata={
            "help": "The policy's way to the engine.",
            "choices": ["auto", "inline", "adapter", "copied"],
        },
    )
    share_base_weights: str = field(
        default="auto",
        metadata={
            "help": "Whether trainer and engine hold one copy of the base weights; auto: with LoRA.",
            "choices": ["auto", "on", "off"],
        },
    )
    dtype: str = field(default="auto", metadata={"help": "Type of the base weights; auto: as stored."})
    max_num_seqs: int | None = field(default=None, metadata={"help": "Most completions decoded at once."})
    max_num_batched_tokens: int | None = field(default=None, metadata={"help": "Most tokens of one engine step."})
    kv_cache_gb: float | None = field(default=None, metadata={"help": "Size of the KV cache in GB."})
    cuda_graphs: str = field(
        default="off",
        metadata={"help": "Whether the engine replays decoding steps as CUDA graphs.", "choices": ["off", "on"]},
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object."})


def budget(options: PlanOptions) -> int:
    """Bytes that the run may take.

    Raises:
        ValueError: If the GPU is not known, or the budget is more than it has.
    """
    size = gpu_bytes(options.gpu)
    if options.budget_gb is None:
        return int(size * (1 - RESERVE))
    if not 0 < options.budget_gb * 1e9 <= size:
        raise ValueError(
            f"--budget_gb {options.budget_gb} is not between 0 and what the GPU has, {size / 1e9:.1f} GB."
        )
    return int(options.budget_gb * 1e9)


def gpu_bytes(name: str) -> float:
    """Bytes that a process can have of a card.

    Args:
        name (`str`):
            A name as people write it (`t4`, `RTX 4090`, `A100-80GB`), or a size (`24GB`, which is 24 · 10⁹ bytes).

    Raises:
        ValueError: If the name is not known.
    """
    plain = re.sub(r"nvidia|geforce|rtx|tesla|quadro|[\s_-]", "", name.lower())
    known = {card.replace("-", ""): size for card, size in GPUS.items()}
    if plain in known:
        return known[plain]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)gb", plain)
    if size is None or float(size[1]) == 0:
        raise ValueError(f"`--gpu {name}` is not known. Name {', '.join(GPUS)}, or a size such as 24GB.")
    return float(size[1]) * 1e9


def sizes(options: PlanOptions, width: int) -> RunSizes:
    """The run's sizes as the planner wants them, with weights of `width` bytes."""
    completion = options.max_completion_length
    if options.episode == "pag":
        completion = 3 * completion + FOLLOW_UPS
    return training_sizes(
        options.max_prompt_length,
        completion,
        width=width,
        rank=options.lora_r if options.use_peft else None,
        policy_link=options.policy_link,
        share_base_weights=options.share_base_weights != "off",
        gradient_checkpointing=options.gradient_checkpointing,
        batch=options.per_device_train_batch_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_gb=options.kv_cache_gb,
        cuda_graphs=options.cuda_graphs == "on",
    )


def show(plan: Plan) -> None:
    """Print the plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("GB", *PHASES, title=f"Peak {plan.peak / 1e9:.2f} GB of {plan.budget / 1e9:.2f} GB")
    for line in plan.lines:
        held = f"{line.bytes / 1e9:.3f}"
        table.add_row(line.name, *(held if phase in line.phases else "" for phase in PHASES))
    table.add_section()
    table.add_row("sum", *(f"{plan.total(phase) / 1e9:.2f}" for phase in PHASES), style="bold")
    console = Console()
    console.print(table)
    console.print(describe(plan))
    console.print("fits" if plan.fits else f"does not fit: {plan.advice}", style="green" if plan.fits else "red")


def plan_command(options: PlanOptions) -> int:
    """Plan, print, and return 1 where the run does not fit."""
    shape = ModelShape.of(options.model_name_or_path, options.model_revision)
    plan = plan_run(shape, sizes(options, shape.width(options.dtype)), budget(options))
    if options.json:
        print(json.dumps(plan.to_json()))
    else:
        show(plan)
    return 0 if plan.fits else 1


def with_recipe(words: list[str]) -> list[str]:
    """The command line with what the recipe named in `--config` says of memory put before it, so that the words win."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(words)
    if found.config is None:
        return rest
    settings: dict[str, Any] = {}
    for section in ("rollout", "train", "plan"):
        settings |= load_recipe(found.config, section)
    known = {f.name for f in fields(PlanOptions)}
    said = {name: value for name, value in settings.items() if name in known and value is not None}
    return [word for name, value in said.items() for word in (f"--{name}", str(value))] + rest


def main() -> None:
    """Entry point of `astarpo-plan`."""
    run_command(
        lambda: plan_command(
            *parse_command(
                [PlanOptions],
                section="plan",
                prog="astarpo-plan",
                description="What a run will hold in GPU memory, line by line and phase by phase, from the model's config "
                "alone. Sizes that are not given are chosen so that it fits. --config takes sizes from a recipe.",
                argv=with_recipe(sys.argv[1:]),
            )
        )
    )


if __name__ == "__main__":
    main()
