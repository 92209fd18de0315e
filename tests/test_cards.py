"""Cards reload with what was put in, link only to what is there, and show how to use the model in the first screen."""

import re
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard
from test_hub import finished_pool
from test_pool_faults import FINGERPRINT, PROBLEMS, row

from astarpo.rollout import ReferencePool
from astarpo.rollout.cards import license_of
from astarpo.rollout.pool import PoolWriter
from astarpo.rollout.pool.publishing import pool_card
from astarpo.trainer.card import CardFacts, Evaluated, model_card

FACTS = CardFacts(
    name="math-adapter",
    base_model="Qwen/Qwen2.5-1.5B-Instruct",
    license="apache-2.0",
    sources=(
        {"id": "DigitalLearningGmbH/MATH-lighteval", "config": None, "split": "train"},
        {"file": "own.csv", "blake2b": "0"},
    ),
    datasets=("me/more",),
    pool="me/pool",
    settings={"beta1": 0.5, "beta2": 0.001, "r": 32},
    log=({"step": 1, "reward": 0.25}, {"step": 20, "reward": 0.5}),
    evaluations=(
        Evaluated("HuggingFaceH4/MATH-500", "MATH-500", "accuracy", 0.56789, 0.5, "avg@1, temperature 1"),
        Evaluated("own.jsonl", "own.jsonl", "mean_reward", 0.25),
    ),
    tags=("arithmetic",),
)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]*)\)", text)


def test_a_models_card_reloads_with_what_was_put_in(tmp_path):
    model_card(FACTS).save(tmp_path / "README.md")
    card = ModelCard.load(str(tmp_path / "README.md"))
    data: Any = card.data
    assert (data.base_model, data.license, data.library_name) == (FACTS.base_model, "apache-2.0", "peft")
    assert data.datasets == ["me/more", "DigitalLearningGmbH/MATH-lighteval"]
    assert {"astarpo", "trl", "arithmetic"} <= set(data.tags) and data.pipeline_tag == "text-generation"
    found = {(one.dataset_type, one.dataset_name, one.metric_type, one.metric_value) for one in data.eval_results}
    assert found == {
        ("HuggingFaceH4/MATH-500", "MATH-500", "accuracy", 0.5679),
        ("own.jsonl", "own.jsonl", "mean_reward", 0.25),
    }
    assert links(card.text) and all(link.startswith("https://") and len(link) > 20 for link in links(card.text))
    # What a reader sees without scrolling.
    first = "\n".join(card.text.strip().splitlines()[:24])
    assert "How to use it" in first and "from_pretrained" in first
    for said in (
        "vllm serve Qwen/Qwen2.5-1.5B-Instruct --enable-lora --max-lora-rank 32",
        "| MATH-500 | accuracy",
        "0.500 | 0.568",
    ):
        assert said in card.text
    for said in (
        "V*(x)",
        "| beta2 | 0.001 |",
        "me/pool",
        "| trl |",
        "0.250 at update 1, 0.500 at update 20",
        "own.csv",
    ):
        assert said in card.text


def test_what_is_not_known_is_left_out_and_a_folder_is_no_link(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    folder = str(tmp_path / "base")
    card = model_card(CardFacts("out", folder, license_of(folder), is_adapter=False))
    data: Any = card.data
    assert data.base_model is None and data.license == "mit" and data.datasets is None
    assert data.eval_results is None and data.library_name == "transformers"
    assert str(tmp_path) not in str(card)
    assert all(link.startswith("https://") for link in links(card.text))
    assert license_of("nobody/nothing") is None and license_of(str(tmp_path)) is None


@pytest.mark.parametrize("is_local", [False, True])
def test_a_pools_card_reloads_with_what_was_put_in(tmp_path, is_local):
    model = "local 0123" if is_local else "Qwen/Qwen2.5-1.5B-Instruct@main"
    made = {**FINGERPRINT, "model": model, "model_name": "tiny" if is_local else "Qwen/Qwen2.5-1.5B-Instruct"}
    made["sources"] = [{"id": "openai/gsm8k", "config": "main", "split": "train"}, {"file": "own.csv", "blake2b": "0"}]
    with PoolWriter(tmp_path / "pool", PROBLEMS, 1, made) as writer:
        writer.commit([row(problem, 0, reward=1.0) for problem in PROBLEMS])
    (tmp_path / "README.md").write_text(pool_card(ReferencePool.open(tmp_path / "pool"), "me/pool"))
    card = DatasetCard.load(str(tmp_path / "README.md"))
    content = card.data.to_dict()
    assert content.get("base_model") == (None if is_local else "Qwen/Qwen2.5-1.5B-Instruct")
    assert content["source_datasets"] == ["openai/gsm8k"] and "text-generation" in content["task_categories"]
    assert {"astarpo", "reference-pool"} <= set(content["tags"])
    assert [one["config_name"] for one in content["configs"]] == ["samples", "prompts"]
    assert all(link.startswith("https://") for link in links(card.text))
    assert 'ReferencePool.open("me/pool")' in card.text and "own.csv" in card.text


def test_an_older_pools_card_says_what_it_can(tmp_path):
    assert "me/pool" in pool_card(finished_pool(tmp_path / "pool"), "me/pool")
