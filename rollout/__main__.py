"""`astarpo-rollout`: stage 1 as a batch job, from a model and a data set to a reference pool on disk, and what can be done with
a pool: verify, regrade, summary, publish."""

import argparse
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import parse_command, run_command
from .options import DataOptions, EngineOptions, EpisodeOptions, ModelOptions, SampleOptions

if TYPE_CHECKING:
    from .pool import ReferencePool
    from .sample import GradeFunction


def rollout(
    model: ModelOptions,
    data: DataOptions,
    sample: SampleOptions,
    engine_options: EngineOptions,
    episode_options: EpisodeOptions,
) -> int:
    """Create or continue the pool in `sample.output_dir`."""
    from ..verifier import Verifier
    from .data import load_from_options
    from .engines.interface import EngineError, SamplingSettings
    from .engines.start import start_engine
    from .episode import EpisodeSampler, FollowUps
    from .fingerprint import data_fields, pool_fingerprint
    from .graders import load_reward_functions
    from .pag import episode_kind
    from .pool import PoolWriter, ReferencePool
    from .prompts import fitting_prompts, load_tokenizer
    from .sample import fill_pool
    from .startup import chosen_engine

    functions = load_reward_functions(sample.reward_funcs)
    engine_options = chosen_engine(engine_options)
    kind = episode_kind(episode_options)
    folder = Path(sample.output_dir)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    if sample.eval_dataset_name is not None:
        print(
            f"--eval_dataset_name {sample.eval_dataset_name}: its problems are left out. In this command the option is called "
            "--exclude_dataset_name now.",
            file=sys.stderr,
        )
    exclude = sample.exclude_dataset_name or sample.eval_dataset_name
    problems = load_from_options(data, for_evaluation=False, exclude=exclude)
    problems, prompts = fitting_prompts(problems, tokenizer, data)
    what = "samples" if len(kind.roles) == 1 else "episodes"
    print(f"{len(problems)} problems, {sample.num_samples} {what} each", flush=True)
    fingerprint = pool_fingerprint(model, engine_options, tokenizer, problems, sample) | kind.fingerprint()
    fingerprint |= data_fields(data)
    grader, graded = _chosen_grader(functions, sample.reward_weights, data.prompt_template is not None)
    fingerprint |= graded
    with PoolWriter(folder, problems, sample.num_samples, fingerprint, len(kind.roles)) as writer:
        if writer.is_complete:
            print(f"the pool in {folder} is complete already; nothing to sample", flush=True)
            pool = ReferencePool(writer.folder, writer.manifest)
        else:
            longest = FollowUps.render(tokenizer, kind).longest_after_prompt(sample.max_completion_length)
            engine, policy = start_engine(model, engine_options, prompts, longest)
            settings = SamplingSettings(sample.max_completion_length, sample.temperature, logprobs=sample.logprobs)
            try:
                with Verifier(sample.verifier_workers) as verifier:
                    sampler = EpisodeSampler(engine, tokenizer, kind, settings, policy)
                    pool = fill_pool(writer, sampler, problems, prompts, sample, grader or verifier)
            except EngineError as error:
                return _explain(f"the engine broke down: {error}", folder)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return _explain(f"no space left on the disk of {folder}", folder)
            finally:
                engine.close()
    _print_summary(pool.summary(), sample.output_dir)
    _print_failures(pool)
    return 0


def _chosen_grader(
    functions: list[Any], weights: list[float] | None, is_text: bool
) -> "tuple[GradeFunction | None, dict[str, Any]]":
    """Reward functions as a grader, and what the fingerprint says of them; None and nothing for the verifier alone."""
    from ..verifier import math_reward
    from .graders import grader_fingerprint, reward_grader, row_of_problem

    if functions == [math_reward] and weights in (None, [1.0]):
        return None, {}
    import torch

    from .rewards import RewardFunctions

    rewards = RewardFunctions(functions, None, weights, None, None, torch.device("cpu"))
    grader = reward_grader(rewards, lambda problem: row_of_problem(problem, is_text))
    return grader, grader_fingerprint(rewards.functions, rewards.names, rewards.weights_F.tolist())


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
            f"{len(failures)} samples of {prompts} prompts failed. Reason of the last one: {failures[-1].reason}\n"
            "They count as samples without signal; run the same command again to try them once more.",
            file=sys.stderr,
        )


def _prog(command: str) -> str:
    """The name under which the user called a pool's command: `astarpo pool check` is `astarpo-rollout verify`."""
    if sys.argv[0] == "astarpo pool":
        return f"astarpo pool {'check' if command == 'verify' else command}"
    return f"astarpo-rollout {command}"


def _arguments(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_prog(command), description=description)
    parser.add_argument("pool", type=Path, help="folder of the pool")
    return parser


def verify_command() -> int:
    """Check every shard of a pool; returns 1 when something is wrong."""
    parser = _arguments("verify", "Check every shard's hash, rows and keys. Exit code 1: something is wrong.")
    folder = parser.parse_args(sys.argv[2:]).pool
    from .pool import PoolManifest, check_pool

    faults = check_pool(folder)
    for fault in faults:
        print(f"{folder / fault.file}: {fault.problem}")
    manifest = PoolManifest.load(folder)
    state = (
        "sound" if not faults else f"{len(faults)} faults; the command that made the pool samples what is broken again"
    )
    if manifest.failures:
        print(f"{folder}: {len(manifest.failures)} samples failed; they are tried again when the pool is continued")
    print(f"{folder}: {manifest.num_rows} of {manifest.total} samples in {len(manifest.shards)} shards, {state}")
    return 1 if faults else 0


def regrade_command() -> int:
    """Grade a pool's samples again and show which outcomes changed."""
    parser = _arguments(
        "regrade",
        "Grade all samples again with the present verifier, or with reward functions. The old grades are kept.",
    )
    parser.add_argument(
        "--reward_funcs", nargs="+", help="reward functions as module.function (default: the verifier)"
    )
    parser.add_argument("--reward_weights", nargs="+", type=float, help="their weights (default: all 1)")
    parser.add_argument("--verifier_workers", type=int, default=1, help="number of grading processes (default: 1)")
    parser.add_argument("--episode", help="module:KIND, for a pool of a kind of episode of your own")
    options = parser.parse_args(sys.argv[2:])
    from rich.console import Console
    from rich.table import Table

    from ..verifier import Verifier
    from .episode import load_kind
    from .fingerprint import verifier_name
    from .graders import load_reward_functions
    from .pag import Pag
    from .pool import PoolManifest, regrade_pool

    if options.episode and ":" not in options.episode:
        raise ValueError(
            "--episode takes module:KIND here. Leave it out for a pool of completions or of PAG episodes: it says itself what it holds."
        )
    kind = load_kind(options.episode, Pag) if options.episode else None
    functions = load_reward_functions(options.reward_funcs)
    is_text = bool(PoolManifest.load(options.pool).fingerprint.get("text_prompts"))
    grader, graded = _chosen_grader(functions, options.reward_weights, is_text)
    with Verifier(options.verifier_workers) as verifier:
        transitions = regrade_pool(options.pool, grader or verifier, graded or verifier_name(), kind)
    table = Table("before", "now", "samples", title=f"{transitions.total()} samples graded again")
    for (before, now), count in sorted(transitions.items(), key=lambda item: -item[1]):
        table.add_row(before, now, str(count), style="" if before == now else "yellow")
    Console().print(table)
    return 0


def summary_command() -> int:
    """Describe a pool."""
    parser = _arguments("summary", "Solve rates, pass@k, lengths and the spread of V* of a pool.")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    parser.add_argument("--plot", type=Path, help="draw it into this image file")
    options = parser.parse_args(sys.argv[2:])
    from .files import write_json
    from .pool import ReferencePool
    from .pool.summary import plot_summary

    summary = ReferencePool.open(options.pool).summary()
    _print_summary(summary, str(options.pool))
    if options.json:
        write_json(options.json, summary)
    if options.plot:
        plot_summary(summary, options.plot)
    return 0


def publish_command() -> int:
    """Upload a pool to the hub."""
    parser = _arguments(
        "publish", "Upload a pool to the hub as a data set, with a card. ReferencePool.open(ID) loads it."
    )
    parser.add_argument("repo_id", help="user/name of the data set")
    parser.add_argument("--private", action="store_true", help="make a new data set private")
    options = parser.parse_args(sys.argv[2:])
    from .pool.publishing import publish_pool

    print(publish_pool(options.pool, options.repo_id, private=options.private))
    return 0


def import_command() -> int:
    """Make a pool from rewards that others have published."""
    parser = argparse.ArgumentParser(
        prog=_prog("import"),
        description="Make a pool from published rewards: a row for each problem, a column for each sample. Stage 1 then costs nothing. State "
        "what they were sampled with; what you leave out has to be accepted in training (--accept_undeclared).",
    )
    parser.add_argument("file", help=".parquet or .jsonl file, or the hub id of a data set")
    parser.add_argument("--columns", required=True, help="the reward columns, such as 'eval_*'")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the pool")
    parser.add_argument("--dataset_split", help="split of a data set on the hub (default: train)")
    parser.add_argument("--prompt_column", help="column of the question (default: prompt, problem or question)")
    parser.add_argument("--gold_column", help="column of the gold answer (default: gold, answer or solution)")
    parser.add_argument(
        "--system_prompt", default="", help="system message that stood before each question (default: none)"
    )
    parser.add_argument(
        "--prompt_template", help="the whole prompt as plain text, with {question} in it (base models)"
    )
    parser.add_argument("--model_name_or_path", help="the model that was sampled: hub id or folder")
    parser.add_argument("--model_revision", help="its branch, tag or commit")
    parser.add_argument("--max_completion_length", type=int, help="most tokens of a sample")
    parser.add_argument("--temperature", type=float, help="sampling temperature")
    parser.add_argument("--require_eos", choices=["true", "false"], help="whether a truncated sample earned 0")
    options = parser.parse_args(sys.argv[2:])
    from .data import check_template, import_rows, with_template
    from .fingerprint import model_identity
    from .pool.importing import import_pool, reward_columns

    if options.prompt_template is not None:
        check_template(options.prompt_template)
    rows, problems = import_rows(
        options.file, options.dataset_split, options.prompt_column, options.gold_column, options.system_prompt
    )
    columns = reward_columns(rows.column_names, options.columns)
    name = options.model_name_or_path
    pool = import_pool(
        options.output_dir,
        with_template(problems, options.prompt_template),
        list(zip(*(rows[column] for column in columns), strict=True)),
        {
            "model": model_identity(name, options.model_revision) if name else None,
            "max_completion_length": options.max_completion_length,
            "temperature": options.temperature,
            "require_eos": None if options.require_eos is None else options.require_eos == "true",
        },
        Path(options.file).name,
        options.prompt_template is not None,
    )
    _print_summary(pool.summary(), str(options.output_dir))
    undeclared = pool.manifest.fingerprint["undeclared"]
    print(f"not declared: {', '.join(undeclared)}; training asks for --accept_undeclared true")
    return 0


def _print_summary(summary: dict[str, Any], folder: str) -> None:
    """Show a pool's summary as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"reference pool in {folder}", show_header=False)
    for name, value in summary.items():
        if isinstance(value, dict):
            text = ", ".join(f"{key} {_short(item)}" for key, item in value.items())
        else:
            text = _short(value)
        table.add_row(name.replace("_", " "), text)
    Console().print(table)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return json.dumps(value) if isinstance(value, list) else str(value)


COMMANDS: dict[str, Callable[[], int]] = {
    "verify": verify_command,
    "regrade": regrade_command,
    "summary": summary_command,
    "publish": publish_command,
    "import": import_command,
}
"""Commands on a pool that is there; each reads `sys.argv[2:]`."""


def rollout_command() -> int:
    """Sample, or continue, a pool."""
    return rollout(
        *parse_command(
            [ModelOptions, DataOptions, SampleOptions, EngineOptions, EpisodeOptions],
            section="rollout",
            prog="astarpo-rollout",
            description="Stage 1: sample N completions per prompt from the frozen reference, grade them, and store them as a "
            "reference pool, from which `astarpo-train --pool` computes V*. With --episode pag the samples are attempts with "
            "their verifications and revisions. If it is interrupted, run the same command again. "
            "`astarpo-rollout verify POOL` checks a pool, `regrade POOL` grades it again with the present verifier, "
            "`summary POOL` describes it, `publish POOL ID` uploads it to the hub.",
        )
    )


def main() -> None:
    """Entry point of `astarpo-rollout`."""
    run_command(
        COMMANDS.get(sys.argv[1], rollout_command) if len(sys.argv) > 1 else rollout_command,
        interrupted="the samples that are committed are kept; run the same command again to continue",
    )


if __name__ == "__main__":
    main()
