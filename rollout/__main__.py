"""`astarpo-rollout`: stage 1 as a batch job, from a model and a data set to a reference pool on disk."""

from pathlib import Path
from typing import Any

from ..verifier.command_line import parse_command, run_command
from .options import DataOptions, EngineOptions, ModelOptions, SampleOptions


def rollout(model: ModelOptions, data: DataOptions, sample: SampleOptions, engine_options: EngineOptions) -> int:
    """Create or continue the pool in `sample.output_dir`."""
    from ..verifier import Verifier
    from .pool import PoolWriter, ReferencePool
    from .setup import load_from_options, load_tokenizer, make_engine
    from .stage1 import pool_fingerprint, sample_pool

    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems = load_from_options(data, for_evaluation=False, exclude=sample.eval_dataset_name)
    print(f"{len(problems)} problems, {sample.num_samples} samples each", flush=True)
    fingerprint = pool_fingerprint(
        model.model_name_or_path, model.model_revision, model.dtype, tokenizer, problems, sample
    )
    writer = PoolWriter(Path(sample.output_dir), problems, sample.num_samples, fingerprint)
    if writer.is_complete:
        print(f"the pool in {sample.output_dir} is complete already; nothing to sample", flush=True)
        pool = ReferencePool(writer.folder, writer.manifest)
    else:
        engine = make_engine(model, engine_options, tokenizer, problems, data, sample.max_completion_length)
        with Verifier(sample.verifier_workers) as verifier:
            pool = sample_pool(engine, tokenizer, problems, sample, fingerprint, verifier)
    print_summary(pool.summary(), sample.output_dir)
    return 0


def print_summary(summary: dict[str, Any], folder: str) -> None:
    """Show a pool's summary as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"reference pool in {folder}", show_header=False)
    for name, value in summary.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)


def main() -> None:
    """Entry point of `astarpo-rollout`."""
    run_command(
        lambda: rollout(
            *parse_command(
                [ModelOptions, DataOptions, SampleOptions, EngineOptions],
                section="rollout",
                prog="astarpo-rollout",
                description="Stage 1: sample the frozen reference N times per prompt, grade the samples, and keep them "
                "as a reference pool that `astarpo-train --pool` computes V* from. Run again to continue.",
            )
        )
    )


if __name__ == "__main__":
    main()
