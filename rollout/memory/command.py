"""`astarpo-plan`: what a run will hold in GPU memory and how long it takes, before anything is loaded."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ...cli import load_recipe, parse_command, run_command
from .cards import GPUS, find_card, gpu_bytes
from .hours import Speeds, Stage, Work, estimate_speeds, stages
from .job import RESERVE
from .plan import PHASES, Plan, RunSizes, describe, plan_run, training_sizes
from .shape import ModelShape

FOLLOW_UPS = 160
"""Tokens between the turns of an episode that are planned for; PAG's own prompts take 95 with SmolLM2's tokenizer."""
KNOWN = {"math": (7500, 500), "gsm8k": (7473, 1319)}
"""Problems of a preset to train on, and to evaluate on."""
USED = 0.6
"""Share of the longest completion that a completion has on average, where nothing was measured: Qwen2.5-1.5B-Instruct's solutions of MATH
have 340 of 512 tokens. Of the longest prompt it is a half."""


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
        max_completion_length (`int`, *optional*, defaults to `1024`):
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
        engine (`str`, *optional*, defaults to `"vllm"`):
            `vllm`, or `transformers`, which samples the trainer's own model.
        dataset_name (`str`, *optional*):
            The problems; how many there are is known of `math` and `gsm8k`.
        num_problems (`int`, *optional*):
            How many problems there are, where that is not known.
        limit (`int`, *optional*):
            Use only so many problems.
        num_evaluated (`int`, *optional*):
            Problems of an evaluation; a preset's own when not given.
        num_samples (`int`, *optional*, defaults to `8`):
            Reference samples of a problem.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            Micro-batches of an update.
        num_train_epochs (`float`, *optional*, defaults to `3`):
            Times that every problem is trained on.
        max_steps (`int`, *optional*):
            Number of updates; else it follows from the epochs.
        mean_completion_length (`float`, *optional*):
            Mean tokens of a completion; as calibrated, or three fifths of the longest, when not given.
        speeds (`str`, *optional*):
            File of `astarpo calibrate`; without one the hours are estimated from the card's specification.
        rounds (`int`, *optional*):
            Plan a run in rounds, whose engine is ended while the trainer works.
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
    max_completion_length: int = field(default=1024, metadata={"help": "Longest completion in tokens."})
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
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the base weights; auto: as stored.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    max_num_seqs: int | None = field(default=None, metadata={"help": "Most completions decoded at once."})
    max_num_batched_tokens: int | None = field(default=None, metadata={"help": "Most tokens of one engine step."})
    kv_cache_gb: float | None = field(default=None, metadata={"help": "Size of the KV cache in GB."})
    cuda_graphs: str = field(
        default="off",
        metadata={"help": "Whether the engine replays decoding steps as CUDA graphs.", "choices": ["off", "on"]},
    )
    engine: str = field(
        default="vllm",
        metadata={
            "help": "vllm, or transformers, which samples the trainer's own model.",
            "choices": ["vllm", "transformers"],
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "The problems; how many there are is known of `math` and `gsm8k`."}
    )
    num_problems: int | None = field(
        default=None, metadata={"help": "How many problems there are, where that is not known."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use only so many problems."})
    num_evaluated: int | None = field(
        default=None, metadata={"help": "Problems of an evaluation. Default: a preset's own."}
    )
    num_samples: int = field(default=8, metadata={"help": "Reference samples of a problem."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of an update."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Times that every problem is trained on."})
    max_steps: int | None = field(
        default=None, metadata={"help": "Number of updates. Default: it follows from the epochs."}
    )
    mean_completion_length: float | None = field(
        default=None,
        metadata={"help": "Mean tokens of a completion. Default: as calibrated, or three fifths of the longest."},
    )
    speeds: str | None = field(
        default=None,
        metadata={"help": "File of `astarpo calibrate`. Default: estimated from the card's specification."},
    )
    rounds: int | None = field(
        default=None, metadata={"help": "Plan a run in rounds, whose engine is ended while the trainer works."}
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
        engine=options.engine,
        in_rounds=options.rounds is not None,
    )


def work(options: PlanOptions, speeds: Speeds | None) -> Work | None:
    """What the run does; None where the number of its problems is not known.

    Raises:
        ValueError: If a number is not positive.
    """
    counts = (options.num_problems, options.limit, options.num_samples, options.gradient_accumulation_steps)
    sizes = (options.num_train_epochs, options.mean_completion_length, options.num_evaluated)
    if any(count is not None and count <= 0 for count in (*counts, *sizes)):
        raise ValueError(
            "num_problems, limit, num_samples, gradient_accumulation_steps, num_train_epochs, mean_completion_length and "
            "num_evaluated must be positive."
        )
    known, evaluated = KNOWN.get(options.dataset_name or "", (None, 0))
    problems = options.num_problems or known
    if problems is None:
        return None
    problems = min(problems, options.limit or problems)
    completions = (options.per_device_train_batch_size or 8) * options.gradient_accumulation_steps
    updates = options.max_steps if options.max_steps and options.max_steps > 0 else None
    prompt, measured = (speeds.prompt_tokens, speeds.completion_tokens) if speeds else (None, None)
    completion = options.mean_completion_length or measured or USED * options.max_completion_length
    if options.episode == "pag" and measured is None:
        completion = 2 * completion + FOLLOW_UPS / 2  # a verification is short, and half of the attempts are revised
    return Work(
        problems,
        options.num_samples,
        updates or math.ceil(problems * options.num_train_epochs / completions),
        completions,
        prompt or options.max_prompt_length / 2,
        completion,
        options.num_evaluated or evaluated,
    )


def plan_hours(options: PlanOptions, shape: ModelShape, plan: Plan) -> tuple[tuple[Stage, ...], str]:
    """The stages with their times, none where they are not known, and where the speeds are from or what is missing."""
    if options.rounds is not None:
        return (), "no hours: those of a run in rounds are not estimated"
    speeds = Speeds.read(options.speeds) if options.speeds else None
    todo = work(options, speeds)
    if todo is None:
        return (), "no hours: name the problems with --dataset_name math or gsm8k, or their number with --num_problems"
    if speeds is None:
        card = find_card(options.gpu)
        if card is None:
            return (), f"no hours: of `{options.gpu}` only the memory is known. Name a card, or a file with --speeds"
        speeds = estimate_speeds(
            card, shape, plan.sizes, todo.prompt_tokens + todo.completion_tokens, options.gpu.upper()
        )
    return stages(todo, speeds), speeds.source


def show(plan: Plan, hours: tuple[Stage, ...], source: str) -> None:
    """Print the plan as two tables, memory and time."""
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
    if not hours:
        console.print(source)
        return
    total = sum(stage.seconds for stage in hours) / 3600
    times = Table("stage", "tokens sampled", "hours", "what shortens it", title=f"{total:.1f} hours")
    for stage in hours:
        times.add_row(stage.name, f"{stage.tokens / 1e6:.2f} million", f"{stage.seconds / 3600:.2f}", stage.shorter)
    console.print(times)
    console.print(source)


def plan_command(options: PlanOptions) -> int:
    """Plan, print, and return 1 where the run does not fit."""
    shape = ModelShape.of(options.model_name_or_path, options.model_revision)
    plan = plan_run(shape, sizes(options, shape.width(options.dtype)), budget(options))
    hours, source = plan_hours(options, shape, plan)
    if options.json:
        total = round(sum(stage.seconds for stage in hours) / 3600, 4) if hours else None
        times = {"hours": total, "stages": [stage.to_json() for stage in hours], "speeds": source}
        print(json.dumps(plan.to_json() | times))
    else:
        show(plan, hours, source)
    return 0 if plan.fits else 1


def recipe_words(words: list[str], sections: Sequence[str], types: Sequence[type]) -> list[str]:
    """The command line with what the recipe named in `--config` says in these sections put before it, so that the words win.

    A command that is about several others, such as the plan of a run, takes from each section what it has an option for.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    found, rest = parser.parse_known_args(words)
    if found.config is None:
        return rest
    settings: dict[str, Any] = {}
    for section in sections:
        settings |= load_recipe(found.config, section)
    known = {f.name for options in types for f in fields(options)}
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
                description="What a run will hold in GPU memory, line by line and phase by phase, and how long each stage takes, "
                "from the model's config alone. Sizes that are not given are chosen so that it fits. --config takes sizes from a "
                "recipe.",
                argv=recipe_words(sys.argv[1:], ("rollout", "train", "plan"), [PlanOptions]),
            )
        )
    )


if __name__ == "__main__":
    main()
