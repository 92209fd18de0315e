"""Stage 1 by the trainer itself, and pools that it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from commands import SMALL, run
from helpers import LORA, move, tiny_policy
from peft import LoraConfig
from test_stage1 import PROBLEMS

from astarpo.rollout import EngineOptions, ReferencePool, sample_pool
from astarpo.rollout.data import Problem
from astarpo.rollout.episode import TurnGrade
from astarpo.rollout.fingerprint import pool_fingerprint
from astarpo.rollout.graders import graded_by
from astarpo.rollout.options import ModelOptions, SampleOptions
from astarpo.rollout.pool import PoolWriter
from astarpo.rollout.sample import Answer
from astarpo.trainer import AStarPOConfig, AStarPOTrainer


def test_a_pool_of_an_adapter_is_no_reference(tiny_model, tmp_path):
    policy = tiny_policy(tiny_model)
    move(policy)
    policy.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "1?", "answer": "1"}) + "\n")
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--num_samples", 1, *SMALL]
    words += ["--temperature", 0, "--dtype", "float32", "--adapter", "adapter", "--output_dir", "vllm"]
    run("rollout", *words, cwd=tmp_path)
    config = AStarPOConfig(str(tmp_path / "o"), pool=str(tmp_path / "vllm"), temperature=1.0, max_completion_length=12)
    config.temperature = 0.0
    with pytest.raises(ValueError, match="sampled with an adapter"):
        AStarPOTrainer(tiny_model, args=config, peft_config=LoraConfig(**LORA))


def make_trainer(model, folder, dataset, reward_funcs=None, engine=None, **changes):
    args = AStarPOConfig(
        str(folder),
        **{
            **dict(per_device_train_batch_size=4, max_steps=1, max_completion_length=12, num_value_samples=4, seed=3),
            **dict(report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False),
            **changes,
        },
    )
    return AStarPOTrainer(
        model, reward_funcs, args=args, train_dataset=dataset, peft_config=LoraConfig(**LORA), engine=engine
    )


def parity(prompts, completions, completion_ids, **kwargs):
    """A reward that the random model earns now and then, and sometimes no signal."""
    return [None if sum(ids) % 5 == 0 else float(sum(ids) % 2) for ids in completion_ids]


def test_stage_1_by_the_trainer_gives_the_v_star_of_the_pool(engine, tokenizer, tiny_model, tmp_path):
    problems = [Problem(p.messages, gold) for p, gold in zip(PROBLEMS, "123456", strict=True)]
    options = SampleOptions(str(tmp_path / "pool"), num_samples=4, max_completion_length=12, seed=3, require_eos=False)

    def rewarded(answers: Sequence[Answer]):
        rewards = parity(None, [a.text for a in answers], [a.token_ids for a in answers])
        return [TurnGrade("rewarded", reward) for reward in rewards]

    fingerprint = pool_fingerprint(ModelOptions(tiny_model), EngineOptions(), tokenizer, problems, options)
    fingerprint |= graded_by([parity], [1.0]) | {"verifier": "reward functions parity, [1.0]"}
    pool = sample_pool(engine, tokenizer, problems, options, fingerprint, rewarded)
    settings = {"require_eos": False, "reward_funcs": parity, "engine": engine}
    from_pool = make_trainer(tiny_model, tmp_path / "a", pool.to_dataset(), **settings)
    by_path = make_trainer(tiny_model, tmp_path / "b", None, pool=str(tmp_path / "pool"), **settings)
    plain = pool.to_dataset().select_columns(["prompt", "solution"])
    joined = make_trainer(tiny_model, tmp_path / "c", plain, pool=str(tmp_path / "pool"), **settings)
    alone = make_trainer(tiny_model, tmp_path / "d", plain, **settings)
    assert "v_star" not in alone.train_dataset.column_names
    alone.train()
    values = from_pool.train_dataset["v_star"]
    assert len(set(values)) > 2
    for other in (by_path, joined, alone):
        assert other.train_dataset["v_star"] == values
    own = ReferencePool.open(tmp_path / "d" / "reference_pool")
    assert own.rewards() == pool.rewards()
    assert own.manifest.fingerprint["verifier"].startswith("reward functions parity")
    refused = subprocess.run(
        [sys.executable, "-m", "astarpo.rollout", "regrade", own.folder], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "reward functions parity" in refused.stderr
    stranger = plain.map(lambda row: {"solution": "7"})
    with pytest.raises(ValueError, match="no samples for"):
        make_trainer(tiny_model, tmp_path / "e", stranger, pool=str(tmp_path / "pool"), **settings)


def test_stage_1_by_the_trainer_is_continued_and_graded_by_the_verifier(engine, tiny_model, tmp_path, monkeypatch):
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "solution": "1"} for i in range(3)]
    from datasets import Dataset

    trainer = make_trainer(tiny_model, tmp_path, Dataset.from_list([*rows, rows[0]]), engine=engine)
    with pytest.raises(ValueError, match="never solved any of the 4 prompts"):
        trainer.train()
    pool = ReferencePool.open(tmp_path / "reference_pool")
    assert pool.num_rows == 12
    assert "astarpo rules" in pool.manifest.fingerprint["verifier"]
    monkeypatch.setattr(PoolWriter, "commit", lambda *_: pytest.fail("nothing was left to sample"))
    again = make_trainer(tiny_model, tmp_path, Dataset.from_list([*rows, rows[0]]), engine=engine)
    with pytest.raises(ValueError, match="never solved"):
        again.train()


def test_stage_1_without_vllm(tiny_model, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"{i}+", "solution": "1"} for i in range(4)])
    trainer = make_trainer(tiny_model, tmp_path, rows, parity, use_vllm=False, require_eos=False)
    trainer.train()
    pool = ReferencePool.open(tmp_path / "reference_pool")
    assert pool.manifest.fingerprint["engine"].startswith("transformers")
    assert os.path.isdir(tmp_path / "reference_pool")
    assert pool.num_rows == 16
