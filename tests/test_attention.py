"""Attention on cards below compute capability 8.0: no grouped heads reach PyTorch's kernel, and the log-probs stay."""

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from astarpo.trainer import attention


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes: Any = dict(
        attn_implementation="sdpa",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(Qwen2Config(**sizes, vocab_size=64)).eval()


@pytest.fixture
def grouped(monkeypatch):
    """Whether each call of PyTorch's attention got grouped heads."""
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noting(query, key, *args, **kwargs):
        calls.append(query.shape[1] != key.shape[1] or bool(kwargs.get("enable_gqa")))
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    return calls


def on(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_a_t4_repeats_keys_and_values(model, grouped, monkeypatch):
    ids = torch.arange(1, 13)[None]
    expected = model(input_ids=ids).logits
    assert grouped and all(grouped)  # what falls to the math kernel on a T4
    grouped.clear()
    on(monkeypatch, (7, 5))
    attention.suit_attention(model, None)
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    assert grouped and not any(grouped)
    padded = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = model(input_ids=padded, attention_mask=mask).logits[0, 2:]
    torch.testing.assert_close(found, model(input_ids=padded[:1, 2:]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("capability", "asked"), [((8, 0), None), ((7, 5), "eager"), ((7, 5), "sdpa")])
def test_others_keep_what_they_have(model, monkeypatch, capability, asked):
    on(monkeypatch, capability)
    attention.suit_attention(model, asked)
    assert model.config._attn_implementation == "sdpa"
