"""The planner's lines against the true training pass, traced with fake tensors (benchmarks/trace_memory.py)."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from trace_memory import CASES, QWEN_1_5B, Storages, planned, trace

from astarpo.rollout.memory import ModelShape, formulas
from astarpo.trainer.logprobs import TILE

LINES = ("kept", "blocks", "gradients", "head", "scoring", "update")


@pytest.fixture(scope="module")
def shape():
    return ModelShape.of_config(Qwen2Config(**QWEN_1_5B, tie_word_embeddings=True), "Qwen2.5-1.5B")


def test_storages_are_followed_from_their_making_to_their_end():
    with Storages() as storages, storages.peak() as found:
        kept = torch.zeros(1000)
        passing = kept + 1
        view = passing[:10]
        del passing
        del view
    assert found == [8000, 4000]
    assert storages.alive == 4000 and kept.nbytes == 4000


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_line_is_within_ten_percent_of_the_trace(shape, name):
    traced, plan = trace(QWEN_1_5B, **CASES[name]), planned(shape, **CASES[name])
    # With all weights the plan adds up gradients and embeddings in another way; what counts is the sum.
    lines = LINES if CASES[name]["rank"] else ("gradients", "update")
    for line in lines:
        assert plan[line] == pytest.approx(traced[line], rel=0.1), line


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_block_is_within_three_percent_of_the_trace(is_checkpointed):
    """What one more layer keeps and takes, for a model that is quick to trace."""
    case: dict[str, Any] = dict(prompt=64, completion=192, rank=8, is_checkpointed=is_checkpointed)
    sizes: dict[str, Any] = {**QWEN_1_5B, "hidden_size": 512, "intermediate_size": 2048, "vocab_size": 1024}
    found = []
    for layers in (2, 3):
        more: dict[str, Any] = sizes | {
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        }
        shape = ModelShape.of_config(Qwen2Config(**more, tie_word_embeddings=True), "small")
        found.append((trace(more, **case)["kept"], planned(shape, **case)["kept"]))
    traced, plan = (later - earlier for earlier, later in zip(*found, strict=True))
    assert plan == pytest.approx(traced, rel=0.03)


def test_the_math_kernel_would_keep_the_scores():
    """What `trainer/attention.py` keeps a T4 out of."""
    sizes = QWEN_1_5B | {"num_hidden_layers": 1}
    case: dict[str, Any] = dict(prompt=256, completion=512, rank=16, is_checkpointed=False)
    more = trace(sizes, **case, attention="math")["kept"] - trace(sizes, **case)["kept"]
    assert more > 12 * 768 * 768 * 2  # a half-precision score for each head and pair of tokens, at least


def test_a_tile_of_logits_is_planned_as_long_as_it_is():
    assert TILE["cuda"] == formulas.HEAD_TOKENS


def test_a_pass_under_autocast_keeps_no_second_copy_of_what_goes_into_an_adapter(shape):
    """PEFT would cast each layer's input to float32, and autocast would cast it back and keep that."""
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    kept = {}
    for is_off in (False, True):
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=64))
        policy: Any = get_peft_model(
            model.to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        )
        held: dict[int, int] = {}

        def keep(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(policy, active=is_off):
            loss = policy(input_ids=torch.arange(64)[None]).logits.float().square().mean()
        loss.backward()
        kept[is_off] = sum(held.values()), [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert kept[False][0] - kept[True][0] == 2 * 4 * 64 * 64 * 2  # four of a layer's inputs, 64 tokens each
    assert all(torch.equal(a, b) for a, b in zip(kept[False][1], kept[True][1], strict=True))
