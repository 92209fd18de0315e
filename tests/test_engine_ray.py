"""Ray: workers live as long as the engine, are replaced when they die, and end with it."""

import os
import time
from pathlib import Path

import pytest
from pag_run import make_pool

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines.interface import Completion, EngineError, Failure, generate
from astarpo.rollout.engines.ray_engine import RayEngine

pytestmark = pytest.mark.slow
SETTINGS = SamplingSettings(12)
COUNT = 12


@pytest.fixture(scope="module")
def ray_engine(tiny_model):
    options = EngineOptions(kv_cache_gb=0.05, max_num_seqs=2, ray_workers=2)
    engine = RayEngine(tiny_model, 128, options, dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(f"{'question ' * (i % 3)}{i}")["input_ids"] for i in range(COUNT)]


def pids(engine: RayEngine) -> list[int]:
    import ray

    return ray.get([worker.__ray_call__.remote(lambda _: os.getpid()) for worker in engine._workers])


def loaded(engine: RayEngine) -> list[int]:
    """Which vLLM engine each worker has, by its address."""
    import ray

    return ray.get([worker.__ray_call__.remote(lambda worker: id(worker._engine)) for worker in engine._workers])


def test_streams_use_the_same_workers_as_turns_of_episodes_do(ray_engine, engine, prompts):
    before = pids(ray_engine)
    assert len(set(before)) == 2
    engines = loaded(ray_engine)
    assert ray_engine.max_num_seqs == 4 and ray_engine.kv_cache_tokens is None
    contexts = prompts
    for turn in range(3):
        seeds = range(turn, turn + COUNT)
        completions = generate(ray_engine, contexts, seeds, SETTINGS)
        expected = generate(engine, contexts, seeds, SETTINGS)
        assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
        contexts = [[*context, *c.token_ids, 5] for context, c in zip(contexts, completions, strict=True)]
    assert pids(ray_engine) == before
    assert loaded(ray_engine) == engines, "no model is loaded anew"


def test_completions_arrive_block_by_block_and_an_abandoned_stream_leaves_the_workers_usable(ray_engine, prompts):
    many = prompts * 8  # 96 prompts in blocks of 8
    stream = ray_engine.stream(many, range(len(many)), SETTINGS)
    first = [next(stream)[0] for _ in range(8)]
    assert len({index // 8 for index in first}) == 1
    stream.close()
    before = pids(ray_engine)
    assert len(generate(ray_engine, prompts, range(COUNT), SETTINGS)) == COUNT
    assert pids(ray_engine) == before
    assert list(ray_engine.stream([], [], SETTINGS)) == []


def test_a_worker_that_dies_is_replaced_and_its_block_sampled_again(ray_engine, prompts):
    expected = generate(ray_engine, prompts, range(COUNT), SETTINGS)
    before = pids(ray_engine)
    os.kill(before[0], 9)
    completions = generate(ray_engine, prompts, range(COUNT), SETTINGS)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    after = pids(ray_engine)
    assert after[0] != before[0] and after[1] == before[1]


def test_failures_stay_in_their_block_and_what_is_refused_names_its_prompts(ray_engine, prompts):
    broken = [*prompts]
    broken[5] = [99_999]
    finished = dict(ray_engine.stream(broken, range(COUNT), SETTINGS))
    assert {i for i, c in finished.items() if isinstance(c, Failure)} == {5}
    assert sum(isinstance(c, Completion) for c in finished.values()) == COUNT - 1
    broken[5] = [7] * 128  # longer than the context
    with pytest.raises(EngineError, match="do not fit") as error:
        list(ray_engine.stream(broken, range(COUNT), SETTINGS))
    assert 5 in error.value.in_flight and len(error.value.in_flight) < COUNT


def test_closing_ends_the_workers_and_what_cannot_start_says_why(tiny_model, ray_engine, tmp_path):
    import psutil

    options = EngineOptions(kv_cache_gb=0.05, max_num_seqs=2, ray_workers=1)
    with pytest.raises(ValueError, match=r"--ray_workers 99, but Ray has \d+ CPUs"):
        RayEngine(tiny_model, 128, EngineOptions(ray_workers=99))
    workers = pids(ray_engine)
    ray_engine.close()
    with pytest.raises(ValueError, match=r"A Ray worker could not start its engine(.|\n)*adapter_config\.json"):
        RayEngine(tiny_model, 128, options, dtype="float32", adapter=str(tmp_path))
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").is_dir() for pid in workers)


@pytest.mark.pag
def test_ray_samples_pag_episodes_as_the_engine_in_process_does(guesser, guessing_engine, tmp_path):
    """The rows of two pools are equal, verifications and revisions among them, and an answer is graded once."""
    options = EngineOptions(kv_cache_gb=0.05, max_num_seqs=4, ray_workers=1)
    engine = RayEngine(guesser, 256, options, dtype="float32")
    try:
        pools = [
            make_pool(tmp_path / name, guesser, one) for name, one in (("here", guessing_engine), ("ray", engine))
        ]
    finally:
        engine.close()
    here, ray = (
        sorted(pool.samples.to_pylist(), key=lambda row: (row["prompt_id"], row["sample_index"])) for pool in pools
    )
    assert here == ray
    assert {row["role"] for row in ray if row["num_tokens"]} == {"attempt", "verify", "revise"}
