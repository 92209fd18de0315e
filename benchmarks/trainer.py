"""What an update costs, and how soon and how well division is learnt: ours, TRL's GRPO and TRL's A*-PO.

    python benchmarks/trainer.py
    python benchmarks/trainer.py --only accuracy --seeds 0 1 2 3 4
    python benchmarks/trainer.py --only lags

Prints one JSON line. `update_to_floor`: seconds of an update over those of the floor (one reference forward, one policy
forward, one backward by plain transformers calls on packed rows) and a bare `LLM.generate`. `update_vs_a2po`: seconds
of an update over theirs. `time_to_accuracy_vs_*`: seconds from loading the model, stage 1 included, to the first of two consecutive evaluations
at the level asked for, over theirs; medians over seeds, and where a run does not get there its whole time counts. `full_*`: ours with all
weights. All contenders run for the same seconds. Each part runs in a process of its own and is kept in a JSON file, so the benchmark can
be made in several sittings. Learning rates are those of `benchmarks/rates.json`, chosen by `benchmarks/tune.py` on other seeds.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy import learn, summary
from contenders import (
    GENERATIONS,
    PROMPTS_PER_UPDATE,
    TRAINERS,
    VALUES,
    EachUpdate,
    Phases,
    lora,
    watch,
)
from parts import RATES, Parts
from tasks import TASKS

from astarpo.rollout.episode import ATTEMPT

WARM_UP = 2
STANDSTILL = 1e-12
"""A learning rate at which the policy stays the reference, so that completions have the same lengths for all."""


def measure_update(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an update by phase, after warming up, and for ours the floor and the bare engine."""
    options.learning_rate, options.updates = STANDSTILL, WARM_UP + options.updates_timed
    options.rows = 2 * PROMPTS_PER_UPDATE  # so that every batch is full
    options.value_samples = 2  # stage 1 is not what is timed here
    phases, seen = Phases(), Completions()

    def after_update(step: int, seconds: float) -> bool:
        phases.updates.append(seconds)
        if step == WARM_UP:
            phases.forget()
            seen.forget()
        return False

    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](options, folder)
        watch(name, trainer, phases)
        seen.listen(name, trainer)
        trainer.add_callback(EachUpdate(after_update))
        trainer.train()
        report = {**phases.report(), "tokens_per_completion": seen.mean_length()}
        if name == "ours":
            report |= _floor_of(trainer, seen, options)
    return report


class Completions:
    """What a trainer sampled in the updates that are timed."""

    def __init__(self) -> None:
        self.updates: list[list[tuple[list[int], list[int]]]] = []
        self.seeds: list[list[int]] = []
        self._lengths: list[int] = []

    def forget(self) -> None:
        """Start anew, after warming up."""
        self.updates.clear()
        self.seeds.clear()
        self._lengths.clear()

    def mean_length(self) -> float:
        """Tokens of a completion, end of sequence included."""
        return round(sum(self._lengths) / len(self._lengths), 2)

    def listen(self, name: str, trainer: Any) -> None:
        """Note what `trainer` samples."""
        if name == "ours":
            self._listen_to_sampler(trainer.sampler)
            return
        method = "_prepare_inputs" if name == "a2po" else "_generate_and_score_completions"
        inner = getattr(trainer, method)

        def noting(inputs: Any) -> Any:
            output = inner(inputs)
            mask = (
                output["attention_mask"][:, -output["logits_to_keep"] :]
                if name == "a2po"
                else output["completion_mask"]
            )
            self._lengths += mask.sum(1).tolist()
            return output

        setattr(trainer, method, noting)

    def _listen_to_sampler(self, sampler: Any) -> None:
        sample = sampler.sample

        def noting(prompts: Any, seeds: Any, *args: Any) -> Any:
            episodes = sample(prompts, seeds, *args)
            self.updates.append([(list(episode.prompt), list(episode.token_ids)) for episode in episodes])
            self.seeds.append([seeds(number, ATTEMPT) for number in range(len(prompts))])
            self._lengths += [len(episode.token_ids) for episode in episodes]
            return episodes

        sampler.sample = noting


def _floor_of(trainer: Any, seen: Completions, options: argparse.Namespace) -> dict[str, Any]:
    from floor import bare_engine_seconds, fastest_floor

    bare = [
        bare_engine_seconds(trainer.engine, [prompt for prompt, _ in rows], seeds, TASKS[options.task]().length)
        for rows, seeds in zip(seen.updates, seen.seeds, strict=True)
    ]
    floor = fastest_floor(options.model, lora(), seen.updates)
    return {"floor": floor, "bare_engine_s": round(statistics.median(bare), 3)}


def _of_updates(options: argparse.Namespace) -> list[str]:
    """Those whose every update samples, and costs the same."""
    return [name for name in options.trainers if name != "ours_rounds"]


def update_times(parts: Parts, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an update of all of them, and the ratios."""
    reports = {name: parts.run("update", name, updates_timed=options.updates_timed) for name in _of_updates(options)}
    mine = reports["ours"]
    least = mine["floor"]["floor_s"] + mine["bare_engine_s"]
    others = [name for name in reports if name != "ours"]
    return {
        "update": reports,
        "update_to_floor": round(mine["update_s"] / least, 3),
        **{f"update_vs_{name}": round(mine["update_s"] / reports[name]["update_s"], 3) for name in others},
    }


def accuracies(parts: Parts, options: argparse.Namespace) -> dict[str, Any]:
    """How soon and how well each contender learns, over the seeds, and the ratios of the medians.

    Seeds are the outer loop: a benchmark that is stopped early has the same seeds of everyone.
    """
    rates = json.loads(RATES.read_text())["chosen"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.trainers}
    how = {"seconds": options.seconds, "evaluate_every_s": options.evaluate_every_s}
    for seed in options.seeds:
        for name in options.trainers:
            runs[name].append(parts.run("accuracy", name, seed=seed, learning_rate=rates[name], **how))
    found = {name: summary(reports, options.level) for name, reports in runs.items()}
    ratios = {}
    for mine, prefix in (("ours", ""), ("ours_full", "full_"), ("ours_rounds", "rounds_")):
        for name in ("ours", "grpo", "a2po") if mine == "ours_rounds" else ("grpo", "a2po"):
            if mine in found and name in found:
                seconds = found[mine]["median_seconds"], found[name]["median_seconds"]
                ratios[f"{prefix}time_to_accuracy_vs_{name}"] = round(seconds[0] / seconds[1], 3)
    return {
        **ratios,
        "accuracy": found,
        "learning_rates": rates,
        "note": "The TRL trainers sample by transformers: they cannot push weights into vLLM's CPU engine. A2PO "
        "samples from the 50 likeliest words, which is what its default comes to.",
    }


LAGS = {1: (1, 1), 4: (8, 2), 16: (32, 2), 64: (128, 8)}
"""Updates that a round has, to the options that make it so: `updates_per_round` and `num_iterations`. Nearly half of the rows of this task are in
groups whose completions all earned the same, which are left out, so a round has about half of the updates that it may have."""
GUARDS, LAG_UPDATES, LAG_ROWS = (0.5, 0.0), 24, 16


def lags(parts: Parts, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of rounds after the same updates, by how many updates a round has, with the guard and without."""
    rate = json.loads(RATES.read_text())["chosen"]["ours_rounds"]
    found: dict[str, Any] = {}
    for lag, (updates_per_round, uses) in LAGS.items():
        for guard in GUARDS if lag > 1 else GUARDS[:1]:  # at the first update of a round the share is 1
            options_of_rounds = {
                "updates_per_round": updates_per_round,
                "num_iterations": uses,
                "least_effective_share": guard,
            }
            # Without the guard until a whole round is over, to see where it leads.
            updates = LAG_UPDATES if guard else max(LAG_UPDATES, lag)
            how = {"seconds": 1e9, "updates": updates, "evaluate_every_s": 0.0, "evaluate_every": 8}
            texts = {"rounds": options_of_rounds, "more": {"per_device_train_batch_size": LAG_ROWS}}
            how |= {name: json.dumps(content, separators=(",", ":")) for name, content in texts.items()}
            for seed in options.seeds:
                run = parts.run("accuracy", "ours_rounds", seed=seed, learning_rate=rate, **how)
                found[f"lag {lag}, guard {'on' if guard else 'off'}, seed {seed}"] = {
                    "accuracy": {point["update"]: point["accuracy"] for point in run["curve"]},
                    "completions": run["curve"][-1]["completions"],
                    "seconds": run["curve"][-1]["seconds"],
                }
    return {"lags": found}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, fetched into runs/models")
    parser.add_argument("--attention", default="eager", help="eager is faster than sdpa on these short rows, for all")
    parser.add_argument("--cache", default="runs/benchmarks/trainer.json", help="where finished parts are kept")
    parser.add_argument("--task", default="division", choices=list(TASKS), help="what is learnt (benchmarks/tasks.py)")
    parser.add_argument("--only", choices=["update", "accuracy", "lags"], help="run one part")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=360.0, help="how long each contender runs, stage 1 included")
    parser.add_argument("--level", type=float, default=0.5, help="held-out accuracy asked for")
    parser.add_argument(
        "--evaluate_every_s", type=float, default=30.0, help="evaluations are not counted in anyone's time"
    )
    parser.add_argument("--updates_timed", type=int, default=5)
    internal = parser.add_argument_group("one part, as the benchmark calls itself")
    internal.add_argument("--part", choices=["update", "accuracy"])
    internal.add_argument("--trainer", choices=list(TRAINERS))
    internal.add_argument("--seed", type=int, default=0)
    internal.add_argument("--learning_rate", type=float)
    internal.add_argument("--updates", type=int, default=1000, help="most updates of a run")
    internal.add_argument("--evaluate_every", type=int, default=1, help="updates between evaluations, at least")
    internal.add_argument("--value", default="tracked", choices=list(VALUES), help="where our V comes from")
    internal.add_argument("--value_samples", type=int, default=2)
    internal.add_argument("--more", default="{}", help="ours: further fields of AStarPOConfig, as JSON")
    internal.add_argument("--rounds", default="{}", help="ours in rounds: fields of RoundOptions, as JSON")
    internal.add_argument("--engine", default="vllm", help="ours: vllm or transformers")
    internal.add_argument("--rows", type=int, help="training problems; default: all")
    return parser.parse_args(words)


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.model is None:
        from astarpo.trainer.quickstart import fetch_model

        options.model = str(fetch_model(Path("runs/models")))
    if options.part:
        measure = measure_update if options.part == "update" else learn
        print(json.dumps(measure(options.trainer, options)))
        return
    parts, result = Parts(options), {}
    if options.only in (None, "update"):
        result |= update_times(parts, options)
    if options.only in (None, "accuracy"):
        result |= accuracies(parts, options)
    if options.only == "lags":
        result |= lags(parts, options)
    sizes = {
        "completions_per_update": PROMPTS_PER_UPDATE,
        "max_completion_length": TASKS[options.task]().length,
        "grpo_generations": GENERATIONS,
    }
    print(json.dumps({**result, "settings": {**vars(options), "model": Path(options.model).name, **sizes}}))


if __name__ == "__main__":
    main()
