"""Scoring without padding: the groups are the cheapest, and every token gets the score it has when its row is alone."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from astarpo.trainer.logprobs import has_plain_logits, length_groups, score_completions, use_scoring_head


def cost(groups, lengths, call_cost):
    return sum(len(group) * max(lengths[row] for row in group) + call_cost for group in groups)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 80), st.integers(1, 7))
@settings(deadline=None)
def test_groups_hold_every_row_once_at_the_least_cost(lengths, call_cost, max_rows):
    groups = length_groups(lengths, call_cost, max_rows)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert max(map(len, groups)) <= max_rows
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    others = []
    for count in range(len(lengths)):
        for cuts in combinations(range(1, len(lengths)), count):
            parts = [order[a:b] for a, b in zip((0, *cuts), (*cuts, len(lengths)), strict=True)]
            if max(map(len, parts)) <= max_rows:
                others.append(cost(parts, lengths, call_cost))
    assert cost(groups, lengths, call_cost) == min(others)


def padded(rows, pad=0):
    """A batch as `collate` pads it: prompts left, completions right."""
    prompt_columns, completion_columns = max(len(p) for p, _ in rows), max(len(c) for _, c in rows)
    ids, mask = [], []
    for prompt, completion in rows:
        left, right = prompt_columns - len(prompt), completion_columns - len(completion)
        ids.append([pad] * left + prompt + completion + [pad] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    return torch.tensor(ids), torch.tensor(mask), completion_columns


@pytest.mark.parametrize("call_cost", [0, 10, 10_000])
@pytest.mark.parametrize("shared", [0, 5, 11])
@pytest.mark.parametrize("min_saved", [0, 44, None])
def test_scores_and_gradients_are_those_of_rows_alone(tiny_model, call_cost, shared, min_saved):
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randint(3, 259, (count,), generator=generator).tolist()

    prefix = draw(shared)
    rows = [(prefix + draw(p), draw(c)) for p, c in [(5, 9), (12, 1), (3, 2), (12, 9), (7, 4)]]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    use_scoring_head(model, 0.7)
    ids, mask, columns = padded(rows)
    groups = length_groups(mask.sum(1).tolist(), call_cost, len(rows))
    assert {0: len(groups) == 5, 10: 1 < len(groups) < 5, 10_000: len(groups) == 1}[call_cost]
    passes = []
    model.register_forward_pre_hook(lambda *call: passes.append(call[2]["input_ids"].shape), with_kwargs=True)
    logps, entropies = score_completions(model, ids, mask, columns, groups, min_saved, compute_entropy=True)
    is_shared = min_saved is not None and shared > 0 and 4 * shared >= min_saved
    assert len(passes) == len(groups) + is_shared
    assert not is_shared or passes[0] == (1, shared)
    weights = torch.rand(logps.shape, generator=generator)
    ours = torch.autograd.grad((logps * weights).sum(), list(model.parameters()))
    expected, expected_entropies = torch.zeros_like(logps), torch.zeros_like(logps)
    for row, (prompt, completion) in enumerate(rows):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        every = logits.log_softmax(-1)
        expected[row, : len(completion)] = every.gather(1, torch.tensor(completion)[:, None])[:, 0]
        expected_entropies[row, : len(completion)] = -(every.exp() * every).sum(-1).detach()
    theirs = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    assert torch.allclose(logps, expected, atol=1e-4)
    assert entropies is not None
    assert torch.allclose(entropies, expected_entropies, atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("logits", ["plain", "the model's own"])
def test_a_reference_is_scored_without_entropies(tiny_model, logits):
    """Also where logits are scaled or softcapped, which is the model's own business."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    if logits != "plain":
        model.config.logit_scale = 1.0  # a Qwen2 does not read it
    assert has_plain_logits(model.config) == (logits == "plain")
    ids, mask, columns = padded([([5, 6, 7], [8, 9]), ([5, 6], [10])])
    use_scoring_head(model, 0.5)
    with torch.no_grad():
        logps, entropies = score_completions(model, ids, mask, columns, [[0, 1]])
        expected = (model(input_ids=ids[:1]).logits[0, 2:4] / 0.5).log_softmax(-1)
    assert entropies is None
    assert torch.allclose(logps[0], expected.gather(1, torch.tensor([[8], [9]]))[:, 0], atol=1e-4)
    assert logps[1, 1] == 0
