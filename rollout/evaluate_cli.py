"""`astarpo-eval`: avg@k and pass@k of a model or an adapter, or PAG episodes, as a table and as JSON."""

from pathlib import Path
from typing import Any

from ..cli import parse_command, run_command
from .data import Problem
from .episodes.options import EpisodeOptions
from .evaluation import EvaluationReport
from .options import DataOptions, EngineOptions, EvaluateOptions, ModelOptions


def run(
    model: ModelOptions,
    data: DataOptions,
    options: EvaluateOptions,
    engine_options: EngineOptions,
    episode_options: EpisodeOptions,
) -> int:
    """Evaluate and write the report."""
    from ..verifier import Verifier
    from .engines.interface import SamplingSettings
    from .engines.starting import start_engine
    from .evaluation import evaluate
    from .files import write_json
    from .prompts import fitting_prompts
    from .setup import load_from_options, load_tokenizer

    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems = load_from_options(data, for_evaluation=True)
    problems, prompts = fitting_prompts(problems, tokenizer, data)
    print(f"{len(problems)} problems, {options.num_samples} samples each", flush=True)
    Path(options.output).resolve().parent.mkdir(parents=True, exist_ok=True)
    if episode_options.is_pag:
        return _run_episodes(model, options, engine_options, episode_options, tokenizer, problems, prompts)
    engine, policy = start_engine(model, engine_options, prompts, options.max_completion_length)
    with Verifier(options.verifier_workers) as verifier:
        report = evaluate(
            engine,
            tokenizer,
            problems,
            SamplingSettings(options.max_completion_length, options.temperature, logprobs=False),
            verifier,
            num_samples=options.num_samples,
            require_eos=options.require_eos,
            seed=options.seed,
            policy=policy,
        )
    write_json(Path(options.output), report.to_json())
    print_report(report, options.output, options.show)
    return 0


def _run_episodes(
    model: ModelOptions,
    options: EvaluateOptions,
    engine_options: EngineOptions,
    episode_options: EpisodeOptions,
    tokenizer: Any,
    problems: list[Problem],
    prompts: list[list[int]],
) -> int:
    from ..verifier import Verifier
    from .engines.interface import SamplingSettings
    from .engines.starting import start_engine
    from .episodes.evaluation import evaluate_episodes
    from .episodes.page import print_episodes, write_page
    from .files import write_json

    episode_options.check_engine(engine_options.engine)
    longest = episode_options.longest(tokenizer, options.max_completion_length)
    engine, policy = start_engine(model, engine_options, prompts, longest)
    settings = SamplingSettings(options.max_completion_length, options.temperature)
    sampler = episode_options.sampler(engine, tokenizer, settings, policy)
    with Verifier(options.verifier_workers) as verifier:
        report = evaluate_episodes(
            sampler,
            problems,
            prompts,
            verifier,
            num_samples=options.num_samples,
            require_eos=options.require_eos,
            seed=options.seed,
        )
    write_json(Path(options.output), report.to_json())
    write_page(report, Path(options.output).with_suffix(".html"))
    print_episodes(report, options.output, options.show)
    return 0


def print_report(report: EvaluationReport, output: str, show: int = 0) -> None:
    """Show a report as a table, and its first problems."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    k = report.num_samples
    for sample in report.samples[: show * k]:
        verdict = "[green]correct[/]" if sample.correct else f"[red]{sample.outcome}[/]"
        console.print(f"[bold]{escape(sample.question)}[/] (gold {escape(sample.gold)})", verdict)
        console.print(escape(sample.text), "\n")
    table = Table(title=f"{report.num_problems} problems", show_header=False)
    low, high = report.ci95
    table.add_row(f"avg@{k}", f"{report.avg_at_k:.3f}  (95 % interval {low:.3f} to {high:.3f})")
    table.add_row(f"pass@{k}", f"{report.pass_at_k:.3f}")
    table.add_row("cut at the length limit", f"{report.truncated:.1%}")
    table.add_row("mean tokens", f"{report.mean_tokens:.1f}")
    for outcome, count in sorted(report.outcomes.items()):
        table.add_row(outcome, str(count))
    console.print(table)
    console.print(f"report: {output}")


def main() -> None:
    """Entry point of `astarpo-eval`."""
    run_command(
        lambda: run(
            *parse_command(
                [ModelOptions, DataOptions, EvaluateOptions, EngineOptions, EpisodeOptions],
                section="eval",
                prog="astarpo-eval",
                description="Evaluate a model, or a LoRA adapter on it, on math problems: avg@k and pass@k with a 95 % "
                "interval, as a table and as JSON. With --episode pag: attempt, verification and revision.",
            )
        )
    )


if __name__ == "__main__":
    main()
