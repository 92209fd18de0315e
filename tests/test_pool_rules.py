"""A pool that was not made as the training that uses it samples and grades is refused, field by field, on every way in."""

from typing import Any

import pytest
from helpers import LORA, changed_pool
from peft import LoraConfig
from trl_helpers import config

from astarpo.rollout.data import Problem
from astarpo.rollout.fingerprint import pool_fingerprint
from astarpo.rollout.graders import graded_by
from astarpo.rollout.options import EngineOptions, ModelOptions, SampleOptions
from astarpo.rollout.pool import PoolWriter, ReferencePool, Sample, fingerprint_of_dataset
from astarpo.trainer import AStarPOTrainer
from astarpo.verifier import math_reward

PROBLEMS = [Problem(({"role": "user", "content": f"What is {n} plus 1?"},), str(n + 1)) for n in range(4)]


def half(completions, **kwargs):
    return [0.5] * len(completions)


@pytest.fixture(scope="module")
def made(tiny_model, tokenizer, tmp_path_factory) -> ReferencePool:
    """A pool of the tiny model's, with rewards instead of samples."""
    folder = tmp_path_factory.mktemp("pool") / "made"
    options = SampleOptions(str(folder), num_samples=2, max_completion_length=8, require_eos=False)
    fingerprint = pool_fingerprint(ModelOptions(tiny_model), EngineOptions(), tokenizer, PROBLEMS, options)
    with PoolWriter(folder, PROBLEMS, 2, fingerprint) as writer:
        writer.commit(
            [Sample(p.prompt_id, i, 0, (5,), "x", "stop", 1, "wrong", float(i)) for p in PROBLEMS for i in range(2)]
        )
    return ReferencePool.open(folder)


def train_on(
    model, engine, folder, pool: ReferencePool, way: str, rewards: Any = None, **settings: Any
) -> AStarPOTrainer:
    if way == "pool":
        settings["pool"] = str(pool.folder)
    return AStarPOTrainer(
        model,
        rewards,
        config(folder, num_value_samples=2, use_vllm=True, **settings),
        train_dataset=None if way == "pool" else pool.to_dataset().shuffle(seed=1).select(range(3)),
        peft_config=LoraConfig(**LORA),
        engine=engine,
    )


FIELDS: list[tuple[str, Any]] = [
    ("model", "local 0123"),
    ("tokenizer", "another"),
    ("chat_template", "another"),
    ("chat_template_kwargs", {"enable_thinking": True}),
    ("max_completion_length", 9),
    ("temperature", 0.7),
    ("require_eos", True),
    ("verifier", "astarpo rules 1, math-verify 0.9.0"),
    ("reward_functions", ["rewards.mine"]),
]


@pytest.mark.parametrize("way", ["pool", "to_dataset"])
@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[field for field, _ in FIELDS])
def test_a_pool_that_differs_in_one_field_is_refused_by_its_name(
    tiny_model, engine, made, tmp_path, way, field, value
):
    other = changed_pool(made, tmp_path / "pool", **{field: value})
    with pytest.raises(ValueError, match=f"{field}=") as refusal:
        train_on(tiny_model, engine, tmp_path / "run", other, way)
    assert "pool" in str(refusal.value) and len(str(refusal.value)) < 600


@pytest.mark.parametrize("way", ["pool", "to_dataset"])
def test_the_same_rules_and_the_same_pool_are_taken(tiny_model, engine, made, tmp_path, way):
    trainer = train_on(tiny_model, engine, tmp_path, made, way)
    assert len(trainer.train_dataset) == (4 if way == "pool" else 3)
    trainer.close()


def test_the_adapter_and_the_episode_are_compared_too(tiny_model, engine, made, tmp_path):
    sampled = changed_pool(made, tmp_path / "adapter", adapter="local 1")
    with pytest.raises(ValueError, match="sampled with an adapter"):
        train_on(tiny_model, engine, tmp_path / "run", sampled, "to_dataset")


def test_a_pool_graded_by_other_functions_is_refused_and_other_source_is_reported(
    tiny_model, engine, made, tmp_path, caplog
):
    with pytest.raises(ValueError, match=r"graded by reward_functions=astarpo\.verifier\.reward\.math_reward"):
        train_on(tiny_model, engine, tmp_path / "run", made, "pool", rewards=half)
    mine = {**graded_by([half], [1.0]), "verifier": "reward functions half, [1.0]"}
    mine["reward_sources"] = ["as it was"]
    graded = changed_pool(made, tmp_path / "graded", **mine)
    train_on(tiny_model, engine, tmp_path / "run", graded, "to_dataset", rewards=half).close()
    assert "the source of the reward function test_pool_rules.half has changed" in caplog.text
    weighted = changed_pool(made, tmp_path / "weighted", **graded_by([half, math_reward], [1.0, 2.0]))
    with pytest.raises(ValueError, match="reward_weights="):
        train_on(tiny_model, engine, tmp_path / "run", weighted, "pool", rewards=[half, math_reward])


def test_a_hub_id_and_a_folder_cannot_be_compared_and_say_so(tiny_model, engine, made, tmp_path, caplog):
    named = changed_pool(made, tmp_path / "named", model="Qwen/Qwen2.5-1.5B-Instruct@main")
    train_on(tiny_model, engine, tmp_path / "run", named, "pool").close()
    assert "cannot be told from its name" in caplog.text


def test_the_fingerprint_travels_with_the_data_set(made):
    dataset = made.to_dataset()
    for data in (dataset, dataset.map(lambda row: row), dataset.filter(lambda row: True), dataset.select([0])):
        assert fingerprint_of_dataset(data) == made.manifest.fingerprint
    assert fingerprint_of_dataset(dataset.from_list([{"a": 1}])) is None
