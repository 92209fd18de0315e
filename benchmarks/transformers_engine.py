"""Tokens a second of `--engine transformers`, of the same engine by `generate` in batches, and of TRL's way to sample.

    python benchmarks/transformers_engine.py --model M

256 prompts whose completions have 5 to 200 tokens, the same lengths for all, 32 at a time. One JSON line.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines import slots, transformers_engine
from astarpo.rollout.engines.interface import generate

SHORTEST, LONGEST = 5, 200


class Ends(LogitsProcessor):
    """Ends each row of a batch after its number of tokens, and not before."""

    def __init__(self, lengths: list[int], prompt: int, stop: int):
        self._lengths, self._prompt, self._stop = torch.tensor(lengths), prompt, stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Forbid or force the end."""
        is_last = input_ids.shape[1] - self._prompt + 1 >= self._lengths
        scores[is_last] = -torch.inf
        scores[:, self._stop] = torch.where(is_last, 0.0, -torch.inf).to(scores)
        return scores


def by_trl(model: Any, prompts: list[list[int]], lengths: list[int], batch: int, stop: int) -> None:
    """As `_generate_single_turn` in trl/trainer/grpo_trainer.py (1.16): batches in the order given, sampled by `generate`."""
    config = GenerationConfig(
        max_new_tokens=LONGEST, do_sample=True, temperature=1.0, top_k=0, eos_token_id=stop, pad_token_id=stop
    )
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        ids, mask = transformers_engine.left_padded(rows, stop)
        ends = Ends(lengths[start : start + batch], ids.shape[1], stop)
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([ends]),
            )


def ending(lengths: list[int], stop: int) -> Callable[..., Any]:
    """Our sampling with the end of each row forced, by its seed, which is its prompt's place."""
    made: Counter[int] = Counter()
    sample = slots.sample

    def patched(logits: torch.Tensor, generators: Any, temperature: float) -> Any:
        logits[:, stop] = -torch.inf
        tokens, logprobs = sample(logits, generators, temperature)
        for row, generator in enumerate(generators):
            seed = generator.initial_seed()
            made[seed] += 1
            if made[seed] == lengths[seed]:
                tokens[row] = stop
        return tokens, logprobs

    return patched


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    stop = int(tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    draw = random.Random(0)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(options.prompts)]
    texts = [
        f"{'Think about it. ' * draw.randint(0, 4)}What is {number} plus {number}?"
        for number in range(options.prompts)
    ]
    prompts: list[list[int]] = tokenizer(texts)["input_ids"]
    engine = transformers_engine.TransformersEngine(
        model, 512, options=EngineOptions(max_num_seqs=options.batch), stop_token_ids=[stop]
    )
    real_sample, real_choice = slots.sample, transformers_engine.can_refill

    def by_us(refills: bool) -> None:
        slots.sample = transformers_engine.sample = ending(lengths, stop)
        transformers_engine.can_refill = real_choice if refills else lambda config: False
        completions = generate(engine, prompts, range(options.prompts), SamplingSettings(LONGEST))
        slots.sample = transformers_engine.sample = real_sample
        assert [len(completion.token_ids) for completion in completions] == lengths

    ways: dict[str, Callable[[], None]] = {
        "refilled": lambda: by_us(True),
        "batches": lambda: by_us(False),
        "trl": lambda: by_trl(model, prompts, lengths, options.batch, stop),
    }
    report: dict[str, Any] = {"tokens": sum(lengths)}
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        report[f"{name}_tokens_per_s"] = round(sum(lengths) / (time.perf_counter() - began), 1)
    for name in ("batches", "trl"):
        report[f"refilled_to_{name}"] = round(report["refilled_tokens_per_s"] / report[f"{name}_tokens_per_s"], 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
