"""The engine that the trainer starts: which one, the policy's way to it, and one copy of the weights or two."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MAX_MODEL_LEN
from helpers import completion_logps, move, tiny_policy

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines import shared_weights, start, vllm_engine
from astarpo.rollout.engines.interface import Engine, OwnModelLink, generate
from astarpo.rollout.engines.policy_link import AdapterLink, CopiedLink, InlineLink, choose_link
from astarpo.rollout.engines.start import start_training_engine

PROMPTS = [[1, 20, 21, 22], [1, 30, 31]]


@pytest.fixture
def started(tiny_model, tokenizer):
    """Starts engines for a policy, and closes them."""
    opened = []

    def begin(policy, *, length=64, is_sharded=False, is_wrapped=False, **options) -> Any:
        sizes: Any = {"kv_cache_gb": 0.05, "max_num_seqs": 8} | options
        found = start_training_engine(
            policy,
            tiny_model,
            None,
            EngineOptions(**sizes),
            length,
            tokenizer,
            is_sharded,
            is_wrapped,
            torch.device("cpu"),
        )
        opened.append(found)
        return found

    yield begin
    for engine, link in opened:
        link.close()
        engine.close()


def assert_samples(engine: Engine, link, policy) -> None:
    move(policy, scale=0.02)
    policy.eval()
    completions = generate(engine, PROMPTS, [1, 2], SamplingSettings(8), link)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = completion_logps(policy, prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "lora", "kind"),
    [
        ({}, True, InlineLink),
        ({}, False, CopiedLink),
        ({"policy_link": "adapter"}, True, AdapterLink),
        ({"share_base_weights": "on"}, True, InlineLink),
        ({"engine": "transformers"}, True, OwnModelLink),
        ({"engine": "transformers"}, False, OwnModelLink),
    ],
    ids=["inline", "copied", "adapter", "shared", "own-lora", "own-full"],
)
def test_options_choose_engine_and_way(started, tiny_model, options, lora, kind):
    policy = tiny_policy(tiny_model, lora=lora)
    engine, link = started(policy, **options)
    assert type(link) is kind
    assert (engine.max_model_len, engine.max_num_seqs) == (64, 8)
    if options.get("engine") == "transformers":
        assert engine.model is policy and engine.kv_cache_tokens is None
    else:
        assert engine.kv_cache_tokens > 64
        assert (engine.shared is not None) == (options.get("share_base_weights") == "on")
    assert_samples(engine, link, policy)


def test_sharded_weights_take_the_adapter_way_and_say_so(started, tiny_model, caplog):
    with caplog.at_level(logging.WARNING, "astarpo"):
        _, link = started(tiny_policy(tiny_model), is_sharded=True, is_wrapped=True)
    assert isinstance(link, AdapterLink)
    assert "policy_link=adapter: FSDP or ZeRO-3" in caplog.text


def test_what_cannot_be_started_says_why(started, tiny_model):
    policy = tiny_policy(tiny_model)
    with pytest.raises(ValueError, match="Ray makes reference samples"):
        started(policy, engine="ray")
    with pytest.raises(ValueError, match=r"divides among processes. Set --engine vllm"):
        started(policy, engine="transformers", is_sharded=True)
    with pytest.raises(ValueError, match=r"max_model_len=32 is too short.*--max_model_len 64"):
        started(policy, max_model_len=32)
    with pytest.raises(ValueError, match="needs --server_url"):
        started(policy, engine="server")
    with pytest.raises(ValueError, match="share_base_weights=on is not possible: all weights are trained"):
        started(tiny_policy(tiny_model, lora=False), share_base_weights="on")
    with pytest.raises(ValueError, match="share_base_weights=on is not possible: FSDP or DeepSpeed owns them"):
        started(policy, share_base_weights="on", is_wrapped=True)
    engine, _ = started(policy, engine="transformers", max_model_len=MAX_MODEL_LEN)
    assert engine.max_model_len == MAX_MODEL_LEN


def test_auto_goes_on_with_two_copies(started, tiny_model, monkeypatch, caplog):
    def no_place(*_):
        raise shared_weights.SharingError("The engine has no weight for `x`.")

    monkeypatch.setattr(start, "sharing_is_wanted", lambda options: options.share_base_weights != "off")
    monkeypatch.setattr(shared_weights, "_find_places", no_place)
    policy: Any = tiny_policy(tiny_model)
    with caplog.at_level(logging.WARNING, "astarpo"):
        engine, link = started(policy, share_base_weights="auto")
    assert engine.shared is None
    assert "no weight for `x`. Engine and trainer hold a copy each" in caplog.text
    assert_samples(engine, link, policy)
    with pytest.raises(ValueError, match="no weight for `x`"):
        started(policy, share_base_weights="on")


def test_the_way_of_a_policy(tiny_model):
    policy, full = tiny_policy(tiny_model), tiny_policy(tiny_model, lora=False)
    assert choose_link(policy, "auto", False) == "inline"
    assert choose_link(policy, "auto", True) == "adapter"
    assert choose_link(policy, "inline", True) == "adapter"
    assert choose_link(policy, "adapter", False) == "adapter"
    assert choose_link(full, "auto", True) == "copied"


def test_hardware_says_what_it_chose_once(caplog):
    from astarpo.rollout.hardware import Hardware, log_choices

    hardware = Hardware("Test GPU", (7, 5), "float16", reasons=("float16 weights: for a test",))
    with caplog.at_level(logging.WARNING, "astarpo"):
        log_choices(hardware)
        log_choices(hardware)
    assert caplog.text.count("Test GPU: float16 weights: for a test") == 1


def test_layers_are_found_where_vllm_fuses_them():
    modules = {"l.0.attn.qkv_proj": SimpleNamespace(), "l.0.attn.o_proj": SimpleNamespace(), "head": SimpleNamespace()}
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "o_proj": ["o_proj"]}
    find = shared_weights.find_layer
    k = find("l.0.attn.k_proj", modules, packed)
    assert (k.name, k.part, k.parts) == ("l.0.attn.qkv_proj", 1, 3) and k.module is modules[k.name]
    o = find("l.0.attn.o_proj", modules, packed)
    assert (o.name, o.part, o.parts) == ("l.0.attn.o_proj", 0, 1) and o.module is modules[o.name]
    assert find("head", modules, packed).module is modules["head"]
    assert find("l.0.mlp.up_proj", modules, packed).module is None


def test_a_missing_libnuma_is_named(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(ValueError, match=r"needs the library libnuma.*apt install libnuma1"):
        vllm_engine._llm_class()
