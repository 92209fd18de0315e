"""The same contract for every engine: vLLM in process, transformers, a real vLLM server, and Ray with two workers."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

import pytest
from conftest import build_model, build_tokenizer
from helpers import LORA, completion_logps, move, tiny_policy, toy_rows
from peft import LoraConfig
from train_run import parity
from transformers import AutoTokenizer

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines.interface import (
    MOST_FAILURES,
    Completion,
    EngineError,
    Failure,
    FinishReason,
    generate,
    isolate_failures,
)
from astarpo.rollout.engines.policy_link import link_policy
from astarpo.rollout.engines.server_engine import ServerEngine
from astarpo.rollout.engines.start import start_engine
from astarpo.rollout.options import ModelOptions
from astarpo.trainer import AStarPOConfig, AStarPOTrainer

ENGINES = ["vllm", "transformers", *(pytest.param(name, marks=pytest.mark.slow) for name in ("server", "ray"))]
GREEDY = SamplingSettings(16, temperature=0.0)
COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model whose tokenizer knows 139 tokens more than its embedding: they pass every check and fail in the forward."""
    folder = tmp_path_factory.mktemp("leaky-qwen2")
    build_tokenizer(folder)
    build_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter")
    policy = tiny_policy(model)
    move(policy)
    policy.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(f"{'question ' * (i % 3)}{i}")["input_ids"] for i in range(COUNT)]


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The address of a real vLLM server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"),
        *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"),
        *("--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8"),
    ]
    env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words, env=env, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 180
    while not answers(f"{url}/health"):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def started(kind, model, adapter, prompts, request):
    options = EngineOptions(engine=kind, kv_cache_gb=0.05, max_num_seqs=8, ray_workers=2)
    if kind == "server":
        options.server_url = request.getfixturevalue("server")
    return start_engine(ModelOptions(model, dtype="float32", adapter=adapter), options, prompts, 16)


@pytest.fixture(scope="module")
def expected(model, adapter, prompts, request):
    """What transformers says, greedily: without and with the adapter."""
    engine, policy = started("transformers", model, adapter, prompts, request)
    return generate(engine, prompts, range(COUNT), GREEDY), generate(engine, prompts, range(COUNT), GREEDY, policy)


@pytest.fixture(scope="module", params=ENGINES)
def running(request, model, adapter, prompts):
    engine, policy = started(request.param, model, adapter, prompts, request)
    yield request.param, engine, policy
    policy.close()
    engine.close()


def assert_same(completions, others):
    for completion, other in zip(completions, others, strict=True):
        assert completion.token_ids == other.token_ids
        assert completion.finish_reason is other.finish_reason
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_greedy_completions_are_those_of_transformers(running, prompts, expected):
    _, engine, policy = running
    plain, adapted = expected
    assert_same(generate(engine, prompts, range(COUNT), GREEDY), plain)
    assert_same(generate(engine, prompts, range(COUNT), GREEDY, policy), adapted)
    assert [c.token_ids for c in plain] != [c.token_ids for c in adapted]


def test_a_sample_depends_on_its_seed_not_on_its_place(running, prompts):
    _, engine, _ = running
    settings = SamplingSettings(16, temperature=0.8, logprobs=False)
    forward = generate(engine, prompts, range(COUNT), settings)
    backward = generate(engine, prompts[::-1], range(COUNT)[::-1], settings)[::-1]
    assert [c.token_ids for c in forward] == [c.token_ids for c in backward]
    assert [c.token_ids for c in forward] != [c.token_ids for c in generate(engine, prompts, [7] * COUNT, settings)]
    assert all(c.logprobs == () for c in forward)


def test_a_failing_prompt_costs_none_of_the_others(running, prompts, expected):
    kind, engine, _ = running
    broken = [*prompts]
    broken[3], broken[9] = [], [99_999]
    if kind != "server":  # a server that fails in the forward is gone: see below
        broken[7] = [*prompts[7], 400]
    finished = dict(engine.stream(broken, range(COUNT), GREEDY))
    failed = {index for index, completion in finished.items() if isinstance(completion, Failure)}
    assert failed == {3, 7, 9} - ({7} if kind == "server" else set())
    whole = [index for index in range(COUNT) if index not in failed]
    assert_same([finished[index] for index in whole], [expected[0][index] for index in whole])
    assert_same(generate(engine, prompts, range(COUNT), GREEDY), expected[0])
    with pytest.raises(EngineError, match="could not sample prompt"):
        generate(engine, broken, range(COUNT), GREEDY)


def test_transformers_samples_the_scored_distribution(model, prompts):
    engine, _ = start_engine(ModelOptions(model, dtype="float32"), EngineOptions(engine="transformers"), prompts, 60)
    draws = 4000
    completions = generate(engine, [prompts[0]] * draws, range(draws), SamplingSettings(1, temperature=0.7))
    counts: dict[int, int] = {}
    for completion in completions:
        counts[completion.token_ids[0]] = counts.get(completion.token_ids[0], 0) + 1
    probability = {c.token_ids[0]: pow(2.718281828, c.logprobs[0]) for c in completions}
    for token, count in counts.items():
        spread = (draws * probability[token] * (1 - probability[token])) ** 0.5
        assert abs(count - draws * probability[token]) < 5 * spread + 1
    ended = generate(engine, [prompts[1]] * 60, range(60), SamplingSettings(60))
    assert {c.finish_reason for c in ended} == {FinishReason.STOP, FinishReason.LENGTH}
    assert all((c.token_ids[-1] == 2) == (c.finish_reason is FinishReason.STOP) for c in ended)
    assert all(2 not in c.token_ids[:-1] and len(c.token_ids) == len(c.logprobs) for c in ended)


@pytest.mark.slow
def test_a_server_takes_every_version_of_the_policy(server, model, prompts, tmp_path):
    engine = ServerEngine(model, EngineOptions(server_url=server, max_num_seqs=8))
    policy = tiny_policy(model)
    link = link_policy(engine, policy, str(tmp_path))
    try:
        for version in range(3):
            move(policy, seed=version)
            completions = generate(engine, prompts, range(COUNT), GREEDY, link)
            for prompt, completion in zip(prompts, completions, strict=True):
                expected = completion_logps(policy, prompt, completion).tolist()
                assert completion.logprobs == pytest.approx(expected, abs=1e-3)
            assert len(list(tmp_path.glob("astarpo-*/v*"))) == 1
    finally:
        link.close()
        engine.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trainer_samples_its_policy_from_a_server(server, model, tmp_path):
    settings: dict[str, Any] = dict(
        per_device_train_batch_size=4, max_steps=3, num_value_samples=4, max_completion_length=8
    )
    settings |= dict(report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False, logging_steps=1)
    settings |= dict(model_init_kwargs={"dtype": "float32"}, require_eos=False, learning_rate=1e-2)
    trainer = AStarPOTrainer(
        model,
        parity,
        AStarPOConfig(str(tmp_path), **settings),
        toy_rows(),
        peft_config=LoraConfig(**LORA),
        engine_options=EngineOptions(engine="server", server_url=server, adapter_dir=str(tmp_path)),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 3
    assert all(float(entry["engine/logp_gap"]) < 1e-3 for entry in logs)
    trainer.close()
    with pytest.raises(ValueError, match="Ray makes reference samples"):
        AStarPOTrainer(model, parity, AStarPOConfig(str(tmp_path)), toy_rows(), engine_options=EngineOptions("ray"))


@pytest.mark.slow
def test_servers_that_cannot_help_name_the_fix(server, model, tiny_model, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"needs --server_url"):
        ServerEngine(model, EngineOptions())
    with pytest.raises(ValueError, match=r"No vLLM server answers.*vllm serve"):
        ServerEngine(model, EngineOptions(server_url="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match=r"serves .*, not "):
        ServerEngine(tiny_model, EngineOptions(server_url=server))
    options = EngineOptions(engine="server", server_url=server)
    with pytest.raises(ValueError, match="--max-model-len"):
        start_engine(ModelOptions(model), options, [[1]], 4096)
    engine = ServerEngine(model, EngineOptions(server_url=server))
    with pytest.raises(ValueError, match=r"refused the adapter.*--adapter_dir"):
        engine.load_adapter(1, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="LoRA adapters only"):
        link_policy(engine, tiny_policy(model, lora=False))


def test_a_server_that_dies_ends_the_job_and_names_what_was_in_flight(model, prompts, monkeypatch):
    """The server is a socket that drops every request: killing the real one would take it from the other tests."""
    monkeypatch.setattr("astarpo.rollout.engines.server_engine.ATTEMPTS", 1)
    engine = object.__new__(ServerEngine)
    engine._url, engine.max_num_seqs, engine._name, engine.stop_token_ids = "http://127.0.0.1:9", 4, "m", [2]
    engine._client = engine._new_client()
    assert {type(c).__name__ for _, c in engine.stream([[1]] * 40, range(40), GREEDY)} == {"_ServerFault"}
    with pytest.raises(EngineError, match="16 times in a row") as error:
        list(engine.stream([[i, 1] for i in range(40)], range(40), GREEDY))
    assert len(error.value.in_flight) == MOST_FAILURES


class Rig:
    """Counts runs; a prompt of token 0 makes it fail, and all in flight with it."""

    def __init__(self, prompts, window=4, poison=False):
        self.prompts, self.window, self.poison, self.dead, self.runs = prompts, window, poison, False, 0

    def run(self, indices):
        self.runs += 1
        waiting, flying = list(indices), []
        while waiting or flying:
            while waiting and len(flying) < self.window:
                flying.append(waiting.pop(0))
            if self.dead or any(self.prompts[i] == [0] for i in flying):
                self.dead = self.poison
                raise EngineError("boom", tuple(flying))
            yield flying.pop(0), Completion((1,), (), FinishReason.STOP)


def test_the_guilty_prompts_are_found_by_halving():
    prompts = [[i + 1] for i in range(200)]
    for guilty in (17, 60, 61, 62, 199):
        prompts[guilty] = [0]
    rig = Rig(prompts, window=64)
    finished = dict(isolate_failures(prompts, rig.run))
    assert {i for i, c in finished.items() if isinstance(c, Failure)} == {17, 60, 61, 62, 199}
    assert len(finished) == 200
    assert rig.runs < 40


def test_an_engine_that_fails_on_everything_is_given_up():
    prompts = [[i] for i in range(1000)]
    rig = Rig(prompts, poison=True)
    with pytest.raises(EngineError, match="16 times in a row") as error:
        list(isolate_failures(prompts, rig.run))
    assert 0 in error.value.in_flight
    assert rig.runs == MOST_FAILURES
