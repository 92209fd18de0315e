"""A short supervised warm-up of the form of episodes, for models that hardly ever give a verdict.

It teaches how a verification is said and no truth: the answer again, and whether that is what the attempt said. Every number in it
is a sample of the model itself, and nothing is graded. Only the verification has a loss.
"""

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...rollout.files import folder_at_once, text_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...rollout.data import Problem
    from ...rollout.episodes.options import EpisodeOptions

VERDICTS = ("The answer is correct.", "The answer is wrong.")
ROWS = 16
LEARNING_RATE = 1e-3
TEMPERATURE = 0.7
SAMPLES = 8


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
            Where the model goes; one that is there already, of the same model and rows, is taken.

    Returns:
        `str`: The model's folder.

    Raises:
        ValueError: If the model never answers with a number.
    """
    from transformers import AutoModelForCausalLM, set_seed

    asked = [" * ".join(re.findall(r"\d+", problem.question)) for problem in problems]
    target = folder / f"warmed-{steps}-seed-{seed}-{_key(model, prompts, asked, episodes.verify_prompt)}"
    if target.is_dir():
        return str(target)
    set_seed(seed)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")
    answers = _own_answers(reference, tokenizer, prompts, asked)
    if not any(answers):
        raise ValueError(
            f"`{model}` says no number after `{asked[0]} =`, so there is nothing to warm up with. Set warm_up_steps 0, or take "
            "a model that knows arithmetic."
        )
    rows = _rows(tokenizer, prompts, asked, answers, episodes, ROWS * steps, seed)
    merged = _fine_tuned(reference, tokenizer, rows, steps, seed, folder / "warm_up")
    with folder_at_once(target) as scratch:
        merged.save_pretrained(str(scratch))
        tokenizer.save_pretrained(str(scratch))
    return str(target)


def _key(model: str, *words: Any) -> str:
    """What decides the warmed model besides steps and seed, in a few letters."""
    from ...rollout.fingerprint import model_identity

    content = json.dumps([model_identity(model, None), *words, VERDICTS, ROWS, LEARNING_RATE, TEMPERATURE, SAMPLES])
    return text_hash(content)[:8]


def _fine_tuned(
    model: Any, tokenizer: "PreTrainedTokenizerBase", rows: list[dict[str, Any]], steps: int, seed: int, folder: Path
) -> Any:
    """The model with a LoRA adapter of the rows merged into it."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            learning_rate=LEARNING_RATE,
            completion_only_loss=True,
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=5,
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    tuned: Any = trainer.accelerator.unwrap_model(trainer.model)
    return tuned.merge_and_unload().bfloat16()


def _own_answers(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]], asked: list[str]
) -> list[list[str]]:
    """Numbers that the model itself says after `2 * 3 =`, a few for each prompt; right or wrong, nobody looks."""
    from ...rollout.engines.transformers_engine import left_padded

    texts = [[*prompt, *_ids(tokenizer, f"{question} =")] for prompt, question in zip(prompts, asked, strict=True)]
    fill: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_BP, mask_BP = left_padded(texts, fill)
    said = model.generate(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        max_new_tokens=5,
        do_sample=True,
        temperature=TEMPERATURE,
        num_return_sequences=SAMPLES,
        pad_token_id=fill,
    )
    found = [re.match(r" ?(\d+)", text) for text in tokenizer.batch_decode(said[:, ids_BP.shape[1] :])]
    grouped = [found[place : place + SAMPLES] for place in range(0, len(found), SAMPLES)]
    return [[match[1] for match in group if match] for group in grouped]


def _rows(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    asked: list[str],
    answers: list[list[str]],
    episodes: "EpisodeOptions",
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Token ids and where the verification stands in them."""
    draw = random.Random(seed)
    follow_ups = episodes.follow_ups(tokenizer)
    known = [place for place, found in enumerate(answers) if found]
    rows = []
    for number in range(count):
        place = draw.choice(known)
        first = draw.choice(answers[place if number % 2 else draw.choice(known)])
        again = draw.choice(answers[place])
        given = [
            *prompts[place],
            *_ids(tokenizer, f"{asked[place]} = {first}."),
            follow_ups.end_of_turn,
            *follow_ups.verify,
        ]
        said = [*_ids(tokenizer, f"{asked[place]} = {again}. {VERDICTS[first != again]}"), follow_ups.end_of_turn]
        rows.append({"input_ids": given + said, "completion_mask": [0] * len(given) + [1] * len(said)})
    return rows


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
