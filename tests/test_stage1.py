"""Stage 1 when things go wrong: failing prompts, a broken engine, a full disk."""

import json
import subprocess

import pytest
from commands import SMALL, run
from conftest import build_model, build_tokenizer
from helpers import move, tiny_policy
from transformers import AutoTokenizer

from astarpo.rollout import EngineOptions, ReferencePool, sample_pool
from astarpo.rollout.data import Problem
from astarpo.rollout.engines.interface import EngineError, Failure
from astarpo.rollout.fingerprint import pool_fingerprint
from astarpo.rollout.options import ModelOptions, SampleOptions
from astarpo.rollout.pool import check_pool
from astarpo.verifier import Verifier

PROBLEMS = [Problem(({"role": "user", "content": f"{i}+1?"},), str(i + 1)) for i in range(6)]


class Flaky:
    """The real engine, but it cannot sample prompts with `bad` in them; with `deadly` it breaks down."""

    def __init__(self, engine, tokenizer, bad="", deadly=""):
        self.engine, self.tokenizer, self.bad, self.deadly = engine, tokenizer, bad, deadly
        self.max_model_len, self.max_num_seqs, self.kv_cache_tokens = engine.max_model_len, 16, None
        self.asked = []

    def stream(self, prompts, seeds, settings, policy=None):
        self.asked.append([self.tokenizer.decode(prompt) for prompt in prompts])
        broken = [i for i, text in enumerate(self.asked[-1]) if self.deadly and self.deadly in text]
        failed = [i for i, text in enumerate(self.asked[-1]) if self.bad and self.bad in text]
        yield from ((index, Failure("cannot")) for index in failed)
        good = [i for i in range(len(prompts)) if i not in failed and i < min(broken, default=len(prompts))]
        for place, completion in self.engine.stream([prompts[i] for i in good], [seeds[i] for i in good], settings):
            yield good[place], completion
        if broken:
            raise EngineError("burnt", tuple(range(broken[0], len(prompts))))

    def close(self):
        pass


def sampled(engine, tokenizer, model, folder, num_samples=2):
    options = SampleOptions(str(folder), num_samples=num_samples, max_completion_length=8)
    fingerprint = pool_fingerprint(ModelOptions(model), EngineOptions(), tokenizer, PROBLEMS, options)
    with Verifier() as verifier:
        return sample_pool(engine, tokenizer, PROBLEMS, options, fingerprint, verifier)


def test_a_failing_prompt_is_recorded_and_tried_again_and_the_rest_goes_on(engine, tokenizer, tiny_model, tmp_path):
    pool = sampled(Flaky(engine, tokenizer, bad="3+1"), tokenizer, tiny_model, tmp_path)
    assert (pool.num_rows, pool.is_complete, pool.manifest.is_settled) == (10, False, True)
    assert [(f.prompt_id, f.sample_index, f.reason, f.attempts) for f in pool.manifest.failures] == [
        (PROBLEMS[3].prompt_id, index, "cannot", 1) for index in range(2)
    ]
    assert pool.rewards()[PROBLEMS[3].prompt_id] == [None, None]
    assert pool.values(0.5)[PROBLEMS[3].prompt_id] != pool.values(0.5)[PROBLEMS[3].prompt_id]
    assert len(pool.to_dataset()) == 6
    assert pool.summary()["failed"] == 2
    assert check_pool(tmp_path) == []
    again = sampled(Flaky(engine, tokenizer, bad="3+1"), tokenizer, tiny_model, tmp_path)
    assert {f.attempts for f in again.manifest.failures} == {2}
    whole = sampled(engine, tokenizer, tiny_model, tmp_path)
    assert (whole.num_rows, whole.is_complete, whole.manifest.failures) == (12, True, ())
    untroubled = sampled(engine, tokenizer, tiny_model, tmp_path / "other")
    keys = ["prompt_id", "sample_index"]
    assert whole.samples.sort_by([(k, "ascending") for k in keys]).to_pylist() == (
        untroubled.samples.sort_by([(k, "ascending") for k in keys]).to_pylist()
    )


def test_what_broke_the_engine_waits_until_all_else_is_done(engine, tokenizer, tiny_model, tmp_path):
    with pytest.raises(EngineError, match="burnt"):
        sampled(Flaky(engine, tokenizer, deadly="1+1"), tokenizer, tiny_model, tmp_path)
    assert {f.prompt_id for f in ReferencePool.open(tmp_path).manifest.failures} == {p.prompt_id for p in PROBLEMS[1:]}
    flaky = Flaky(engine, tokenizer, deadly="1+1")
    for _ in range(2):
        with pytest.raises(EngineError, match="burnt"):
            sampled(flaky, tokenizer, tiny_model, tmp_path)
    pool = ReferencePool.open(tmp_path)
    assert {f.prompt_id for f in pool.manifest.failures} == {PROBLEMS[1].prompt_id}
    assert pool.num_rows == 10
    assert all(len(set(texts)) == 1 for texts in flaky.asked), "suspects are tried one prompt at a time"


@pytest.mark.slow
def test_a_real_engine_that_fails_in_the_forward_pass(tmp_path):
    """A token that the embedding does not have passes vLLM's checks and fails in the model."""
    model = tmp_path / "model"
    build_tokenizer(model)
    build_model(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(model)
    rows = [{"question": f"{i}+1?" + "<extra150>" * (i == 2), "answer": str(i + 1)} for i in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", model, "--dataset_name", "d.jsonl", "--num_samples", 2, *SMALL]
    finished = run("rollout", *words, "--output_dir", "pool", cwd=tmp_path)
    assert "2 samples of 1 prompts failed" in finished.stderr
    assert "IndexError" in finished.stderr
    pool = ReferencePool.open(tmp_path / "pool")
    assert (pool.num_rows, len(pool.manifest.failures)) == (10, 2)
    again = run("rollout", *words, "--output_dir", "pool", cwd=tmp_path)
    assert "10 samples are there already, 2 to make" in again.stdout


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 60 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", folder], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_job_cleanly_and_loses_nothing(small_disk, tiny_model, tmp_path):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", tiny_model, "--dataset_name", tmp_path / "d.jsonl", "--num_samples", 4, *SMALL]
    words += ["--shard_rows", 16, "--output_dir", small_disk / "pool"]
    stopped = run("rollout", *words, cwd=tmp_path, check=False)
    assert stopped.returncode == 1, stopped.stderr[-2000:]
    assert "no space left on the disk" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    pool = ReferencePool.open(small_disk / "pool")
    assert 0 < pool.num_rows < 240
    assert check_pool(small_disk / "pool") == []
    committed = {(r["prompt_id"], r["sample_index"]): r for r in pool.samples.to_pylist()}
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    run("rollout", *words, cwd=tmp_path)
    rows = {
        (r["prompt_id"], r["sample_index"]): r for r in ReferencePool.open(small_disk / "pool").samples.to_pylist()
    }
    assert len(rows) == 240
    assert all(rows[key] == row for key, row in committed.items())


@pytest.mark.slow
def test_ray_and_one_process_give_the_same_pool(tiny_model, tmp_path):
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(10)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--num_samples", 4, *SMALL]
    pools = {}
    for name, more in {"vllm": [], "ray": ["--engine", "ray", "--ray_workers", 2]}.items():
        for temperature in (0.0, 1.0):
            folder = f"{name}-{temperature}"
            run("rollout", *words, *more, "--temperature", temperature, "--output_dir", folder, cwd=tmp_path)
            table = ReferencePool.open(tmp_path / folder).samples.to_pylist()
            pools[name, temperature] = {(r["prompt_id"], r["sample_index"]): r for r in table}
    for temperature in (0.0, 1.0):
        one, many = pools["vllm", temperature], pools["ray", temperature]
        assert len(one) == 40
        assert {key: row["seed"] for key, row in one.items()} == {key: row["seed"] for key, row in many.items()}
    one, many = pools["vllm", 0.0], pools["ray", 0.0]
    assert {key: row["text"] for key, row in one.items()} == {key: row["text"] for key, row in many.items()}
    again = run("rollout", *words, "--output_dir", "ray-1.0", cwd=tmp_path)
    assert "complete already" in again.stdout, "a pool begun with Ray can be continued without"


@pytest.mark.slow
def test_the_same_job_samples_a_trained_adapter(tiny_model, tmp_path):
    policy = tiny_policy(tiny_model)
    move(policy)
    policy.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": "1"}) + "\n" for i in range(4))
    )
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--num_samples", 2, *SMALL]
    words += ["--temperature", 0, "--dtype", "float32"]
    texts = {}
    for name, more in {
        "reference": [],
        "vllm": ["--adapter", "adapter"],
        "transformers": ["--adapter", "adapter", "--engine", "transformers"],
    }.items():
        run("rollout", *words, *more, "--output_dir", name, cwd=tmp_path)
        table = ReferencePool.open(tmp_path / name).samples.to_pylist()
        texts[name] = {(r["prompt_id"], r["sample_index"]): r["text"] for r in table}
    assert texts["vllm"] == texts["transformers"] != texts["reference"]
    changed = run("rollout", *words, "--output_dir", "vllm", cwd=tmp_path, check=False)
    assert changed.returncode == 2
    assert "adapter: 'local " in changed.stderr
