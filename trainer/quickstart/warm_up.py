"""A short supervised warm-up of the form of verdicts, for models that hardly ever give one.

It teaches how a verdict is said and nothing of when: attempts are the problem with a number drawn at random, "correct" and "wrong" come
equally often whatever the number, and only the verdict's tokens have a loss.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...rollout.data import Problem
    from ...rollout.episodes.options import EpisodeOptions

VERDICTS = ("The answer is correct.", "The answer is wrong.")
ROWS = 16
LEARNING_RATE = 3e-4


def warm_up(
    model: str,
    tokenizer: "PreTrainedTokenizerBase",
    problems: "list[Problem]",
    prompts: list[list[int]],
    episodes: "EpisodeOptions",
    steps: int,
    seed: int,
    folder: Path,
) -> str:
    """Train a LoRA adapter for a few steps, merge it, and save the model that is the reference from then on.

    Args:
        model (`str`):
            Hub id or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        problems (`list[Problem]`):
            The training problems.
        prompts (`list[list[int]]`):
            Their token ids.
        episodes ([`EpisodeOptions`]):
            What stands before a verification.
        steps (`int`):
            Updates of 16 rows.
        seed (`int`):
            Of the rows.
        folder (`Path`):
            Where the model goes; one that is there already is taken.

    Returns:
        `str`: The model's folder.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    target = folder / f"warmed-{steps}-seed-{seed}"
    if (target / "config.json").is_file():
        return str(target)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(folder / "warm_up"),
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=LEARNING_RATE,
            completion_only_loss=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            seed=seed,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(_rows(tokenizer, problems, prompts, episodes, ROWS * steps, seed)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    merged: Any = trainer.accelerator.unwrap_model(trainer.model)
    merged = merged.merge_and_unload().bfloat16()
    merged.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    return str(target)


def _rows(
    tokenizer: "PreTrainedTokenizerBase",
    problems: "list[Problem]",
    prompts: list[list[int]],
    episodes: "EpisodeOptions",
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Token ids and where the verdict stands in them."""
    draw = random.Random(seed)
    follow_ups = episodes.follow_ups(tokenizer)
    golds = [problem.gold for problem in problems]
    rows = []
    for number in range(count):
        place = draw.randrange(len(problems))
        question = problems[place].question.removeprefix("What is ").removesuffix("?")
        attempt = _ids(tokenizer, f"{question} is {draw.choice(golds)}.")
        verdict = _ids(tokenizer, VERDICTS[number % 2])
        given = [*prompts[place], *attempt, follow_ups.end_of_turn, *follow_ups.verify]
        said = [*verdict, follow_ups.end_of_turn]
        rows.append({"input_ids": given + said, "completion_mask": [0] * len(given) + [1] * len(said)})
    return rows


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
