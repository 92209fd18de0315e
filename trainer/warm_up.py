"""The quickstart's warm-up: a few supervised updates for models that hardly ever give a verdict.

It teaches the form of a verification and no truth: the answer again, and whether that is what the attempt said. Every number
in it is a sample of the model itself, and nothing is graded. Only the verification has a loss.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..rollout.data import Problem
from ..rollout.engines.transformers_engine import left_padded
from ..rollout.episode import EpisodeKind, FollowUps
from ..rollout.files import folder_at_once, text_hash
from ..rollout.fingerprint import model_identity
from ..rollout.prompts import tokenize_prompts

VERDICTS = ("The answer is correct.", "The answer is wrong.")
ROWS, LEARNING_RATE, TEMPERATURE, SAMPLES = 16, 1e-3, 0.7, 8


def warm_up(
    model: str, tokenizer: Any, problems: Sequence[Problem], kind: EpisodeKind, steps: int, seed: int, folder: Path
) -> str:
    """Train a LoRA adapter for a few steps, merge it, and save the model that is the reference from then on.

    Args:
        model (`str`):
            Hub id or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        problems (`Sequence[Problem]`):
            Products of the times tables.
        kind ([`EpisodeKind`]):
            PAG, whose prompt stands before a verification.
        steps (`int`):
            Updates of 16 rows.
        seed (`int`):
            Seed of the rows and of the updates.
        folder (`Path`):
            Where the model is saved. One of the same model, rows and seed that is there already is taken.

    Returns:
        `str`: The model's folder.

    Raises:
        ValueError: If the model never answers with a number.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, set_seed
    from trl import SFTConfig, SFTTrainer

    prompts = tokenize_prompts(problems, tokenizer)
    asked = [" * ".join(re.findall(r"\d+", problem.question)) for problem in problems]
    decides = [model_identity(model, None), prompts, asked, kind.fingerprint(), VERDICTS, ROWS, LEARNING_RATE]
    key = text_hash(json.dumps([*decides, TEMPERATURE, SAMPLES]))[:8]
    target = folder / f"warmed-{steps}-seed-{seed}-{key}"
    if target.is_dir():
        return str(target)
    set_seed(seed)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")
    answers = own_answers(reference, tokenizer, prompts, asked)
    if not any(answers):
        raise ValueError(
            f"`{model}` says no number after `{asked[0]} =`, so there is nothing to warm up with. Set warm_up_steps 0, or take "
            "a model that knows arithmetic."
        )
    rows = verification_rows(tokenizer, prompts, asked, answers, kind, ROWS * steps, seed)
    args = SFTConfig(
        str(folder / "warm_up"), max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=LEARNING_RATE, seed=seed,
        completion_only_loss=True, gradient_checkpointing=False, bf16=True, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=5, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora)  # fmt: skip
    trainer.train()
    tuned: Any = trainer.accelerator.unwrap_model(trainer.model)
    with folder_at_once(target) as scratch:
        tuned.merge_and_unload().bfloat16().save_pretrained(str(scratch))
        tokenizer.save_pretrained(str(scratch))
    return str(target)


def own_answers(model: Any, tokenizer: Any, prompts: list[list[int]], asked: list[str]) -> list[list[str]]:
    """Numbers that the model itself says after `2 * 3 =`, a few for each prompt, right or wrong."""
    texts = [[*prompt, *_ids(tokenizer, f"{question} =")] for prompt, question in zip(prompts, asked, strict=True)]
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_BP, mask_BP = left_padded(texts, fill)
    said = model.generate(
        input_ids=ids_BP, attention_mask=mask_BP, max_new_tokens=5, do_sample=True, temperature=TEMPERATURE,
        num_return_sequences=SAMPLES, pad_token_id=fill,
    )  # fmt: skip
    found = [re.match(r" ?(\d+)", text) for text in tokenizer.batch_decode(said[:, ids_BP.shape[1] :])]
    grouped = [found[place : place + SAMPLES] for place in range(0, len(found), SAMPLES)]
    return [[match[1] for match in group if match] for group in grouped]


def verification_rows(
    tokenizer: Any,
    prompts: list[list[int]],
    asked: list[str],
    answers: list[list[str]],
    kind: EpisodeKind,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Token ids of attempts with their verifications, and a mask of the verifications, as `SFTTrainer` reads them."""
    draw, follow_ups = random.Random(seed), FollowUps.render(tokenizer, kind)
    known = [place for place, found in enumerate(answers) if found]
    rows = []
    for number in range(count):
        place = draw.choice(known)
        # Half of the attempts are an answer to another problem, else most verdicts would be "correct".
        first = draw.choice(answers[place if number % 2 else draw.choice(known)])
        again = draw.choice(answers[place])
        attempt = [*_ids(tokenizer, f"{asked[place]} = {first}."), follow_ups.end_of_turn]
        given = [*prompts[place], *attempt, *follow_ups.by_role["verify"]]
        said = [*_ids(tokenizer, f"{asked[place]} = {again}. {VERDICTS[first != again]}"), follow_ups.end_of_turn]
        rows.append({"input_ids": given + said, "completion_mask": [0] * len(given) + [1] * len(said)})
    return rows


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
