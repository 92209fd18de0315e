"""`astarpo calibrate`: how fast this machine samples from a model and trains it, in a minute or two, for `astarpo plan --speeds`."""

import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

from ..cli import parse_command, run_command
from ..rollout.memory.command import recipe_words
from ..rollout.memory.hours import Speeds
from ..rollout.options import DataOptions, EngineOptions, ModelOptions

UPDATES = 3
"""The first one warms up and the last one is measured."""


@dataclass
class CalibrateOptions:
    """What is measured."""

    max_completion_length: int = field(default=512, metadata={"help": "Maximum number of tokens of a completion."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Completions of an update."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    output: str = field(default="runs/speeds.json", metadata={"help": "File for `astarpo plan --speeds`."})

    def __post_init__(self):
        if min(self.max_completion_length, self.per_device_train_batch_size, self.lora_r) < 1:
            raise ValueError(
                "max_completion_length, per_device_train_batch_size and lora_r must be at least 1, got "
                f"{self.max_completion_length}, {self.per_device_train_batch_size} and {self.lora_r}."
            )


def calibrate(
    model: ModelOptions, data: DataOptions, options: CalibrateOptions, engine_options: EngineOptions
) -> Speeds:
    """Train for three updates on real problems, with a reward that says nothing, and measure the last one.

    Args:
        model ([`ModelOptions`]):
            The model. A LoRA adapter on all of its linear layers is trained.
        data ([`DataOptions`]):
            The problems, of which as many are taken as an update has completions.
        options ([`CalibrateOptions`]):
            Sizes of the update.
        engine_options ([`EngineOptions`]):
            The engine.
    """
    from datasets import Dataset
    from peft import LoraConfig

    from ..rollout.data import load_from_options
    from ..rollout.prompts import fitting_prompts, load_tokenizer
    from . import AStarPOConfig, AStarPOTrainer

    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems, prompts = fitting_prompts(load_from_options(data, for_evaluation=False), tokenizer, data)
    count = options.per_device_train_batch_size
    rows = [{"prompt": list(problem.messages), "solution": problem.gold} for problem in problems[:count]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = AStarPOTrainer(
            model.model_name_or_path,
            _parity,
            AStarPOConfig(
                output_dir=folder,
                max_steps=UPDATES,
                per_device_train_batch_size=len(rows),
                num_value_samples=2,
                max_prompt_length=data.max_prompt_length or max(map(len, prompts[:count])),
                max_completion_length=options.max_completion_length,
                model_init_kwargs={"dtype": model.dtype, "revision": model.model_revision},
                require_eos=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
            ),
            Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules="all-linear"),
            engine_options=engine_options,
        )
        trainer.train()
        trainer.close()
    return measured([entry for entry in trainer.state.log_history if "step_time" in entry], len(rows))


def measured(entries: list[dict[str, Any]], completions: int) -> Speeds:
    """The speeds of the last of the log's updates, each of so many completions."""
    before, last = (
        {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
        for entry in entries[-2:]
    )
    completion = last["completions/mean_length"]
    tokens = last["num_tokens"] - before["num_tokens"]
    sampling = completions * completion / last["engine/tokens_per_second"]
    return Speeds(
        sampling=last["engine/tokens_per_second"],
        learning=tokens / max(1e-9, last["step_time"] - sampling),
        source="measured on this machine by `astarpo calibrate`",
        prompt_tokens=tokens / completions - completion,
        completion_tokens=completion,
    )


def _parity(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """A reward that neither all completions earn nor none, whatever the model can do."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def run(model: ModelOptions, data: DataOptions, options: CalibrateOptions, engine_options: EngineOptions) -> int:
    """Calibrate, write the file and print what to type next."""
    speeds = calibrate(model, data, options, engine_options)
    speeds.write(options.output)
    print(
        f"samples {speeds.sampling:,.0f} tokens/s, learns from {speeds.learning:,.0f} tokens/s; prompts have "
        f"{speeds.prompt_tokens:.0f} tokens and completions {speeds.completion_tokens:.0f}\n"
        f"hours of a run: astarpo plan --speeds {options.output} ..."
    )
    return 0


def main() -> None:
    """Entry point of `astarpo calibrate`."""
    types = [ModelOptions, DataOptions, CalibrateOptions, EngineOptions]
    run_command(
        lambda: run(
            *parse_command(
                types,
                section="train",
                prog="astarpo calibrate",
                description="Measure in a minute or two how fast this machine samples from a model and trains a LoRA adapter on it. "
                "`astarpo plan --speeds FILE` then says how long a run takes. --config takes sizes from a recipe.",
                argv=recipe_words(sys.argv[1:], ("rollout", "train"), types),
            )
        )
    )


if __name__ == "__main__":
    main()
