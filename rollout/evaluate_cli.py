"""`astarpo-eval`: avg@k and pass@k of a model or an adapter, and what its kind of episode adds, as a table, JSON and HTML."""

from pathlib import Path

from ..cli import parse_command, run_command
from .options import DataOptions, EngineOptions, EpisodeOptions, EvaluateOptions, ModelOptions


def run(
    model: ModelOptions,
    data: DataOptions,
    options: EvaluateOptions,
    engine_options: EngineOptions,
    episode_options: EpisodeOptions,
) -> int:
    """Evaluate and write the report."""
    from ..verifier import Verifier
    from .data import load_from_options
    from .engines.interface import SamplingSettings
    from .engines.start import start_engine
    from .episode import EpisodeSampler, FollowUps
    from .evaluation import evaluate
    from .files import write_json
    from .pag import episode_kind
    from .page import print_report, write_page
    from .prompts import fitting_prompts, load_tokenizer
    from .startup import chosen_engine

    engine_options = chosen_engine(engine_options)
    kind = episode_kind(episode_options)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems = load_from_options(data, for_evaluation=True)
    problems, prompts = fitting_prompts(problems, tokenizer, data)
    print(f"{len(problems)} problems, {options.num_samples} samples each", flush=True)
    output = Path(options.output)
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    longest = FollowUps.render(tokenizer, kind).longest_after_prompt(options.max_completion_length)
    engine, policy = start_engine(model, engine_options, prompts, longest)
    # PAG's metrics ask how sure the model is of its verdicts; nobody reads the log-probs of a completion.
    settings = SamplingSettings(options.max_completion_length, options.temperature, logprobs=len(kind.roles) > 1)
    try:
        with Verifier(options.verifier_workers) as verifier:
            report = evaluate(
                EpisodeSampler(engine, tokenizer, kind, settings, policy),
                problems,
                prompts,
                verifier,
                num_samples=options.num_samples,
                require_eos=options.require_eos,
                seed=options.seed,
            )
    finally:
        engine.close()
    write_json(output, report.to_json())
    write_page(report, output.with_suffix(".html"))
    print_report(report, options.output, options.show)
    return 0


def main() -> None:
    """Entry point of `astarpo-eval`."""
    run_command(
        lambda: run(
            *parse_command(
                [ModelOptions, DataOptions, EvaluateOptions, EngineOptions, EpisodeOptions],
                section="eval",
                prog="astarpo-eval",
                description="Evaluate a model, or a LoRA adapter on it, on math problems: avg@k and pass@k with a 95 % "
                "interval, as a table, as JSON, and as a page with all samples. With --episode pag: attempt, verification and "
                "revision.",
            )
        )
    )


if __name__ == "__main__":
    main()
