"""A tiny model taught the form of PAG episodes and nothing else: it boxes 0 or 1, and calls that correct or wrong, at random."""

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from helpers import taught_qwen2
from transformers import AutoTokenizer

from astarpo.rollout.data import Problem
from astarpo.rollout.episode import FollowUps
from astarpo.rollout.pag import Pag

VERIFY, REVISE = "Right?", "Again."


def problem(number: int) -> Problem:
    return Problem(({"role": "user", "content": f"Guess {number}"},), str(number % 2))


def teach_episodes(folder: Path) -> None:
    """Train it on random episodes and save it into `folder`."""
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    follow_ups = FollowUps.render(tokenizer, Pag(VERIFY, REVISE)).by_role
    generator = torch.Generator().manual_seed(0)

    def row() -> list[int]:
        draws = torch.randint(0, 2, (3,), generator=generator).tolist()
        number = int(torch.randint(0, 20, (1,), generator=generator))
        chat: Any = [list(problem(number).messages)]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"][0]
        for said, asks in (
            (f"\\boxed{{{draws[0]}}}", follow_ups["verify"]),
            (f"The answer is {('wrong', 'correct')[draws[1]]}.", follow_ups["revise"]),
            (f"\\boxed{{{draws[2]}}}", ()),
        ):
            ids = [*ids, *tokenizer(f"{said}<|im_end|>")["input_ids"], *asks]
        return ids

    model = taught_qwen2(lambda step: [row() for _ in range(8)], 200, below=0.4)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
