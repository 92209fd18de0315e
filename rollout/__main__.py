"""`astarpo-rollout`: stage 1 as a batch job, from a model and a data set to a reference pool on disk."""

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import parse_command, run_command
from .episodes.options import EpisodeOptions
from .options import DataOptions, EngineOptions, ModelOptions, SampleOptions

if TYPE_CHECKING:
    from .pool import ReferencePool


def rollout(
    model: ModelOptions,
    data: DataOptions,
    sample: SampleOptions,
    engine_options: EngineOptions,
    episode_options: EpisodeOptions | None = None,
) -> int:
    """Create or continue the pool in `sample.output_dir`."""
    from ..verifier import Verifier
    from .engines.interface import EngineError
    from .engines.starting import start_engine
    from .fingerprint import pool_fingerprint
    from .pool import PoolWriter, ReferencePool
    from .pool_cli import print_summary
    from .prompts import fitting_prompts
    from .setup import load_from_options, load_tokenizer
    from .stage1 import fill_pool

    episodes = episode_options or EpisodeOptions()
    episodes.check_engine(engine_options.engine)
    folder = Path(sample.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems = load_from_options(data, for_evaluation=False, exclude=sample.eval_dataset_name)
    problems, prompts = fitting_prompts(problems, tokenizer, data)
    what = "episodes" if episodes.is_pag else "samples"
    print(f"{len(problems)} problems, {sample.num_samples} {what} each", flush=True)
    fingerprint = pool_fingerprint(model, engine_options, tokenizer, problems, sample) | episodes.fingerprint()
    with PoolWriter(folder, problems, sample.num_samples, fingerprint, episodes.turns) as writer:
        if writer.is_complete:
            print(f"the pool in {folder} is complete already; nothing to sample", flush=True)
            pool = ReferencePool(writer.folder, writer.manifest)
        else:
            longest = episodes.longest(tokenizer, sample.max_completion_length)
            engine, policy = start_engine(model, engine_options, prompts, longest)
            with Verifier(sample.verifier_workers) as verifier:
                try:
                    pool = fill_pool(writer, engine, tokenizer, problems, prompts, sample, verifier, policy, episodes)
                except EngineError as error:
                    return _explain(f"the engine broke down: {error}", folder)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return _explain(f"no space left on the disk of {folder}", folder)
                finally:
                    engine.close()
    print_summary(pool.summary(), sample.output_dir)
    _print_failures(pool)
    return 0


def _explain(what: str, folder: Path) -> int:
    """Say why a job stopped early; returns its exit code."""
    from .pool import PoolManifest

    manifest = PoolManifest.load(folder)
    print(
        f"error: {what}\n{manifest.num_rows} of {manifest.total} samples are committed and sound; run the same command again to "
        "continue from there",
        file=sys.stderr,
    )
    return 1


def _print_failures(pool: "ReferencePool") -> None:
    failures = pool.manifest.failures
    if failures:
        prompts = len({failure.prompt_id for failure in failures})
        print(
            f"{len(failures)} samples of {prompts} prompts failed, the last one because: {failures[-1].reason}\n"
            "They count as samples without signal; run the same command again to try them once more.",
            file=sys.stderr,
        )


def _rollout_command() -> int:
    return rollout(
        *parse_command(
            [ModelOptions, DataOptions, SampleOptions, EngineOptions, EpisodeOptions],
            section="rollout",
            prog="astarpo-rollout",
            description="Stage 1: sample the frozen reference N times per prompt, grade the samples, and keep them "
            "as a reference pool that `astarpo-train --pool` computes V* from. With --episode pag the samples are attempts with their "
            "verifications and revisions. Run again to continue. "
            "`astarpo-rollout verify POOL` checks a pool, `regrade POOL` grades it again with the present verifier, "
            "`summary POOL` describes it, `publish POOL ID` uploads it to the hub.",
        )
    )


def main() -> None:
    """Entry point of `astarpo-rollout`."""
    from .pool_cli import COMMANDS

    run_command(COMMANDS.get(sys.argv[1], _rollout_command) if len(sys.argv) > 1 else _rollout_command)


if __name__ == "__main__":
    main()
