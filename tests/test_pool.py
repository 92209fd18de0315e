"""The reference pool with the real engine and the real verifier."""

import json
import shutil
from copy import deepcopy

import pytest
from helpers import tiny_policy

from astarpo.rollout import ReferencePool, sample_pool
from astarpo.rollout.data import Problem
from astarpo.rollout.fingerprint import pool_fingerprint
from astarpo.rollout.options import EngineOptions, ModelOptions, SampleOptions
from astarpo.rollout.pool import PoolWriter, Sample, check_pool
from astarpo.verifier import Verifier

PROBLEMS = [Problem(({"role": "user", "content": f"{i}+1?"},), str(i + 1)) for i in range(5)]


def sample(problem, index, reward=1.0):
    return Sample(problem.prompt_id, index, 7, (5, 2), "x", "stop", 2, "correct", reward)


def written(folder, rewards_of):
    with PoolWriter(folder, PROBLEMS, 4, {"model": "m"}) as writer:
        for number, problem in enumerate(PROBLEMS):
            writer.commit([sample(problem, i, reward) for i, reward in enumerate(rewards_of(number))])
    return ReferencePool.open(folder)


def test_values_come_from_the_stored_rewards(tmp_path):
    pool = written(tmp_path, lambda n: [1.0] * n + [0.0] * (4 - n))
    values = pool.values(0.5)
    assert [values[p.prompt_id] for p in PROBLEMS] == pytest.approx([0, 0.477, 0.717, 0.878, 1], abs=1e-3)
    assert pool.values(1e6)[PROBLEMS[1].prompt_id] == pytest.approx(0.25, abs=1e-5)
    summary = pool.summary()
    assert (summary["never_solved"], summary["always_solved"], summary["rows"]) == (0.2, 0.2, 20)


def test_dataset_is_ready_for_the_trainer(tmp_path):
    dataset = written(tmp_path, lambda n: [1.0, 0.0, None, 1.0]).to_dataset()
    assert dataset.column_names == ["prompt", "solution", "reference_rewards", "prompt_id"]
    assert dataset[2]["prompt"] == list(PROBLEMS[2].messages)
    assert dataset[2]["reference_rewards"] == [1.0, 0.0, None, 1.0]


def test_what_the_manifest_does_not_name_does_not_exist(tmp_path):
    with PoolWriter(tmp_path, PROBLEMS, 1, {}) as writer:
        writer.commit([sample(PROBLEMS[0], 0)])
    (tmp_path / "samples-00001.parquet").write_bytes(b"half a shard")
    with PoolWriter(tmp_path, PROBLEMS, 1, {}) as again:
        assert again.has(PROBLEMS[0].prompt_id, 0)
        assert again.present.sum() == 1
        again.commit([sample(PROBLEMS[1], 0)])
    assert ReferencePool.open(tmp_path).num_rows == 2
    assert not list(tmp_path.glob("*.tmp"))
    assert check_pool(tmp_path) == []


def test_another_fingerprint_is_refused_with_the_difference(tmp_path):
    PoolWriter(tmp_path, PROBLEMS, 1, {"model": "a", "seed": 0}).close()
    with pytest.raises(ValueError, match=r"model: 'a' in the pool, 'b' asked for"):
        PoolWriter(tmp_path, PROBLEMS, 1, {"model": "b", "seed": 0})
    PoolWriter(tmp_path, PROBLEMS, 1, {"model": "a", "seed": 0}).close()  # the refused one gave the lock back


def test_no_pool_an_unfinished_pool_and_another_layout_name_the_fix(tmp_path):
    with pytest.raises(ValueError, match="not a reference pool"):
        ReferencePool.open(tmp_path)
    with PoolWriter(tmp_path, PROBLEMS, 4, {}) as writer:
        writer.commit([sample(PROBLEMS[0], 0)])
    with pytest.raises(ValueError, match=r"1 of 20 samples.*again"):
        ReferencePool.open(tmp_path).values(0.5)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ValueError, match="layout version 99"):
        ReferencePool.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        ReferencePool.open(tmp_path)


def test_interrupted_sampling_is_continued_not_repeated(engine, tokenizer, tmp_path, tiny_model):
    options = SampleOptions(str(tmp_path), num_samples=3, max_completion_length=8, seed=4)
    fingerprint = pool_fingerprint(ModelOptions(tiny_model), EngineOptions(), tokenizer, PROBLEMS, options)

    class Interrupted:
        max_model_len, max_num_seqs, kv_cache_tokens = engine.max_model_len, 16, None

        def stream(self, *args, **kwargs):
            for count, item in enumerate(engine.stream(*args, **kwargs)):
                if count == 6:
                    raise KeyboardInterrupt
                yield item

        def close(self):
            pass

    with Verifier() as verifier:
        with pytest.raises(KeyboardInterrupt):
            sample_pool(Interrupted(), tokenizer, PROBLEMS, options, fingerprint, verifier)
        first = {(r["prompt_id"], r["sample_index"]): r for r in ReferencePool.open(tmp_path).samples.to_pylist()}
        assert len(first) == 6
        pool = sample_pool(engine, tokenizer, PROBLEMS, options, fingerprint, verifier)
    rows = {(r["prompt_id"], r["sample_index"]): r for r in pool.samples.to_pylist()}
    assert len(rows) == pool.num_rows == 15
    assert all(rows[key] == row for key, row in first.items())
    row = next(iter(rows.values()))
    assert row["text"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
    assert all(r["reward"] == 0.0 for r in rows.values() if r["finish_reason"] == "length")


def test_fingerprint_names_what_decides_a_sample(tokenizer, tiny_model, tmp_path):
    def fingerprint(problems=PROBLEMS, model=None, engine="vllm", own_tokenizer=tokenizer, **changes):
        options = SampleOptions(str(tmp_path), **changes)
        model = model or ModelOptions(tiny_model)
        return pool_fingerprint(model, EngineOptions(engine=engine), own_tokenizer, problems, options)

    def changed(**changes):
        other = fingerprint(**changes)
        return {key for key in base if base[key] != other[key]} - {"model_name"}  # which decides nothing

    base = fingerprint()
    assert base == fingerprint()
    assert changed(engine="ray") == set()
    assert changed(engine="transformers") == {"engine"}
    for name, value in {"num_samples": 4, "temperature": 0.7, "seed": 1, "max_completion_length": 9}.items():
        assert changed(**{name: value}) == {name}
    assert changed(require_eos=False) == {"require_eos"}
    assert changed(problems=PROBLEMS[1:]) == {"data", "num_prompts"}
    told = [Problem(({"role": "system", "content": "Be brief."}, *p.messages), p.gold) for p in PROBLEMS]
    assert changed(problems=told) == {"data", "system_prompt"}
    assert changed(model=ModelOptions(tiny_model, dtype="float32")) == {"dtype"}
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    assert changed(model=ModelOptions(str(copy))) == set()
    adapter = tmp_path / "adapter"
    tiny_policy(tiny_model).save_pretrained(str(adapter))
    assert changed(model=ModelOptions(tiny_model, adapter=str(adapter))) == {"adapter"}
    (copy / "generation_config.json").write_text("{}")
    assert changed(model=ModelOptions(str(copy))) == {"model"}
    other = deepcopy(tokenizer)
    other("a longer text", padding="max_length", max_length=50)
    assert changed(own_tokenizer=other) == set()
    other.add_tokens(["<new>"])
    assert changed(own_tokenizer=other) == {"tokenizer"}
    other = deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert changed(own_tokenizer=other) == {"chat_template"}
