"""The quickstart's warm-up: a few supervised updates for models that hardly ever give a verdict.

It teaches the form of an episode and no truth: a quotient, the product that checks it and a verdict, another quotient. Every number in it
is a sample of the model itself, nothing is graded, and the verdicts alternate, so what a verdict has to do with the product is left to
training.
"""

import json
import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.utils.rnn import pad_sequence

from ..rollout.data import Problem
from ..rollout.engines.interface import Engine, SamplingSettings
from ..rollout.engines.transformers_engine import left_padded
from ..rollout.episode import SINGLE, EpisodeKind, EpisodeSampler, FollowUps, sample_seed
from ..rollout.files import folder_at_once, text_hash
from ..rollout.fingerprint import model_identity
from ..rollout.prompts import tokenize_prompts
from .division import answer, asked, checked
from .logprobs import CALL_COST, Scorer, can_share, use_scoring_head

logger = logging.getLogger(__name__)

ROWS, LEARNING_RATE, TEMPERATURE = 16, 5e-4, 1.0


def warm_up(
    model: str,
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    kind: EpisodeKind,
    steps: int,
    seed: int,
    folder: Path,
) -> str:
    """Train a LoRA adapter for a few steps, merge it, and save the model that is the reference from then on.

    Args:
        model (`str`):
            Hub id or folder.
        engine ([`Engine`]):
            An engine that holds it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        problems (`Sequence[Problem]`):
            Divisions.
        kind ([`EpisodeKind`]):
            PAG, whose prompts stand between the turns.
        steps (`int`):
            Updates of 16 rows.
        seed (`int`):
            Seed of the rows and of the updates.
        folder (`Path`):
            Where the model is saved. One of the same model, rows and seed that is there already is taken.

    Returns:
        `str`: The model's folder.

    Raises:
        ValueError: If the model hardly ever answers with a number.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    prompts = tokenize_prompts(problems, tokenizer)
    decides = [
        model_identity(model, None),
        prompts,
        kind.fingerprint(),
        checked(6, 3, 2, 6, True),
        ROWS,
        LEARNING_RATE,
        TEMPERATURE,
    ]
    target = folder / f"warmed-{steps}-seed-{seed}-{text_hash(json.dumps(decides))[:8]}"
    if target.is_dir():
        return str(target)
    rows = episode_rows(engine, tokenizer, problems, prompts, FollowUps.render(tokenizer, kind), ROWS * steps, seed)
    set_seed(seed)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16", attn_implementation="eager")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    policy: Any = get_peft_model(reference, lora)
    use_scoring_head(policy.get_base_model(), 1.0, False)
    scorer = Scorer(CALL_COST["cpu"], False, can_share(policy.config), lambda: torch.autocast("cpu", torch.bfloat16))
    optimizer = torch.optim.AdamW([weight for weight in policy.parameters() if weight.requires_grad], lr=LEARNING_RATE)
    for step in range(steps):
        batch = _padded(rows[step * ROWS : (step + 1) * ROWS])
        logps_BT, _ = scorer(policy, batch, ROWS)
        loss = -logps_BT[batch["is_said"]].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logger.info("Warm-up %d/%d: %.3f nats a token.", step + 1, steps, loss.item())
    tuned: Any = AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16")  # without the scoring head
    tuned = get_peft_model(tuned, lora)
    set_peft_model_state_dict(tuned, get_peft_model_state_dict(policy))
    with folder_at_once(target) as scratch:
        tuned.merge_and_unload().save_pretrained(str(scratch))
        tokenizer.save_pretrained(str(scratch))
    return str(target)


def _padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows as a batch for the scorer: the prompts padded left, all that follows padded right."""
    prompt_ids, prompt_mask = left_padded([row["prompt"] for row in rows], 0)
    after = [torch.tensor(row["after"]) for row in rows]
    said = [torch.tensor(row["is_said"], dtype=torch.bool) for row in rows]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": pad_sequence(after, batch_first=True),
        "completion_mask": pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in after], batch_first=True),
        "is_said": pad_sequence(said, batch_first=True),
    }


def episode_rows(
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    follow_ups: FollowUps,
    count: int,
    seed: int,
) -> list[dict[str, list[int]]]:
    """Token ids of episodes: their prompts, what comes after them, and which tokens of that the model says.

    Args:
        engine ([`Engine`]):
            Holds the model whose numbers stand in them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        problems (`Sequence[Problem]`):
            Divisions.
        prompts (`Sequence[list[int]]`):
            Their token ids.
        follow_ups ([`FollowUps`]):
            PAG's prompts between the turns.
        count (`int`):
            How many episodes.
        seed (`int`):
            Seed.
    """
    draw = random.Random(seed)
    chosen = [draw.randrange(len(problems)) for _ in range(2 * count)]  # some samples are no numbers
    divisions = [asked(problems[place].question) for place in chosen]
    opened = [
        [*prompts[place], *_ids(tokenizer, f"{a} divided by {b} is")]
        for place, (a, b) in zip(chosen, divisions, strict=True)
    ]
    first, second = (own_numbers(engine, tokenizer, opened, seed, which) for which in ("first", "second"))
    sampled = zip(chosen, divisions, first, second, strict=True)
    told = [(place, *pair, one, two) for place, pair, one, two in sampled if one is not None and two is not None]
    attempts = [[*_ids(tokenizer, answer(a, b, one)), follow_ups.end_of_turn] for _, a, b, one, _ in told]
    opened = [
        [*prompts[place], *attempt, *follow_ups.by_role["verify"], *_ids(tokenizer, f"{one} times {b} is")]
        for attempt, (place, _, b, one, _) in zip(attempts, told, strict=True)
    ]
    products = own_numbers(engine, tokenizer, opened, seed, "product")
    rows = []
    for attempt, (place, a, b, one, two), product in zip(attempts, told, products, strict=True):
        if product is None:
            continue
        is_right = len(rows) % 2 == 0  # as often the one as the other, whatever the numbers are
        verification = [*_ids(tokenizer, checked(a, b, one, product, is_right)), follow_ups.end_of_turn]
        parts = [(attempt, True), (follow_ups.by_role["verify"], False), (verification, True)]
        if not is_right:
            revision = [*_ids(tokenizer, answer(a, b, two)), follow_ups.end_of_turn]
            parts += [(follow_ups.by_role["revise"], False), (revision, True)]
        rows.append(
            {
                "prompt": list(prompts[place]),
                "after": [token for ids, _ in parts for token in ids],
                "is_said": [int(is_said) for ids, is_said in parts for _ in ids],
            }
        )
    if len(rows) < count:
        raise ValueError(
            f"Only {len(rows)} of {2 * count} samples of the model are numbers, too few for a warm-up. Set warm_up_steps 0, or take a "
            "model that knows arithmetic."
        )
    return rows[:count]


def own_numbers(engine: Engine, tokenizer: Any, texts: Sequence[list[int]], seed: int, name: str) -> list[int | None]:
    """The number with which the model goes on after each text, sampled; None where it is none."""
    sampler = EpisodeSampler(engine, tokenizer, SINGLE, SamplingSettings(5, TEMPERATURE))
    said = sampler.sample(texts, lambda number, role: sample_seed("warm-up", seed, name, number))
    matches = [re.match(r" ?(\d{1,4})\b", episode.turns[0].text) for episode in said]
    return [int(match[1]) if match else None for match in matches]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
