"""`astarpo eval`: avg@k, pass@k and maj@k of a model or an adapter, and what its kind of episode adds; and `eval compare`."""

import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
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
    from .engines.interface import EngineError, SamplingSettings
    from .engines.start import start_engine
    from .episode import EpisodeSampler, FollowUps
    from .evaluated import evaluated_with
    from .evaluation import evaluate
    from .files import write_json
    from .pag import episode_kind
    from .page import print_report, write_page
    from .prompts import fitting_prompts, load_tokenizer
    from .startup import chosen_engine

    began, clock = datetime.now(UTC), time.monotonic()
    settings = SamplingSettings(options.max_completion_length, options.temperature, top_p=options.top_p)
    engine_options = chosen_engine(engine_options)
    kind = episode_kind(episode_options)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision)
    problems = load_from_options(data, for_evaluation=True)
    problems, prompts = fitting_prompts(problems, tokenizer, data)
    print(f"{len(problems)} problems, {options.num_samples} samples each", flush=True)
    output = Path(options.output)
    if output.is_dir() or output.suffix == ".html":
        raise ValueError(
            f"--output `{output}` must be a file for the JSON report, such as report.json; the page is written beside it."
        )
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    longest = FollowUps.render(tokenizer, kind).longest_after_prompt(options.max_completion_length)
    engine, policy = start_engine(model, engine_options, prompts, longest)
    # PAG's metrics ask how sure the model is of its verdicts; nobody reads the log-probs of a completion.
    settings = replace(settings, logprobs=len(kind.roles) > 1)
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
    except EngineError as error:
        print(f"error: the engine broke down, and nothing was written: {error}", file=sys.stderr)
        return 1
    finally:
        engine.close()
    evaluated = evaluated_with(model, data, options, engine_options, tokenizer, problems)
    evaluated |= {"began": began.isoformat(timespec="seconds"), "seconds": round(time.monotonic() - clock, 1)}
    write_json(output, report.to_json(evaluated))
    write_page(report, output.with_suffix(".html"))
    print_report(report, options.output, options.show)
    return 0


def compare(words: list[str]) -> int:
    """`eval compare A.json B.json`: what changed from one evaluation to the other, problem by problem."""
    import argparse

    from .comparing import compare_reports, print_comparison

    parser = argparse.ArgumentParser(
        prog="astarpo eval compare",
        description="Compare two evaluations of the same problems: the difference of their accuracies with a paired 95 % interval, and the "
        "problems that were gained and lost.",
    )
    parser.add_argument("before", type=Path, help="JSON report of `astarpo eval`")
    parser.add_argument("after", type=Path, help="another one, on the same problems")
    parser.add_argument("--json", type=Path, help="write the comparison to this file")
    parser.add_argument("--show", type=int, default=0, help="print so many problems that were gained, and lost")
    options = parser.parse_args(words)
    comparison = compare_reports(options.before, options.after)
    print_comparison(comparison, options.show)
    if options.json:
        from .files import write_json

        write_json(options.json, comparison.to_json())
    return 0


def main() -> None:
    """Entry point of `astarpo eval`."""
    if sys.argv[1:2] == ["compare"]:
        run_command(lambda: compare(sys.argv[2:]))
    run_command(
        lambda: run(
            *parse_command(
                [ModelOptions, DataOptions, EvaluateOptions, EngineOptions, EpisodeOptions],
                section="eval",
                prog="astarpo-eval",
                description="Evaluate a model, or a LoRA adapter on it, on math problems: avg@k, pass@k and maj@k with 95 % "
                "intervals, as a table, as JSON, and as a page with all samples. With --episode pag: attempt, verification and "
                "revision. `astarpo eval compare A.json B.json` compares two evaluations of the same problems.",
            )
        ),
        interrupted="nothing was written; run the same command again",
    )


if __name__ == "__main__":
    main()
