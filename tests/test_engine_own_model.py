"""transformers over the trainer's own model: the policy needs no transport, and the model is given back as it was."""

from typing import Any

import pytest
import torch
from helpers import LORA, completion_logps, move, tiny_policy
from peft import LoraConfig, get_peft_model

from astarpo.rollout import EngineOptions, FinishReason, SamplingSettings
from astarpo.rollout.engines.interface import Failure, OwnModelLink, generate
from astarpo.rollout.engines.policy_link import link_policy
from astarpo.rollout.engines.transformers_engine import TransformersEngine

SETTINGS = SamplingSettings(12)
LORA_WITH_DROPOUT: dict[str, Any] = {**LORA, "lora_dropout": 0.5}
COUNT = 6


@pytest.fixture
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer(f"{'question ' * (i % 3)}{i}")["input_ids"] for i in range(COUNT)]


def engine_over(model, **options) -> TransformersEngine:
    return TransformersEngine(model, 512, options=EngineOptions(**options), stop_token_ids=[2])


def moved_policy(model: str) -> Any:
    policy: Any = tiny_policy(model)
    move(policy)
    return policy.train()


def assert_same_logps(model, prompts, completions):
    model.eval()
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = completion_logps(model, prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


def assert_equal(completions, others):
    """Up to the rounding of matrix products, which on a CPU depends on where memory lies."""
    assert [c.token_ids for c in completions] == [c.token_ids for c in others]
    for completion, other in zip(completions, others, strict=True):
        assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_policy_and_reference_are_those_of_the_model(tiny_model, prompts):
    policy = moved_policy(tiny_model)
    engine = engine_over(policy)
    link = link_policy(engine, policy)
    assert isinstance(link, OwnModelLink) and not link.sync()
    adapted = generate(engine, prompts, range(COUNT), SETTINGS, link)
    plain = generate(engine, prompts, range(COUNT), SETTINGS)
    assert [c.token_ids for c in adapted] != [c.token_ids for c in plain]
    assert_same_logps(policy, prompts, adapted)
    with policy.disable_adapter():
        assert_same_logps(policy, prompts, plain)
    move(policy, seed=2)  # an update needs no announcement
    assert_same_logps(policy, prompts, generate(engine, prompts, range(COUNT), SETTINGS, link))


def test_a_loaded_engine_samples_the_same(tiny_model, prompts):
    loaded = TransformersEngine(tiny_model, 512, dtype="float32")
    assert loaded.stop_token_ids == [2]
    for model in (tiny_policy(tiny_model), tiny_policy(tiny_model, lora=False)):
        expected = generate(loaded, prompts, range(COUNT), SETTINGS)
        assert_equal(generate(engine_over(model), prompts, range(COUNT), SETTINGS), expected)


def test_a_sample_depends_on_its_seed_not_on_its_batch(tiny_model, prompts):
    policy = moved_policy(tiny_model)
    engine, link = engine_over(policy, max_num_seqs=4), OwnModelLink()
    together = generate(engine, prompts, range(COUNT), SETTINGS, link)
    torch.manual_seed(99)  # nor on torch's own generator
    alone = [generate(engine, [p], [s], SETTINGS, link)[0] for p, s in zip(prompts, range(COUNT), strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    other = generate(engine, prompts, range(20, 20 + COUNT), SETTINGS, link)
    assert [c.token_ids for c in together] != [c.token_ids for c in other]


def test_the_model_is_given_back_as_it_was(tiny_model, prompts):
    policy = moved_policy(tiny_model)
    policy.get_base_model().model.norm.eval()  # a part that its owner froze
    policy.get_base_model().generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1)
    config = policy.get_base_model().generation_config
    before = [(name, module.training) for name, module in policy.named_modules()]
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    engine = engine_over(policy, max_num_seqs=2)

    def is_as_before() -> bool:
        return before == [(name, module.training) for name, module in policy.named_modules()]

    for link in (None, OwnModelLink()):
        stream: Any = engine.stream(prompts, range(COUNT), SETTINGS, link)
        next(stream)
        assert is_as_before(), "between two batches the caller may do what it likes"
        assert policy.get_base_model().generation_config is config
        stream.close()
        finished = dict(engine.stream([*prompts, [], [99_999]], range(COUNT + 2), SETTINGS, link))
        assert {i for i, c in finished.items() if isinstance(c, Failure)} == {COUNT, COUNT + 1}
        assert is_as_before()
        assert trained == [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert torch.rand(1) == expected
    ids = torch.tensor([prompts[0]])
    policy(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters() if parameter.requires_grad)


def test_the_models_own_sampling_defaults_are_not_mixed_in(tiny_model, prompts):
    policy = moved_policy(tiny_model)
    expected = generate(engine_over(policy), prompts, range(COUNT), SETTINGS, OwnModelLink())
    policy.get_base_model().generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1)
    assert_equal(generate(engine_over(policy), prompts, range(COUNT), SETTINGS, OwnModelLink()), expected)


def test_dropout_is_off_and_gradient_checkpointing_keeps_the_cache(tiny_model, prompts):
    base: Any = tiny_policy(tiny_model, lora=False)
    torch.manual_seed(0)
    policy: Any = get_peft_model(base, LoraConfig(**LORA_WITH_DROPOUT))
    move(policy)
    policy.train()
    policy.gradient_checkpointing_enable()
    policy.config.use_cache = False  # as the Trainer sets it then
    lengths: list[int] = []
    base.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    completions = generate(engine_over(policy), [prompts[0]] * 2, [1, 2], SETTINGS, OwnModelLink())
    assert lengths[0] == len(prompts[0])
    assert lengths[1:] == [1] * (max(len(c.token_ids) for c in completions) - 1), "each step computes one token"
    assert_same_logps(policy, [prompts[0]] * 2, completions)


def test_a_replaced_forward_still_works(tiny_model, prompts):
    """As the trainer scores on a CPU: its `forward` is the model's own unless labels are given, and hides its arguments."""
    policy = moved_policy(tiny_model)
    expected = generate(engine_over(policy), prompts, range(COUNT), SETTINGS, OwnModelLink())
    base = policy.get_base_model()
    own, calls = base.forward, []

    def forward(*args, **kwargs):
        calls.append(kwargs)
        return own(*args, **kwargs)

    base.forward = forward
    sampled = generate(engine_over(policy), prompts, range(COUNT), SETTINGS, OwnModelLink())
    assert base.forward is forward
    assert_equal(sampled, expected)
    assert all(call["logits_to_keep"] == 1 and "labels" not in call for call in calls)
    assert (
        int(calls[0]["position_ids"].max()) == max(map(len, prompts)) - 2
    )  # a prompt's last token is the first step's


def test_a_model_without_adapter_is_sampled_as_it_is(tiny_model, prompts):
    policy: Any = tiny_policy(tiny_model, lora=False)
    engine = engine_over(policy)
    link = link_policy(engine, policy)
    move(policy, scale=0.02)
    completions = generate(engine, prompts, range(COUNT), SETTINGS, link)
    assert_same_logps(policy, prompts, completions)
    long = generate(engine, prompts[:1] * 40, range(40), SamplingSettings(60), link)
    assert {c.finish_reason for c in long} == {FinishReason.STOP, FinishReason.LENGTH}
    assert_equal(completions, generate(engine, prompts, range(COUNT), SETTINGS))


def test_another_model_or_no_stop_tokens_are_refused(tiny_model):
    policy = tiny_policy(tiny_model)
    with pytest.raises(ValueError, match="needs `stop_token_ids`"):
        TransformersEngine(policy, 512)
    with pytest.raises(ValueError, match=r"TransformersEngine with a model of its own"):
        link_policy(engine_over(tiny_policy(tiny_model)), policy)
