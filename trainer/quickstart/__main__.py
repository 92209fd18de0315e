"""`python -m astarpo.trainer.quickstart`: watch a real language model learn the times tables by A*-PO.

One process, one engine: evaluate the reference on held-out problems, sample the reference pool, train, evaluate the
adapter that was saved. The settings are the recipe `configs/quickstart.yaml`; with `--recipe quickstart_pag` it learns to
verify and to revise its answers.
"""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...cli import parse_command, run_command

HELD_OUT_EVERY = 5


@dataclass
class QuickstartOptions:
    """Where to, and with what.

    Args:
        output_dir (`str`, *optional*):
            Folder for the pool, the adapter and the report; `runs/` and the recipe's name when not given.
        recipe (`str`, *optional*, defaults to `"quickstart"`):
            `quickstart`, or `quickstart_pag` for PAG episodes.
        model_name_or_path (`str`, *optional*):
            Hub id or folder of another chat model; SmolLM2-135M-Instruct when not given.
        seed (`int`, *optional*, defaults to `0`):
            Run seed.
        max_steps (`int`, *optional*):
            Number of updates; the recipe's when not given.
        warm_up_steps (`int`, *optional*, defaults to `0`):
            Of PAG episodes: updates of a supervised warm-up of their form before everything else. The model that comes
            of it is the reference; the report has both.
    """

    output_dir: str = field(
        default="",
        metadata={"help": "Folder for pool, adapter and report; runs/ and the recipe's name when not given."},
    )
    recipe: str = field(
        default="quickstart",
        metadata={
            "help": "quickstart, or quickstart_pag for PAG episodes.",
            "choices": ["quickstart", "quickstart_pag"],
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another chat model; SmolLM2-135M-Instruct when not given."}
    )
    seed: int = field(default=0, metadata={"help": "Run seed."})
    max_steps: int | None = field(default=None, metadata={"help": "Number of updates; the recipe's when not given."})
    warm_up_steps: int = field(
        default=0, metadata={"help": "Of PAG episodes: updates of a supervised warm-up of their form."}
    )

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{self.recipe}"
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}.")
        if self.warm_up_steps < 0:
            raise ValueError(f"warm_up_steps must be 0 or more, got {self.warm_up_steps}.")
        if self.warm_up_steps and self.recipe != "quickstart_pag":
            raise ValueError(
                "warm_up_steps teaches the form of episodes: set --recipe quickstart_pag, or leave it out."
            )


class Clock:
    """Seconds spent in each part of the run."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds = {"stage1": 0.0, "stage2": 0.0, "eval": 0.0}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count what is done within as a part of the run."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - began


def quickstart(options: QuickstartOptions) -> int:
    """Run both stages and the evaluations, and write the report."""
    from .report import describe, point, score, write_report

    clock, folder = Clock(), Path(options.output_dir)
    run, cold = warmed_run(options, clock)
    print("\n== before: the reference on the held-out problems", flush=True)
    before = run.evaluate(last=True)
    print("\n== stage 1: reference samples", flush=True)
    pool = run.sample()
    print("\n== stage 2: training", flush=True)
    log, during = run.train(pool)
    print("\n== after: the saved adapter on the held-out problems", flush=True)
    after = run.evaluate(run.saved_adapter(), last=True)
    during = [point(0, before), *during]
    if during[-1]["update"] != len(log):
        during.append(point(len(log), after))
    scores = {"before_warm_up": cold and score(cold), "before": score(before), "after": score(after)}
    content = scores | {"updates": len(log), "heldout_during": during} | _circumstances(options, run, clock)
    write_report(folder, content, after, before, log)
    if cold is not None:
        print(f"\nheld-out before the warm-up: {describe(cold)}")
    print(
        f"\nheld-out {describe(before)} -> {describe(after)} after {len(log)} updates, "
        f"{content['seconds']['total']:.0f} s, peak memory {content['peak_rss_gb']:.1f} GB\n"
        f"adapter: {folder / 'adapter'}   report: {folder / 'report.md'}   curve: {folder / 'learning_curve.png'}"
    )
    return 0


def warmed_run(options: QuickstartOptions, clock: Clock) -> "tuple[Run, Any]":
    """The engine with the reference, and the evaluation before the warm-up, if there is one."""
    from .model import fetch_model
    from .task import write_problems

    folder = Path(options.output_dir)
    model = options.model_name_or_path or str(fetch_model(folder.parent / "models"))
    train_file, heldout_file = map(str, write_problems(folder / "data"))
    run = Run(options, model, train_file, heldout_file, clock)
    if not options.warm_up_steps:
        return run, None
    print("\n== before the warm-up", flush=True)
    cold = run.evaluate(last=True)
    return Run(options, run.warmed_up(options.warm_up_steps), train_file, heldout_file, clock), cold


def _circumstances(options: QuickstartOptions, run: "Run", clock: Clock) -> dict[str, Any]:
    from .report import command_line, versions

    return {
        "seconds": {**clock.seconds, "total": time.monotonic() - clock.began},
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "model": run.model.model_name_or_path,
        "warm_up_steps": options.warm_up_steps,
        "seed": options.seed,
        "command": command_line(),
        "versions": versions(),
    }


class Run:
    """The engine and everything that the steps share."""

    def __init__(self, options: QuickstartOptions, model: str, train_file: str, heldout_file: str, clock: Clock):
        from ...rollout.engines.start import start_engine
        from ...rollout.engines.vllm_engine import VLLMEngine
        from ...rollout.episodes.options import EpisodeOptions
        from ...rollout.evaluate_cli import EvaluateOptions
        from ...rollout.options import DataOptions, EngineOptions, ModelOptions, SampleOptions
        from ...rollout.prompts import tokenize_prompts
        from ...rollout.setup import load_from_options, load_tokenizer
        from ...verifier import Verifier

        self.folder, self.clock, self.seed = Path(options.output_dir), clock, options.seed
        self.max_steps, self.recipe = options.max_steps, options.recipe
        seed = ["--seed", str(options.seed)]
        self.model, data, self.sampling, self.engine_options, self.episodes = self._section(
            [ModelOptions, DataOptions, SampleOptions, EngineOptions, EpisodeOptions],
            "rollout",
            [
                "--model_name_or_path",
                model,
                "--dataset_name",
                train_file,
                "--output_dir",
                f"{self.folder}/pool",
                *seed,
            ],
        )
        _, heldout, self.evaluation, *_ = self._section(
            [ModelOptions, DataOptions, EvaluateOptions, EngineOptions, EpisodeOptions],
            "eval",
            ["--model_name_or_path", model, "--dataset_name", heldout_file, "--output", "unused", *seed],
        )
        self.tokenizer = load_tokenizer(model)
        self.problems = load_from_options(data, for_evaluation=False, exclude=heldout_file)
        self.heldout = load_from_options(heldout, for_evaluation=True)
        self.verifier = Verifier()
        prompts = tokenize_prompts([*self.problems, *self.heldout], self.tokenizer)
        longest = self.episodes.longest(self.tokenizer, self.sampling.max_completion_length)
        engine, _ = start_engine(self.model, self.engine_options, prompts, longest)
        assert isinstance(engine, VLLMEngine)
        self.engine = engine

    def warmed_up(self, steps: int) -> str:
        """End the engine, teach the model the form of episodes, and return its folder."""
        from ...rollout.prompts import tokenize_prompts
        from .warm_up import warm_up

        self.close()
        prompts = tokenize_prompts(self.problems, self.tokenizer)
        model = self.model.model_name_or_path
        return warm_up(
            model, self.tokenizer, self.problems, prompts, self.episodes, steps, self.seed, self.folder / "warm_up"
        )

    def close(self) -> None:
        """End the engine and the verifier."""
        self.engine.close()
        self.verifier.close()

    def evaluate(self, policy: Any = None, last: bool = False) -> Any:
        """Evaluate on the held-out problems; before and after the run with as many samples as the recipe says."""
        from ...rollout import SamplingSettings, evaluate
        from ...rollout.episodes.evaluation import evaluate_episodes
        from ...rollout.prompts import tokenize_prompts
        from .report import describe

        settings = SamplingSettings(self.evaluation.max_completion_length, self.evaluation.temperature)
        options: dict[str, Any] = {
            "num_samples": self.evaluation.num_samples if last else 1,
            "require_eos": self.evaluation.require_eos,
            "seed": self.seed,
        }
        with self.clock.measure("eval"):
            if self.episodes.is_pag:
                sampler = self.episodes.sampler(self.engine, self.tokenizer, settings, policy)
                prompts = tokenize_prompts(self.heldout, self.tokenizer)
                report = evaluate_episodes(sampler, self.heldout, prompts, self.verifier, **options)
            else:
                report = evaluate(
                    self.engine, self.tokenizer, self.heldout, settings, self.verifier, policy=policy, **options
                )
        print(f"held-out {describe(report)}", flush=True)
        return report

    def sample(self) -> Any:
        """Stage 1: the reference pool."""
        from ...rollout.fingerprint import pool_fingerprint
        from ...rollout.stage1 import sample_pool

        fingerprint = pool_fingerprint(self.model, self.engine_options, self.tokenizer, self.problems, self.sampling)
        fingerprint |= self.episodes.fingerprint()
        with self.clock.measure("stage1"):
            began = time.monotonic()
            pool = sample_pool(
                self.engine,
                self.tokenizer,
                self.problems,
                self.sampling,
                fingerprint,
                self.verifier,
                episodes=self.episodes,
            )
            if time.monotonic() - began < 1.0:
                print(f"pool: {pool.folder} is complete already", flush=True)
        summary = pool.summary()
        print(
            f"{summary['rows']} samples, mean reward {summary['mean_reward']:.3f}, "
            f"{summary['never_solved']:.0%} of the prompts never solved",
            flush=True,
        )
        return pool

    def train(
        self, pool: Any, every: int = HELD_OUT_EVERY, **changes: Any
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Train on a pool, evaluating every few updates; `changes` are made to the recipe's `TurnOptions`."""
        from trl import get_peft_config

        from ..__main__ import base_dtype
        from ..__main__ import options as train_options
        from ..summary import updates
        from ..trainer import AStarPOTrainer
        from .progress import HeldOutCurve, UpdateLines
        from .report import point

        words = ["--output_dir", str(self.folder / "adapter"), "--seed", str(self.seed), "--disable_tqdm", "true"]
        words += ["--pool", str(pool.folder)]
        if self.max_steps is not None:
            words += ["--max_steps", str(self.max_steps)]
        config, args, _, turns = self._section(train_options(), "train", words)
        args.model_init_kwargs = {"dtype": base_dtype(config, args), "attn_implementation": config.attn_implementation}
        trainer = AStarPOTrainer(
            self.model.model_name_or_path,
            args=args,
            processing_class=self.tokenizer,
            peft_config=get_peft_config(config),
            engine=self.engine,
            episode_options=replace(turns, **changes),
        )
        curve = HeldOutCurve(every, lambda update: point(update, self.evaluate(trainer.vllm_generation.link)))
        UpdateLines.replace_printer(trainer)
        trainer.add_callback(curve)
        with self.clock.measure("stage2"):
            evaluating = self.clock.seconds["eval"]
            trainer.train()
            self.clock.seconds["stage2"] -= self.clock.seconds["eval"] - evaluating
        if trainer.interrupt.requested:
            raise KeyboardInterrupt
        trainer.save_model(args.output_dir)
        trainer.vllm_generation.link.close()
        (self.folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1), encoding="utf-8")
        return updates(trainer.state.log_history), curve.points

    def _section(self, types: list[Any], section: str, words: list[str]) -> tuple[Any, ...]:
        """A command's section of the recipe."""
        words = ["--config", self.recipe, *words]
        return parse_command(types, section=section, prog="quickstart", description="", argv=words)

    def saved_adapter(self) -> Any:
        """The policy that `train` saved, for `evaluate`."""
        from ...rollout.engines.policy_link import InlineLink, SavedLora

        return InlineLink(self.engine, SavedLora.open(str(self.folder / "adapter")))


def main() -> None:
    """Entry point of the quickstart."""
    run_command(
        lambda: quickstart(
            *parse_command(
                [QuickstartOptions],
                section="quickstart",
                prog="python -m astarpo.trainer.quickstart",
                description="Both stages of A*-PO and an evaluation on the times tables, on a CPU.",
            )
        )
    )


if __name__ == "__main__":
    main()
