"""`astarpo-rollout`: stage 1 as a batch job, from a model and a data set to a reference pool on disk."""

import sys
from pathlib import Path

from ..verifier.command_line import parse_command, run_command
from .options import DataOptions, EngineOptions, ModelOptions, SampleOptions


def rollout(model: ModelOptions, data: DataOptions, sample: SampleOptions, engine_options: EngineOptions) -> int:
    """Create or continue the pool in `sample.output_dir`."""
    from ..verifier import Verifier
    from .pool import PoolWriter, ReferencePool
    from .pool_cli import print_summary
    from .prompts import tokenize_prompts
    from .setup import load_from_options, load_tokenizer, start_engine
    from .stage1 import fill_pool, pool_fingerprint

    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems = load_from_options(data, for_evaluation=False, exclude=sample.eval_dataset_name)
    print(f"{len(problems)} problems, {sample.num_samples} samples each", flush=True)
    fingerprint = pool_fingerprint(
        model.model_name_or_path, model.model_revision, model.dtype, tokenizer, problems, sample
    )
    with PoolWriter(Path(sample.output_dir), problems, sample.num_samples, fingerprint) as writer:
        if writer.is_complete:
            print(f"the pool in {sample.output_dir} is complete already; nothing to sample", flush=True)
            pool = ReferencePool(writer.folder, writer.manifest)
        else:
            prompts = tokenize_prompts(problems, tokenizer, data.max_prompt_length)
            engine = start_engine(model, engine_options, prompts, sample.max_completion_length)
            with Verifier(sample.verifier_workers) as verifier:
                pool = fill_pool(writer, engine, tokenizer, problems, prompts, sample, verifier)
    print_summary(pool.summary(), sample.output_dir)
    return 0


def _rollout_command() -> int:
    return rollout(
        *parse_command(
            [ModelOptions, DataOptions, SampleOptions, EngineOptions],
            section="rollout",
            prog="astarpo-rollout",
            description="Stage 1: sample the frozen reference N times per prompt, grade the samples, and keep them "
            "as a reference pool that `astarpo-train --pool` computes V* from. Run again to continue. "
            "`astarpo-rollout verify POOL` checks a pool, `regrade POOL` grades it again with the present verifier, "
            "`summary POOL` describes it.",
        )
    )


def main() -> None:
    """Entry point of `astarpo-rollout`."""
    from .pool_cli import COMMANDS

    run_command(COMMANDS.get(sys.argv[1], _rollout_command) if len(sys.argv) > 1 else _rollout_command)


if __name__ == "__main__":
    main()
