"""Decoding in which a finished row makes room for the next prompt: the completions are those of each prompt alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import completion_logps
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines.attention import folded_sdpa
from astarpo.rollout.engines.interface import Failure, FinishReason, generate
from astarpo.rollout.engines.slots import SlotDecoder, can_refill
from astarpo.rollout.engines.transformers_engine import TransformersEngine

SETTINGS = SamplingSettings(24)
STOPS = [2, 40, 41, 42, 43]  # many, so that completions end at different lengths


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(tiny_model, request):
    return AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=request.param
    ).eval()


def prompts_of(tokenizer, count, shared=""):
    return [tokenizer(f"{shared}{'question ' * (number % 4)}{number // 3}")["input_ids"] for number in range(count)]


def answer(model, prompts, seeds, rows, **more):
    """Completions by place, and how many rows each pass had."""
    decoder: Any = SlotDecoder(model, prompts, seeds, SETTINGS, STOPS, rows, **more)
    found, passes = {}, []
    forward = decoder._forward

    def noting(ids, *args):
        passes.append(tuple(ids.shape))
        return forward(ids, *args)

    decoder._forward = noting
    while not decoder.is_done:
        for place, completion in decoder.advance():
            assert place not in found
            found[place] = completion
    return [found[place] for place in range(len(prompts))], passes


def test_each_completion_is_that_of_its_prompt_alone(model, tokenizer):
    prompts, seeds = prompts_of(tokenizer, 21), range(50, 71)
    together, passes = answer(model, prompts, seeds, 4)
    alone = [answer(model, [prompt], [seed], 1)[0][0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({len(c.token_ids) for c in together}) > 3
    for prompt, completion in zip(prompts, together, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), completion_logps(model, prompt, completion), rtol=0, atol=1e-4
        )
    steps = sum(1 for rows, tokens in passes if tokens == 1)
    batches = [together[start : start + 4] for start in range(0, len(together), 4)]
    assert steps < sum(max(len(c.token_ids) for c in batch) for batch in batches)


def test_the_reason_of_an_end(model, tokenizer):
    completions, _ = answer(model, prompts_of(tokenizer, 12), range(12), 5)
    for completion in completions:
        stopped = completion.token_ids[-1] in STOPS
        assert (completion.finish_reason is FinishReason.STOP) == stopped
        assert stopped or len(completion.token_ids) == SETTINGS.max_completion_length
        assert not any(token in STOPS for token in completion.token_ids[:-1])


def test_what_all_prompts_begin_with_is_computed_once(model, tokenizer):
    prompts = prompts_of(tokenizer, 9, shared="The same worked example stands before every question. ")
    together, passes = answer(model, prompts, range(9), 4)
    alone = [answer(model, [prompt], [seed], 1)[0][0] for seed, prompt in enumerate(prompts)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    shared = passes[0]
    assert shared[0] == 1 and shared[1] >= 40
    assert all(tokens < 40 for _, tokens in passes[1:])


def test_a_prompt_that_several_rows_sample_is_computed_once(model, tokenizer):
    prompt = tokenizer("one question")["input_ids"]
    together, passes = answer(model, [prompt] * 6, range(6), 6)
    alone = [answer(model, [prompt], [seed], 1)[0][0] for seed in range(6)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together}) > 1
    assert [rows for rows, tokens in passes if tokens > 1] in ([], [1])


def test_long_prompts_are_read_in_passes_of_bounded_size(model, tokenizer):
    prompts = prompts_of(tokenizer, 8)
    expected, _ = answer(model, prompts, range(8), 8)
    found, passes = answer(model, prompts, range(8), 8, max_pass_tokens=30)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert all(rows * tokens <= 30 or rows == 1 for rows, tokens in passes if tokens > 1)


def test_greedy_completions_are_those_of_generate(model, tokenizer):
    prompts = prompts_of(tokenizer, 5)
    decoder = SlotDecoder(model, prompts, range(5), SamplingSettings(8, temperature=0.0), [2], 3)
    found = {}
    while not decoder.is_done:
        found.update(decoder.advance())
    for place, prompt in enumerate(prompts):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert list(found[place].token_ids) == ids[0, len(prompt) :].tolist()


def test_the_engine_refills_and_isolates_what_fails(model, tokenizer, monkeypatch):
    engine = TransformersEngine(model, 512, options=EngineOptions(max_num_seqs=3), stop_token_ids=STOPS)
    prompts = prompts_of(tokenizer, 10)
    expected = generate(engine, prompts, range(10), SETTINGS)
    forward = SlotDecoder._forward

    def failing(self, ids, rows, columns):
        if 7 in {self._seeds[place] for place in self.in_flight}:
            raise RuntimeError("the prompt of seed 7 breaks the model")
        return forward(self, ids, rows, columns)

    monkeypatch.setattr(SlotDecoder, "_forward", failing)
    found: Any = dict(engine.stream(prompts, range(10), SETTINGS))
    assert isinstance(found[7], Failure)
    others = [place for place in range(10) if place != 7]
    assert [found[place].token_ids for place in others] == [expected[place].token_ids for place in others]


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (3, 1)])
def test_a_folded_step_is_attention_with_repeated_heads(heads, key_heads, monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(5, heads, 1, 8), torch.randn(5, key_heads, 11, 8)
    value, mask = torch.randn_like(key), torch.arange(11) <= torch.tensor([0, 3, 5, 9, 10])[:, None, None, None]
    layer: Any = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)  # a copy of the cache
    found, _ = folded_sdpa(layer, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_the_models_own_attention_comes_back(model, tokenizer, monkeypatch):
    before = model.config._attn_implementation
    answer(model, prompts_of(tokenizer, 2), range(2), 2)
    assert model.config._attn_implementation == before
    monkeypatch.setattr(model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(model, prompts_of(tokenizer, 2), range(2), 2)
    assert model.config._attn_implementation == before


def test_models_with_another_cache_are_sampled_by_generate():
    sizes: Any = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    windowed = MistralForCausalLM(MistralConfig(**sizes, vocab_size=64, sliding_window=8)).eval()
    assert not can_refill(windowed.config)
    engine = TransformersEngine(windowed, 64, options=EngineOptions(max_num_seqs=2), stop_token_ids=[2])
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    for prompt, completion in zip(prompts, generate(engine, prompts, range(3), SamplingSettings(12)), strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logprobs), completion_logps(windowed, prompt, completion), rtol=0, atol=1e-4
        )
