"""The least that an update of A*-PO can take: its three passes by plain `transformers` calls, and the bare engine."""

import time
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""


class Floor:
    """One reference forward, one policy forward and one backward, rows packed without padding.

    Args:
        model (`str`):
            Folder of the model; loaded in bfloat16.
        attention (`str`):
            Implementation of attention.
        adapter ([`~peft.LoraConfig`]):
            What is trained.
    """

    def __init__(self, model: str, attention: str, adapter: LoraConfig):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation=attention)
        self.model: Any = get_peft_model(base, adapter)

    def seconds(self, rows: Sequence[Row], rows_per_pack: int, autocast: bool) -> dict[str, float]:
        """Seconds of each pass; 1 row per pack is one call per row. Without autocast the adapter computes in float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return self._seconds(rows, rows_per_pack)

    def _seconds(self, rows: Sequence[Row], rows_per_pack: int) -> dict[str, float]:
        by_length = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
        packs = [_packed(pack) for pack in _batched(by_length, rows_per_pack)]
        spent: dict[str, float] = dict.fromkeys(("reference", "policy", "backward"), 0.0)
        for pack in packs:
            began = time.perf_counter()
            with torch.no_grad(), self.model.disable_adapter():
                reference = self._logps(pack)
            scored = time.perf_counter()
            loss = ((self._logps(pack) - reference).sum() - 1.0) ** 2
            forwarded = time.perf_counter()
            loss.backward()
            spent["reference"] += scored - began
            spent["policy"] += forwarded - scored
            spent["backward"] += time.perf_counter() - forwarded
        self.model.zero_grad(set_to_none=True)
        return spent

    def _logps(self, pack: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.model(
            input_ids=pack["ids"], position_ids=pack["positions"], logits_to_keep=pack["scored"], use_cache=False
        ).logits[0]
        return logits.float().log_softmax(-1).gather(-1, pack["labels"][:, None])[:, 0]


def _batched(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _packed(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    ids, positions, scored, labels = [], [], [], []
    for prompt, completion in rows:
        start = len(ids) + len(prompt)
        scored += range(start - 1, start - 1 + len(completion))
        labels += completion
        ids += [*prompt, *completion]
        positions += range(len(prompt) + len(completion))
    tensors = {name: torch.tensor(values) for name, values in (("scored", scored), ("labels", labels))}
    return {**tensors, "ids": torch.tensor([ids]), "positions": torch.tensor([positions])}


def fastest_floor(model: str, adapter: LoraConfig, updates: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """The floor of each update, by the fastest of several ways, which are tried on the first."""
    floors = {attention: Floor(model, attention, adapter) for attention in ("eager", "sdpa")}
    tried = {}
    for attention, size, autocast in product(floors, (1, 4, 8), (False, True)):
        floor = floors[attention]
        floor.seconds(updates[0][:8], size, autocast)
        tried[attention, size, autocast] = sum(floor.seconds(updates[0], size, autocast).values())
    attention, size, autocast = min(tried, key=lambda way: tried[way])
    measured = [floors[attention].seconds(rows, size, autocast) for rows in updates]
    names = {way: f"{way[0]}, {way[1]} rows a pack{', autocast' if way[2] else ''}" for way in tried}
    return {
        "floor_s": round(median(sum(spent.values()) for spent in measured), 3),
        "phases_s": {name: round(median(spent[name] for spent in measured), 3) for name in measured[0]},
        "way": names[attention, size, autocast],
        "tried_s": {names[way]: round(seconds, 2) for way, seconds in tried.items()},
    }


def bare_engine_seconds(engine: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], length: int) -> float:
    """Seconds of one `LLM.generate` with the same prompts and seeds, without a policy, from an empty prefix cache."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    params = [
        SamplingParams(
            temperature=1.0, max_tokens=length, stop_token_ids=engine.stop_token_ids, seed=seed, detokenize=False
        )
        for seed in seeds
    ]
    began = time.perf_counter()
    engine.llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return time.perf_counter() - began
