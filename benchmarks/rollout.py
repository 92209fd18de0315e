"""What a rollout job costs over its engine, and what TRL's stage 1 takes for the same.

    python benchmarks/rollout.py

Prints one JSON line. `ratio_to_engine`: tokens/s of the whole job (sampling, grading, writing the pool) over tokens/s of a
bare `LLM.generate` on the same engine with the same prompts, seeds and lengths, the median of several turns. `ratio_to_trl`: samples/s of the
job over those of stage 1 of `trl.experimental.a2po` on the same prompts and length limit, with end-of-sequence honoured,
at the best of several batch sizes. Starting engines and loading models is not counted on any side.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoTokenizer

from astarpo.rollout import (
    EngineOptions,
    ModelOptions,
    Problem,
    SampleOptions,
    VLLMEngine,
    pool_fingerprint,
    sample_pool,
)
from astarpo.rollout.episode import sample_seed
from astarpo.rollout.prompts import tokenize_prompts
from astarpo.trainer.quickstart import fetch_model
from astarpo.verifier import Verifier, math_reward

SYSTEM_PROMPT = "Answer in one short sentence."
PROBE_PROMPTS = 64
"""Prompts on which TRL's batch size is chosen."""


def multiplications(count: int) -> list[Problem]:
    """`count` problems, all different."""
    pairs = [(a, b) for a in range(2, 2 + count) for b in range(2, 18)][:count]
    system = {"role": "system", "content": SYSTEM_PROMPT}
    return [Problem((system, {"role": "user", "content": f"What is {a} times {b}?"}), str(a * b)) for a, b in pairs]


def clocked(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that an action took, and what it returned."""
    began = time.perf_counter()
    result = action()
    return time.perf_counter() - began, result


class Ours:
    """The engine, bare and with all that makes it a job."""

    def __init__(self, options: argparse.Namespace, model: str):
        self.options, self.model = options, model
        self.problems = multiplications(options.prompts)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompts = tokenize_prompts(self.problems, self.tokenizer)
        self.engine_options = EngineOptions(kv_cache_gb=1.0, max_num_seqs=options.max_num_seqs)
        length = max(map(len, self.prompts)) + options.max_completion_length
        self.engine = VLLMEngine(model, length, dtype=options.dtype, options=self.engine_options)

    def bare(self) -> tuple[float, int, int]:
        """Seconds, samples and tokens of `LLM.generate`."""
        from vllm import SamplingParams

        self.engine.reset_prefix_cache()
        prompts, params = [], []
        for problem, prompt in zip(self.problems, self.prompts, strict=True):
            for index in range(self.options.num_samples):
                prompts.append({"prompt_token_ids": prompt})
                params.append(
                    SamplingParams(
                        temperature=1.0,
                        max_tokens=self.options.max_completion_length,
                        stop_token_ids=self.engine.stop_token_ids,
                        seed=sample_seed(self.options.seed, problem.prompt_id, index),
                        detokenize=False,
                    )
                )
        seconds, outputs = clocked(lambda: self.engine.llm.generate(prompts, params, use_tqdm=False))
        return seconds, len(outputs), sum(len(output.outputs[0].token_ids) for output in outputs)

    def job(self) -> tuple[float, int, int]:
        """Seconds, samples and tokens of a rollout job into a new pool."""
        self.engine.reset_prefix_cache()
        with tempfile.TemporaryDirectory() as folder:
            sample = SampleOptions(
                f"{folder}/pool",
                num_samples=self.options.num_samples,
                max_completion_length=self.options.max_completion_length,
                seed=self.options.seed,
            )

            def run() -> Any:
                model = ModelOptions(self.model, dtype=self.options.dtype)
                fingerprint = pool_fingerprint(model, self.engine_options, self.tokenizer, self.problems, sample)
                with Verifier() as verifier:
                    return sample_pool(self.engine, self.tokenizer, self.problems, sample, fingerprint, verifier)

            seconds, pool = clocked(run)
            assert pool.is_complete
            return seconds, pool.num_rows, sum(pool.samples["num_tokens"].to_pylist())


class TRL:
    """Stage 1 of `trl.experimental.a2po`."""

    def __init__(self, options: argparse.Namespace, model: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype))
        self.model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        self.rows = [
            {
                "prompt": self.tokenizer.apply_chat_template(
                    list(problem.messages), add_generation_prompt=True, tokenize=False
                ),
                "solution": problem.gold,
            }
            for problem in multiplications(options.prompts)
        ]
        self.tokens = 0

    def stage1(self, count: int, batch: int) -> tuple[float, int, int]:
        """Seconds, samples and tokens of V* for `count` prompts."""
        from datasets import Dataset
        from trl.experimental.a2po import A2POConfig, A2POTrainer

        def reward(
            prompts: list[str], completions: list[str], solution: list[str | None], **kwargs: Any
        ) -> list[float]:
            self.tokens += sum(len(self.tokenizer(text)["input_ids"]) for text in completions)
            graded = math_reward(prompts=prompts, completions=completions, solution=solution)
            return [score or 0.0 for score in graded]

        self.tokens = 0
        with tempfile.TemporaryDirectory() as folder:
            trainer = A2POTrainer(
                model=self.model,
                reward_funcs=reward,
                args=A2POConfig(
                    folder,
                    per_device_train_batch_size=batch,
                    num_value_samples=self.options.num_samples,
                    max_completion_length=self.options.max_completion_length,
                    temperature=1.0,
                    report_to="none",
                    use_cpu=True,
                    bf16=False,
                    gradient_checkpointing=False,
                ),
                train_dataset=Dataset.from_list(self.rows[:count]),
                processing_class=self.tokenizer,
            )
            seconds, _ = clocked(trainer._estimate_optimal_values)
        return seconds, count * self.options.num_samples, self.tokens


def rates(turns: list[tuple[float, int, int]]) -> dict[str, Any]:
    """Sums over turns, and what they come to per second."""
    seconds, samples, tokens = (sum(column) for column in zip(*turns, strict=True))
    return {
        "seconds": round(seconds, 2),
        "seconds_by_turn": [round(turn[0], 2) for turn in turns],
        "samples": samples,
        "tokens": tokens,
        "samples_per_s": round(samples / seconds, 3),
        "tokens_per_s": round(tokens / seconds, 2),
    }


def against_engine(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """The job and the bare engine, in turns."""
    ours = Ours(options, model)
    ours.engine.llm.generate([{"prompt_token_ids": ours.prompts[0]}] * 64, use_tqdm=False)
    with Verifier() as verifier:
        verifier.grade_batch([r"\boxed{\frac12}"], [r"\frac{2}{4}"])
    bare, job = [], []
    for turn in range(options.turns):
        sides = [(ours.bare, bare), (ours.job, job)]
        for measure, results in sides if turn % 2 == 0 else sides[::-1]:
            results.append(measure())
    ours.engine.close()
    # Of each turn, and then the median: the machine's speed drifts by more than the job costs.
    ratios = [(b[0] / b[2]) / (j[0] / j[2]) for b, j in zip(bare, job, strict=True)]
    return {
        "engine": rates(bare),
        "job": rates(job),
        "ratio_to_engine": round(statistics.median(ratios), 4),
        "ratios_by_turn": [round(ratio, 4) for ratio in ratios],
    }


def against_trl(options: argparse.Namespace, model: str, job: dict[str, Any]) -> dict[str, Any]:
    """TRL's stage 1 at its best batch size."""
    trl = TRL(options, model)
    probes = {batch: rates([trl.stage1(min(PROBE_PROMPTS, options.prompts), batch)]) for batch in options.trl_batches}
    best = max(probes, key=lambda batch: probes[batch]["samples_per_s"])
    whole = rates([trl.stage1(options.prompts, best)])
    fastest = max(whole["samples_per_s"], probes[best]["samples_per_s"])
    return {
        "trl": {**whole, "batch": best, "probes": probes},
        "ratio_to_trl": round(job["samples_per_s"] / fastest, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="default: SmolLM2-135M-Instruct, fetched into runs/models")
    parser.add_argument("--dtype", default="bfloat16", help="type of the weights on all sides")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_completion_length", type=int, default=40)
    parser.add_argument("--max_num_seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=5, help="how often engine and job are measured")
    parser.add_argument("--trl_batches", type=int, nargs="*", default=[16, 32, 64], help="none: leave TRL out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    model = options.model_name_or_path or str(fetch_model(Path("runs/models")))
    result = against_engine(options, model)
    if options.trl_batches:
        result |= against_trl(options, model, result["job"])
    print(json.dumps({**result, "settings": {**vars(options), "model_name_or_path": Path(model).name}}))


if __name__ == "__main__":
    main()
