"""The card of a trained model: what it is, how it is used, what it was made of, and what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..rollout.cards import HUB, installed_versions, linked

PAPER = "2505.20686"
CITATION = r"""@article{brantley2025accelerating,
    title  = {{Accelerating RL for LLM Reasoning with Optimal Advantage Regression}},
    author = {Brantley, Kiant\'e and Chen, Mingyu and Gao, Zhaolin and Lee, Jason D. and Sun, Wen and Zhan, Wenhao and Zhang, Xuezhou},
    year   = 2025,
    eprint = {arXiv:2505.20686},
}"""
RECIPE = (
    *("beta1", "beta2", "num_value_samples", "temperature", "max_completion_length", "require_eos", "entropy_coef"),
    *("learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_grad_norm", "weight_decay", "optim", "seed"),
)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A result that a card states.

    Attributes:
        dataset (`str`):
            Hub id of the evaluation set, or a name for a file.
        name (`str`):
            The set's name for people.
        metric (`str`):
            What was measured, such as `accuracy`.
        value (`float`):
            The trained policy's.
        before (`float`, *optional*):
            The reference's.
        how (`str`):
            How it was sampled.
    """

    dataset: str
    name: str
    metric: str
    value: float
    before: float | None = None
    how: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        name (`str`):
            The model's name.
        base_model (`str`):
            Hub id or folder of the model that was trained; a folder is not linked.
        license (`str`, *optional*):
            The licence, that of the base model.
        sources (`tuple[dict, ...]`):
            Where the problems come from, see [`data_sources`].
        datasets (`tuple[str, ...]`):
            Further hub ids of data sets.
        pool (`str`, *optional*):
            Hub id or folder of the reference pool.
        is_adapter (`bool`):
            Whether it is a LoRA adapter.
        settings (`dict[str, Any]`):
            The recipe, from [`recipe_of`].
        log (`tuple[dict, ...]`):
            What was logged in training.
        evaluations (`tuple[Evaluated, ...]`):
            What was measured afterwards.
        tags (`tuple[str, ...]`):
            Further tags.
    """

    name: str
    base_model: str
    license: str | None = None
    sources: tuple[dict[str, Any], ...] = ()
    datasets: tuple[str, ...] = ()
    pool: str | None = None
    is_adapter: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    log: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[Evaluated, ...] = ()
    tags: tuple[str, ...] = ()


def model_card(facts: CardFacts) -> ModelCard:
    """The card of an adapter or a model that [`AStarPOTrainer`] trained."""
    base = None if Path(facts.base_model).is_dir() else facts.base_model
    ids = [*facts.datasets, *(source["id"] for source in facts.sources if source.get("id"))]
    datasets = list(dict.fromkeys(one for one in ids if not Path(one).exists()))
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=one.dataset,
            dataset_name=one.name,
            metric_type=one.metric,
            metric_value=round(one.value, 4),
            metric_name=f"{one.metric} ({one.how})" if one.how else one.metric,
        )
        for one in facts.evaluations
    ]
    data = ModelCardData(
        base_model=base,
        license=facts.license,
        datasets=datasets or None,
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="text-generation",
        model_name=facts.name,
        eval_results=results or None,
        tags=list(dict.fromkeys(["generated_from_trainer", "trl", "astarpo", "a-star-po", "math", *facts.tags])),
    )
    shown = linked(facts.base_model)
    what = "A LoRA adapter for" if facts.is_adapter else "A fine-tuned version of"
    on = ", ".join([linked(one, "datasets/") for one in datasets] + [s["file"] for s in facts.sources if "file" in s])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {facts.name}",
        f"{what} {shown}, trained{f' on {on}' if on else ''} with A*-PO: reinforcement learning for math reasoning with verifiable "
        f"rewards, by astarpo {installed_versions()['astarpo']}.",
        f"## How to use it\n\n{_usage(facts, base)}",
        f"## Results\n\n{_results(facts)}",
        f"## How it was trained\n\n{_method(facts)}",
        f"## Cite\n\n```bibtex\n{CITATION}\n```",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _usage(facts: CardFacts, base: str | None) -> str:
    """Lines to paste: transformers, and vLLM."""
    model = base or "BASE_MODEL"
    if facts.is_adapter:
        load = f"""from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{facts.name}")
tokenizer = AutoTokenizer.from_pretrained("{facts.name}")"""
        serve = f"vllm serve {model} --enable-lora --max-lora-rank {facts.settings.get('r', 16)} --lora-modules math={facts.name}"
    else:
        load = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{facts.name}")
tokenizer = AutoTokenizer.from_pretrained("{facts.name}")"""
        serve = f"vllm serve {facts.name}"
    note = "" if base else "\n`BASE_MODEL` is the model that was trained, which is a local folder here.\n"
    return f"""```python
{load}

question = [{{"role": "user", "content": "What is 12 * 11? Put your final answer within \\\\boxed{{}}."}}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=512)[0]))
```

Put the folder or the hub id in the place of `{facts.name}`, and prompt it as it was trained, with the same system prompt and worked examples.
{note}
```bash
{serve}
```"""


def _results(facts: CardFacts) -> str:
    if not facts.evaluations:
        entries = [entry for entry in facts.log if "reward" in entry]
        if not entries:
            return "Nothing was measured."
        return f"Not evaluated on held-out problems. Mean reward in training: {_training(entries)}."
    lines = ["| evaluation set | metric | before | after |", "|---|---|---|---|"]
    for one in facts.evaluations:
        how = f", {one.how}" if one.how else ""
        before = "" if one.before is None else f"{one.before:.3f}"
        lines.append(f"| {one.name} | {one.metric}{how} | {before} | {one.value:.3f} |")
    return "\n".join(lines)


def _training(entries: Sequence[dict[str, Any]]) -> str:
    first, last = float(entries[0]["reward"]), float(entries[-1]["reward"])
    return f"{first:.3f} at update {entries[0].get('step', 1)}, {last:.3f} at update {entries[-1].get('step', len(entries))}"


def _method(facts: CardFacts) -> str:
    entries = [entry for entry in facts.log if "reward" in entry]
    logged = f" Mean reward in training: {_training(entries)}." if entries else ""
    rows = [f"| {name} | {value} |" for name, value in facts.settings.items()]
    if facts.pool is not None:
        is_hub = not Path(facts.pool).exists() and facts.pool.count("/") == 1
        rows.append(
            f"| reference pool | {f'[{facts.pool}]({HUB}/datasets/{facts.pool})' if is_hub else Path(facts.pool).name} |"
        )
    rows += [f"| {name} | {found} |" for name, found in installed_versions().items()]
    return f"""[A*-PO]({HUB}/papers/{PAPER}) draws samples of the frozen reference once, which give the optimal value
V*(x) = β₁ ln mean exp(r/β₁) of each prompt x, and then one completion y of the policy per prompt, on which it minimises
(β₂ ln π(y|x)/π_ref(y|x) + V*(x) − r)².{logged}

| | |
|---|---|
{chr(10).join(rows)}"""


def recipe_of(args: Any, episode: str, peft_config: Any) -> dict[str, Any]:
    """The settings that a card states, by the names of their options."""
    settings: dict[str, Any] = {"episode": episode}
    for name in RECIPE:
        value = getattr(args, name, None)
        settings[name] = getattr(value, "value", value)
    if peft_config is not None:
        settings |= {"r": peft_config.r, "lora_alpha": peft_config.lora_alpha}
    return {name: value for name, value in settings.items() if value not in (None, "")}
