"""A tiny model taught the form of PAG episodes and nothing else: it boxes 0 or 1, and calls that correct or wrong, at random."""

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from astarpo.rollout.data import Problem
from astarpo.rollout.episodes import FollowUps

VERIFY, REVISE = "Right?", "Again."


def problem(number: int) -> Problem:
    return Problem(({"role": "user", "content": f"Guess {number}"},), str(number % 2))


def teach_episodes(folder: Path) -> None:
    """Train it on random episodes and save it into `folder`."""
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    follow_ups = FollowUps.render(tokenizer, VERIFY, REVISE)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=320, eos_token_id=2, max_position_embeddings=512)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(200):
        rows = []
        for _row in range(8):
            draws = torch.randint(0, 2, (3,), generator=generator).tolist()
            number = int(torch.randint(0, 20, (1,), generator=generator))
            chat: Any = [list(problem(number).messages)]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"][0]
            for said, asks in (
                (f"\\boxed{{{draws[0]}}}", follow_ups.verify),
                (f"The answer is {('wrong', 'correct')[draws[1]]}.", follow_ups.revise),
                (f"\\boxed{{{draws[2]}}}", ()),
            ):
                ids = [*ids, *tokenizer(f"{said}<|im_end|>")["input_ids"], *asks]
            rows.append(ids)
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.4
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
