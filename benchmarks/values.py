"""How good V is while the policy learns: excess variance of every kind of V, against 64 samples a prompt of the policy.

    python benchmarks/values.py --seeds 0 1

Trains SmolLM2-135M on divisions (the quickstart's task) once a seed. The truth is 64 samples a prompt of the policy after 0, 10 and 20
updates. Every V uses only what was known before such an update: N reference samples, a prior, what earlier updates earned. The excess is
E(r − V)² / E p(1 − p), at best 1: by so much the variance of r − V is above what no V can avoid. Prints a table and one JSON line;
samples are kept in `--folder`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from peft import LoraConfig
from transformers import TrainerCallback

from astarpo.rollout import EngineOptions, EpisodeSampler, SamplingSettings, VLLMEngine, evaluate, load_problems
from astarpo.rollout.episode import SINGLE
from astarpo.rollout.files import write_json
from astarpo.rollout.prompts import load_tokenizer, tokenize_prompts
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, ValueOptions
from astarpo.trainer.critic import Critic
from astarpo.trainer.division import write_problems
from astarpo.trainer.quickstart import fetch_model
from astarpo.trainer.states import ConstantChances, States, first_states
from astarpo.trainer.value_network import fit_kappa, fit_value_network
from astarpo.trainer.values import StateValues
from astarpo.verifier import Verifier

TRUTH, REFERENCE, LENGTH, ROWS = 64, 8, 24, 32
CHECKED = (0, 10, 20)


def sample(folder: Path, model: str, seed: int) -> dict[str, Any]:
    """Train once, and keep every reward: of the reference, of the updates, and of the policy at the checked updates."""
    path = folder / f"seed-{seed}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    train_file, heldout_file = map(str, write_problems(folder / "data"))
    problems, heldout = load_problems(train_file), load_problems(heldout_file)
    tokenizer = load_tokenizer(model)
    prompts = tokenize_prompts(problems, tokenizer)
    engine = VLLMEngine(
        model, max(map(len, prompts)) + 8 + LENGTH, options=EngineOptions(kv_cache_gb=1, max_num_seqs=128)
    )

    def rewards(policy: Any, count: int, of: Any, temperature: float = 1.0) -> torch.Tensor:
        sampler = EpisodeSampler(engine, tokenizer, SINGLE, SamplingSettings(LENGTH, temperature), policy)
        with Verifier() as verifier:
            report = evaluate(sampler, of, tokenize_prompts(of, tokenizer), verifier, num_samples=count, seed=seed)
        return torch.tensor([float(one.correct) for one in report.samples]).view(len(of), count)

    first = rewards(None, REFERENCE + TRUTH, problems)
    rows = [
        {"prompt": list(p.messages), "solution": p.gold, "reference_rewards": row.tolist(), "number": number}
        for number, (p, row) in enumerate(zip(problems, first[:, :REFERENCE], strict=True))
    ]
    from datasets import Dataset

    trainer = AStarPOTrainer(
        model,
        args=AStarPOConfig(
            str(folder / f"run-{seed}"),
            **dict[str, Any](
                max_steps=max(CHECKED) + 1, per_device_train_batch_size=ROWS, max_completion_length=LENGTH
            ),
            **dict[str, Any](learning_rate=3e-4, lr_scheduler_type="constant", seed=seed),
            **dict[str, Any](save_strategy="no", report_to="none", logging_steps=1, gradient_checkpointing=False),
            **dict[str, Any](model_init_kwargs={"dtype": "auto", "attn_implementation": "eager"}, disable_tqdm=True),
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        engine=engine,
        value_options=ValueOptions(value_estimate="mean"),
    )
    hidden = torch.cat(trainer._reference_hidden(prompts, [[len(ids) - 1] for ids in prompts]))
    truth, updates, curve = {"0": first[:, REFERENCE:]}, [], []
    make_batch = trainer.make_batch

    def noting(batch_rows: Any, mode: str) -> Any:
        batch = make_batch(batch_rows, mode)
        updates.append(
            torch.stack([torch.tensor([float(row["number"]) for row in batch_rows]), batch["success"][:, 0]])
        )
        return batch

    trainer.make_batch = noting  # pyright: ignore[reportAttributeAccessIssue]

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert trainer.sampler.policy is not None
            link = trainer.sampler.policy.link
            if state.global_step in CHECKED:
                truth[str(state.global_step)] = rewards(link, TRUTH, problems)
            if state.global_step % 5 == 0:
                curve.append(rewards(link, 1, heldout, 0.0).mean().item())
                print(f"update {state.global_step}, held out {curve[-1]:.2f}", flush=True)

    trainer.add_callback(Look())
    trainer.train()
    trainer.close()
    engine.close()
    kept = {"reference": first[:, :REFERENCE], "truth": truth, "hidden": hidden, "updates": torch.stack(updates)}
    kept["curve"] = torch.tensor(curve)
    torch.save(kept, path)
    return kept


def values_of(kept: dict[str, Any], name: str, samples: int, update: int, seed: int) -> torch.Tensor:
    """V = p̂ of every prompt before an update, by one kind of V."""
    rewards, hidden = kept["reference"][:, :samples], kept["hidden"]
    count = len(rewards)
    seen = kept["updates"][:update]
    nothing = torch.zeros(count, dtype=torch.long)
    if name == "critic":
        critic = Critic(hidden.shape[1], 1, seed)
        for numbers, success in seen:
            rows = numbers.long()
            critic.update(hidden[rows], nothing[rows], nothing[rows], success)
        return critic.values(hidden, nothing, nothing).double()
    states = states_of(rewards, hidden)
    prior, *more = name.split("+")
    values = StateValues.fit(
        states, 0.0 if prior == "table" else None, prior == "network", "tracker" in more, seed, None
    )
    prior_B1 = values.prior(hidden if values.needs_hidden([0]) else None, nothing, nothing)[:, None]
    successes, prompts, label = rewards.sum(1), list(range(count)), nothing[:, None]
    trials = torch.full((count,), samples)
    for numbers, success in seen if values.tracker else ():
        rows = numbers.long()
        _, shifted = values.chances(prior_B1[rows], successes[rows], trials[rows], label[rows], rows.tolist())
        present = torch.ones(len(rows), 1, dtype=torch.bool)
        assert values.tracker is not None
        values.tracker.add(rows.tolist(), shifted, label[rows], success[:, None], present)
    return values.chances(prior_B1, successes, trials, label, prompts)[0][:, 0]


def states_of(rewards: torch.Tensor, hidden: torch.Tensor) -> States:
    """The prompts as states."""
    ids = [str(number) for number in range(len(rewards))]
    contexts = [[number] for number in range(len(rewards))]
    return first_states(
        ids, rewards.tolist(), contexts, SINGLE, lambda rows, at: [hidden[row[0]][None] for row in rows]
    )


def excess(value: torch.Tensor, truth: torch.Tensor) -> float:
    """E(r − V)² / E p(1 − p)."""
    p = truth.double().mean(1)
    least = (p * (1 - p)).mean() * truth.shape[1] / (truth.shape[1] - 1)
    return ((truth.double() - value[:, None]) ** 2).mean().item() / least.item()


def heldout_brier(kept: dict[str, Any], samples: int, seed: int) -> dict[str, Any]:
    """The network on prompts that it was not fitted to: mean square of chance − outcome on the 64 samples, beside the constants and the
    best that chances can do."""
    states = states_of(kept["reference"][:, :samples], kept["hidden"])
    network, report, heldout = fit_value_network(states, seed=seed)
    rows = torch.tensor([int(name) for name in heldout.prompts])
    truth = kept["truth"]["0"][rows].double()
    got = network.chances(heldout.hidden_SD, heldout.role_S, heldout.label_S).double()
    constant = ConstantChances.of(states).table[0][0]
    p = truth.mean(1)
    return {
        "network": ((truth - got[:, None]) ** 2).mean().item(),
        "constants": ((truth - constant) ** 2).mean().item(),
        "best": (p * (1 - p)).mean().item(),
        "reliability": report.reliability,
        "is_better": report.is_better,
        "kappa": fit_kappa(got.float(), heldout),
    }


KINDS = (
    *(("table", 8), ("table", 2), ("constant", 2), ("network", 2), ("constant", 8)),
    *(("constant+tracker", 2), ("network+tracker", 2), ("constant+tracker", 8), ("critic", 0)),
)


def report_of(kept: dict[str, Any], seed: int) -> dict[str, Any]:
    """All figures of a seed."""
    found: dict[str, Any] = {}
    for name, samples in KINDS:
        row = {}
        for update in CHECKED:
            value, truth = values_of(kept, name, samples, update, seed), kept["truth"][str(update)]
            row[f"mean {update}"] = round(excess(value, truth), 3)
            if name != "critic":  # V* of the same chances
                chances = torch.stack([1 - value, value], 1).clamp(min=0)
                optimal = 0.5 * (chances @ torch.tensor([1.0, torch.tensor(1 / 0.5).exp().item()]).double()).log()
                row[f"optimal {update}"] = round(excess(optimal, truth), 3)
        found[f"{name}, N={samples}"] = row
    found["network on held-out prompts"] = {n: heldout_brier(kept, n, seed) for n in (2, 8)}
    found["accuracy"] = {key: round(truth.mean().item(), 3) for key, truth in kept["truth"].items()}
    found["held out"] = [round(value, 3) for value in kept["curve"].tolist()]
    return found


def plot(reports: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw the excess of today's table, of few samples with prior and tracking, and of a critic, over updates; means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, estimate, label in (
        ("table, N=8", "optimal", "V* of 8 samples (the paper's)"),
        ("constant, N=2", "mean", "2 samples and a prior, mean reward"),
        ("constant+tracker, N=2", "mean", "the same, tracked"),
        ("network+tracker, N=2", "mean", "the same, tracked, prior a network"),
        ("critic, N=0", "mean", "critic, no samples"),
    ):
        means = [
            sum(report[name][f"{estimate} {update}"] for report in reports.values()) / len(reports)
            for update in CHECKED
        ]
        axes.plot(CHECKED, means, "o-", label=label)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlabel="update", ylabel="E(r − V)² / E p(1 − p)", yscale="log", xticks=CHECKED)
    axes.set_yticks([1, 1.5, 2, 3, 5, 8], labels=["1", "1.5", "2", "3", "5", "8"])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Sample what is missing, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct, fetched into runs/models")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/values"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.model or str(fetch_model(Path("runs/models")))
    reports = {seed: report_of(sample(options.folder, model, seed), seed) for seed in options.seeds}
    for seed, report in reports.items():
        for name, row in report.items():
            print(seed, name, row)
    write_json(options.folder / "report.json", reports)
    plot(reports, options.folder / "values.png")
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
