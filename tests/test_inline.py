"""The adapter in the engine's own layers: static buffers, made before the engine warms up, that a policy is copied into."""

import pytest
import torch
from conftest import make_engine
from helpers import completion_logps, move, tiny_policy
from vllm.v1.worker.cpu_worker import CPUWorker

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines.inline import InlineLayers, InlineLink, LiveLora, shapes_of
from astarpo.rollout.engines.interface import generate

PROMPTS = [[1, 20, 21, 22], [1, 30, 31]]
SETTINGS = SamplingSettings(8)


@pytest.fixture(scope="module")
def policy(tiny_model):
    policy = tiny_policy(tiny_model)
    move(policy, scale=0.02)
    return policy


@pytest.fixture(scope="module")
def captured(tiny_model, policy):
    """An engine whose layers always add the adapter, as CUDA graphs would replay them, and what it saw when it warmed up."""
    layers = InlineLayers(shapes_of(LiveLora(policy).layers()), is_captured=True)
    seen = []
    warm_up = CPUWorker.compile_or_warm_up_model

    def noting(worker, *args, **kwargs):
        seen.append(addresses(layers))
        return warm_up(worker, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUWorker, "compile_or_warm_up_model", noting)
        engine = make_engine(tiny_model, inline=layers)
    return engine, layers, seen


def addresses(layers):
    return {name: (a.data_ptr(), b.data_ptr()) for name, (a, b) in layers.buffers.items()}


def test_the_buffers_are_there_before_the_engine_warms_up(captured):
    _, layers, seen = captured
    assert layers.is_attached and len(layers.buffers) > 0
    assert seen[0] == addresses(layers)


def test_a_zero_adapter_is_the_reference_bit_for_bit(captured, engine):
    own, _, _ = captured
    with_adapter = generate(own, PROMPTS, [1, 2], SETTINGS)
    without = generate(engine, PROMPTS, [1, 2], SETTINGS)
    assert [(c.token_ids, c.logprobs) for c in with_adapter] == [(c.token_ids, c.logprobs) for c in without]


def test_a_refresh_changes_the_next_step_and_allocates_nothing(captured, policy):
    engine, layers, _ = captured
    link, before = InlineLink(engine, LiveLora(policy)), addresses(captured[1])
    assert not link._is_own
    reference = generate(engine, PROMPTS, [1, 2], SETTINGS)
    for update in range(3):
        move(policy, scale=0.02, seed=update)
        for prompt, completion in zip(PROMPTS, generate(engine, PROMPTS, [1, 2], SETTINGS, link), strict=True):
            expected = completion_logps(policy, prompt, completion)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-3)
    again = generate(engine, PROMPTS, [1, 2], SETTINGS)
    assert [(c.token_ids, c.logprobs) for c in again] == [(c.token_ids, c.logprobs) for c in reference]
    assert addresses(layers) == before
    link.close()
    assert layers.is_attached  # they belong to the engine


def test_an_adapter_of_other_ranks_brings_its_own_buffers_or_is_refused(captured, tiny_model, monkeypatch):
    from peft import LoraConfig, get_peft_model

    engine, _, _ = captured
    other = get_peft_model(
        tiny_policy(tiny_model, lora=False), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    link = InlineLink(engine, LiveLora(other))
    assert link._is_own
    link.close()
    monkeypatch.setattr(engine, "has_graphs", True)
    with pytest.raises(ValueError, match=r"--cuda_graphs off"):
        InlineLink(engine, LiveLora(other))


def test_the_arguments_of_cuda_graphs(engine, monkeypatch):
    options = EngineOptions(cuda_graphs="on", max_num_seqs=24)
    monkeypatch.setattr(engine, "has_graphs", True)
    with pytest.raises(ValueError, match="cuda_graphs=on needs a GPU"):
        engine._graphs(options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = engine._graphs(options)
    assert found["enforce_eager"] is False
    assert found["compilation_config"] == {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24],
    }


def test_an_engine_starts_without_graphs_by_default(tiny_model):
    assert EngineOptions().cuda_graphs == "off"
    assert make_engine(tiny_model).has_graphs is False
