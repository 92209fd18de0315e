"""The real vLLM engine on the tiny model, and the three ways by which the policy reaches it."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAX_MODEL_LEN, long_prompt, make_engine
from helpers import LORA, completion_logps, move, tiny_policy
from peft import LoraConfig, get_peft_model

from astarpo.rollout import FinishReason, SamplingSettings
from astarpo.rollout.engines.interface import generate
from astarpo.rollout.engines.policy_link import AdapterLink, CopiedLink, InlineLink, LiveLora, SavedLora, link_policy
from astarpo.rollout.engines.processes import starting
from astarpo.trainer.probe import PolicyProbe

SETTINGS = SamplingSettings(12)
LORA_WITH_DROPOUT: dict[str, Any] = {**LORA, "lora_dropout": 0.5}


def prompts_of(tokenizer, count=6):
    return [tokenizer(f"question {i}")["input_ids"] for i in range(count)]


def assert_same_logps(model, prompts, completions, tolerance=1e-3):
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = completion_logps(model, prompt, completion)
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=tolerance)


def test_reference_logps_equal_transformers(engine, tokenizer, tiny_model):
    prompts = prompts_of(tokenizer)
    assert_same_logps(tiny_policy(tiny_model, lora=False), prompts, generate(engine, prompts, range(6), SETTINGS))


def test_logps_are_those_of_the_sampling_temperature(engine, tokenizer, tiny_model):
    prompt = prompts_of(tokenizer, 1)[0]
    (completion,) = generate(engine, [prompt], [3], SamplingSettings(8, temperature=0.5))
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logits = tiny_policy(tiny_model, lora=False)(input_ids=ids).logits[0, len(prompt) - 1 : -1] / 0.5
    expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-3)


def test_a_sample_depends_on_its_seed_not_on_its_batch(engine, tokenizer):
    prompts = prompts_of(tokenizer)
    together = generate(engine, prompts, range(10, 16), SETTINGS)
    alone = [generate(engine, [p], [s], SETTINGS)[0] for p, s in zip(prompts, range(10, 16), strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    other = generate(engine, prompts, range(20, 26), SETTINGS)
    assert [c.token_ids for c in together] != [c.token_ids for c in other]


def test_finish_reason_and_end_of_sequence(engine, tokenizer):
    prompts = prompts_of(tokenizer, 1) * 60
    completions = generate(engine, prompts, range(60), SamplingSettings(60))
    stopped = [c for c in completions if c.finish_reason is FinishReason.STOP]
    assert stopped
    assert all(c.token_ids[-1] == tokenizer.eos_token_id and len(c.token_ids) == len(c.logprobs) for c in stopped)
    cut = [c for c in completions if c.finish_reason is FinishReason.LENGTH]
    assert all(len(c.token_ids) == 60 and tokenizer.eos_token_id not in c.token_ids for c in cut)


def test_an_abandoned_stream_leaves_the_engine_usable(engine, tokenizer):
    prompts = prompts_of(tokenizer)
    stream = engine.stream(prompts, range(6), SETTINGS)
    next(stream)
    with pytest.raises(RuntimeError, match="already sampling"):
        next(engine.stream(prompts, range(6), SETTINGS))
    stream.close()
    assert len(generate(engine, prompts, range(6), SETTINGS)) == 6


def test_closing_an_engine_leaves_the_others_alone(engine, tokenizer, tiny_model):
    other = make_engine(tiny_model)
    prompts = prompts_of(tokenizer)
    expected = generate(other, prompts, range(6), SETTINGS)
    other.close()
    assert [c.token_ids for c in generate(engine, prompts, range(6), SETTINGS)] == [c.token_ids for c in expected]


def test_a_prompt_that_does_not_fit_is_refused(engine, tokenizer):
    with pytest.raises(ValueError, match=r"do not fit.*--max_model_len"):
        generate(engine, [[5] * MAX_MODEL_LEN], [0], SETTINGS)


def test_random_state_survives_code_that_reseeds():
    random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), torch.rand(1).item())
    random.seed(1)
    torch.manual_seed(1)
    with starting():
        random.seed(99)
        torch.manual_seed(99)
    assert (random.random(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("way", ["inline", "adapter"])
def test_lora_reaches_the_engine_and_the_reference_stays(way, request, tokenizer, tiny_model):
    engine = request.getfixturevalue("engine" if way == "inline" else "adapter_engine")
    policy = tiny_policy(tiny_model)
    link = link_policy(engine, policy)
    assert isinstance(link, InlineLink if way == "inline" else AdapterLink)
    prompts = prompts_of(tokenizer)
    reference = generate(engine, prompts, range(6), SETTINGS)
    completions = reference
    try:
        for update in range(3):
            move(policy, seed=update)
            completions = generate(engine, prompts, range(6), SETTINGS, link)
            assert_same_logps(policy, prompts, completions)
        assert [c.token_ids for c in completions] != [c.token_ids for c in reference]
        again = generate(engine, prompts, range(6), SETTINGS)
        assert [c.logprobs for c in again] == [c.logprobs for c in reference]
    finally:
        link.close()


@pytest.mark.parametrize("way", ["inline", "adapter"])
def test_a_replaced_adapter_reuses_no_cached_block(way, request, tokenizer, tiny_model, monkeypatch):
    """vLLM below 0.31 did not empty its prefix cache when an adapter was loaded in the place of another of the same name."""
    engine = request.getfixturevalue("engine" if way == "inline" else "adapter_engine")
    policy = tiny_policy(tiny_model)
    link = link_policy(engine, policy)
    prompts = [long_prompt(tokenizer)] * 2  # of more than two blocks
    emptied = []
    inner = engine.reset_prefix_cache
    monkeypatch.setattr(engine, "reset_prefix_cache", lambda: (emptied.append(1), inner()))
    try:
        for update in range(3):
            move(policy, scale=0.2, seed=update)
            before = len(emptied)
            assert_same_logps(policy, prompts, generate(engine, prompts, range(2), SETTINGS, link))
            assert len(emptied) > before
    finally:
        monkeypatch.undo()
        link.close()


def test_full_weights_reach_the_engine_and_the_reference_is_gone(writable_engine, tokenizer, tiny_model):
    policy = tiny_policy(tiny_model, lora=False)
    link = link_policy(writable_engine, policy)
    assert isinstance(link, CopiedLink)
    prompts = prompts_of(tokenizer)
    for update in range(3):
        move(policy, scale=0.02, seed=update)
        assert_same_logps(policy, prompts, generate(writable_engine, prompts, range(6), SETTINGS, link))
    with pytest.raises(RuntimeError, match="overwritten by the policy"):
        generate(writable_engine, prompts, range(6), SETTINGS)


def leave_behind(engine, link, way, monkeypatch):
    """Break the way so that the engine stays on the previous policy."""
    if way == "inline":  # nothing is copied: what can stay behind is the prefix cache
        monkeypatch.setattr(engine, "reset_prefix_cache", lambda: None)
    else:
        monkeypatch.setattr(link, "sync", lambda: False)


@pytest.mark.parametrize("broken", [False, True], ids=["works", "left-behind"])
@pytest.mark.parametrize("way", ["inline", "adapter", "copied"])
def test_probe_finds_an_engine_left_on_the_previous_policy(way, broken, request, tokenizer, tiny_model, monkeypatch):
    name = {"inline": "engine", "adapter": "adapter_engine", "copied": "writable_engine"}[way]
    engine = request.getfixturevalue(name)
    policy = tiny_policy(tiny_model, lora=way != "copied")
    link = link_policy(engine, policy)
    probe = PolicyProbe(policy, rows=2)
    prompt = long_prompt(tokenizer)
    prompts = [prompt] * 4

    def check(seed):
        completions = generate(engine, prompts, range(seed, seed + 4), SETTINGS, link)
        length = max(len(c.token_ids) for c in completions)
        mask = torch.tensor([[i < len(c.token_ids) for i in range(length)] for c in completions])
        sampled = torch.tensor([[*c.logprobs, *[0.0] * (length - len(c.logprobs))] for c in completions])

        def score(model, batch):
            scores = [completion_logps(model, prompt, completions[row]) for row in batch["rows"].tolist()]
            return torch.nn.utils.rnn.pad_sequence([*scores, torch.zeros(length)], batch_first=True)[:-1]

        batch = {"rows": torch.arange(4), "turn_ids": mask.long(), "sampling_logps": sampled}
        with torch.no_grad():
            return probe.check([(batch, score(policy, batch))], score)

    try:
        move(policy, scale=0.02, seed=7)
        assert check(0) is None
        move(policy, scale=0.02, seed=8)
        if broken:
            leave_behind(engine, link, way, monkeypatch)
            with pytest.raises(RuntimeError, match="samples an old policy"):
                check(10)
        else:
            assert check(10) is None  # as near as before, so the earlier policy need not be scored
            probe._floor = 0.0
            move(policy, scale=0.02, seed=9)
            finding = check(20)
            assert finding is not None and finding.gap < 1e-3 and abs(finding.score) < 0.05
    finally:
        monkeypatch.undo()
        link.close()
        engine.reset_prefix_cache()


def test_a_saved_adapter_equals_the_live_one(engine, tokenizer, tiny_model, tmp_path):
    policy = tiny_policy(tiny_model)
    move(policy)
    policy.save_pretrained(tmp_path)
    link = InlineLink(engine, SavedLora.open(str(tmp_path)))
    try:
        prompts = prompts_of(tokenizer)
        assert_same_logps(policy, prompts, generate(engine, prompts, range(6), SETTINGS, link))
    finally:
        link.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_adapters_that_no_engine_computes_are_refused(tiny_model, change, message):
    base = tiny_policy(tiny_model, lora=False)
    with pytest.raises(ValueError, match=message):
        LiveLora(get_peft_model(base, LoraConfig(**(LORA | change))))


def test_lora_dropout_is_taken_and_not_sampled_with(engine, tokenizer, tiny_model):
    base = tiny_policy(tiny_model, lora=False)
    policy = get_peft_model(base, LoraConfig(**LORA_WITH_DROPOUT))
    move(policy)
    policy.train()
    link = link_policy(engine, policy)
    try:
        prompts = prompts_of(tokenizer)
        completions = generate(engine, prompts, range(6), SETTINGS, link)
        assert_same_logps(policy.eval(), prompts, completions)
    finally:
        link.close()


def test_missing_adapters_and_wrong_engines_name_the_fix(engine, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        SavedLora.open(str(tmp_path))
    with pytest.raises(ValueError, match="policy_link=copied"):
        link_policy(engine, tiny_policy(tiny_model, lora=False))


def test_an_engine_that_nobody_closed_ends_with_the_next_safe_moment(tiny_model, engine, tokenizer):
    import gc

    from astarpo.rollout.engines import vllm_engine

    dropped = make_engine(tiny_model)
    before = len(vllm_engine._CLOSED)
    del dropped
    gc.collect()
    assert len(vllm_engine._CLOSED) == before + 1  # kept: ending it would end the process groups of the other one
    prompt = tokenizer("Hello")["input_ids"]
    assert next(iter(engine.stream([prompt], [1], SamplingSettings(4, 1.0))))[1].token_ids


def test_dropped_engines_are_ended_before_the_next_one_starts(tiny_model):
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import gc\n"
        "from conftest import make_engine\n"
        "from astarpo.rollout.engines import vllm_engine as v\n"
        "first = make_engine(sys.argv[1]); del first; gc.collect()\n"
        "assert len(v._CLOSED) == 1 and not v._ALIVE\n"
        "second = make_engine(sys.argv[1])\n"
        "assert not v._CLOSED and len(v._ALIVE) == 1\n"
        "from astarpo.rollout import SamplingSettings\n"
        "assert next(iter(second.stream([[5, 6]], [1], SamplingSettings(4, 1.0))))[1].token_ids\n"
    )
    words = [sys.executable, "-c", program, tiny_model, str(Path(__file__).parent)]
    finished = subprocess.run(words, capture_output=True, text=True, check=False, timeout=200)
    assert finished.returncode == 0, finished.stderr[-2000:]
