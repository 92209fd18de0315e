"""Which parts of training on PAG episodes matter: single turn, α, V that follows the policy, balance.

    python benchmarks/pag.py --seeds 0 1 2

Every variant trains SmolLM2-135M on divisions from the same reference episodes of its seed (recipe `quickstart_pag`, after its
warm-up) for the same number of updates, and is evaluated in episodes on the held-out problems. Each result is kept in `--cache`,
so that an interrupted run goes on where it stopped. Prints a table of means over seeds with the lowest and the highest, and the JSON.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from astarpo.rollout.files import write_json
from astarpo.rollout.fingerprint import verifier_name
from astarpo.trainer.quickstart import QuickstartOptions, fetch_model, quickstart

VARIANTS: dict[str, dict[str, Any]] = {
    "single-turn A*-PO": {"episode": "single", "turn_weights": None, "balance_labels": False},
    "PAG": {},
    "PAG, alpha 0": {"alpha": 0.0},
    "PAG, V of the reference": {"value_tracking": False},
    "PAG, labels not balanced": {"balance_labels": False},
}
SCORES = (
    "acc_t1",
    "acc_final",
    "verifier_accuracy",
    "bank_correct_recall",
    "bank_wrong_recall",
    "bank_youden_j",
    "bank_auc",
)


def measure(folder: Path, options: argparse.Namespace, seed: int, wanted: list[str], keep: Any) -> None:
    """Run the quickstart once for each variant of a seed; `keep` takes each result.

    They share a folder, so the warmed-up model and the reference episodes are made once.
    """
    model = str(fetch_model(Path("runs/models")))
    job = QuickstartOptions(
        str(folder / f"seed-{seed}"), "quickstart_pag", model, seed, options.updates, options.warm_up_steps
    )
    for name in wanted:
        print(f"\n==== {name}, seed {seed}", flush=True)
        report = quickstart(job, **VARIANTS[name])
        if report["before_warm_up"] is not None:
            keep("before the warm-up", report["before_warm_up"])
        keep("reference", report["before"] | _of_bank(report["bank_before"]))
        keep(
            name, report["after"] | _of_bank(report["bank_after"]) | {"seconds": round(report["seconds"]["stage2"], 1)}
        )


def _of_bank(found: dict[str, Any]) -> dict[str, Any]:
    return {f"bank_{name}": value for name, value in found.items()}


def table(results: dict[str, dict[str, Any]], seeds: list[int]) -> str:
    """Means over seeds, with the lowest and the highest."""
    lines = ["| (seeds) | " + " | ".join(SCORES) + " |", "|---" * (1 + len(SCORES)) + "|"]
    for name in ("before the warm-up", "reference", *VARIANTS):
        found = [results[key] for seed in seeds if (key := f"{name}/{seed}") in results]
        if found:
            cells = [_cell([result.get(figure) for result in found]) for figure in SCORES]
            lines.append(f"| {name} ({len(found)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{fmean(known):.2f} ({min(known):.2f} to {max(known):.2f})"


def kept_results(cache: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results that are there already; those of other settings are refused and stay."""
    if not cache.is_file():
        return {}
    kept = json.loads(cache.read_text(encoding="utf-8"))
    if kept["settings"] != settings:
        raise SystemExit(
            f"{cache} has results of {kept['settings']}, not of {settings}. Name another file with --cache."
        )
    return kept["results"]


def main() -> None:
    """Measure what is missing, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, help="the recipe's when not given")
    parser.add_argument(
        "--warm_up_steps", type=int, default=12, help="of the quickstart's supervised warm-up of form; 0 for none"
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/pag.json"))
    options = parser.parse_args()
    settings = {"updates": options.updates, "warm_up_steps": options.warm_up_steps, "verifier": verifier_name()}
    results = kept_results(options.cache, settings)
    options.cache.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        wanted = [name for name in options.variants if f"{name}/{seed}" not in results]
        if not wanted:
            continue

        def keep(name: str, result: dict[str, Any], seed: int = seed) -> None:
            results[f"{name}/{seed}"] = result
            write_json(options.cache, {"settings": settings, "results": results})

        measure(options.cache.with_suffix(""), options, seed, wanted, keep)
    print(table(results, options.seeds))
    print(json.dumps({"settings": settings, "results": results}))


if __name__ == "__main__":
    main()
