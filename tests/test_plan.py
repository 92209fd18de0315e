"""The planner: counts that can be counted, and every change of a size changes the plan in the expected direction."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from astarpo.rollout import EngineOptions
from astarpo.rollout.memory import ModelShape, RunSizes, formulas, plan_run, training_sizes
from astarpo.rollout.memory.cards import gpu_bytes
from astarpo.rollout.memory.command import PlanOptions, sizes
from astarpo.rollout.memory.plan import BACKWARD, PHASES

GB = 10**9
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with nothing but Qwen2.5-1.5B's config."""
    folder = tmp_path_factory.mktemp("qwen2.5-1.5b")
    (folder / "config.json").write_text(json.dumps(QWEN))
    return str(folder)


@pytest.fixture(scope="module")
def shape(folder):
    return ModelShape.of(folder)


def small(**changes):
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    sizes |= dict(vocab_size=64, num_hidden_layers=2, max_position_embeddings=4096)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **changes}))
    return model.to(torch.float16)


def test_weights_of_the_default_model(shape):
    assert formulas.weights(shape, 2) == 1_543_714_304 * 2
    assert formulas.key_values_per_token(shape, 2) == 28_672
    assert formulas.adapter_slot(shape, 16, 2) == pytest.approx(36.9e6, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_real_tensors(tied, tmp_path):
    model = small(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    shape = ModelShape.of(str(tmp_path))
    assert formulas.weights(shape, 2) == sum(p.numel() * p.element_size() for p in model.parameters())
    policy = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in policy.parameters() if p.requires_grad]
    parameters = formulas.adapter_parameters(shape, 8)
    assert parameters == sum(p.numel() for p in trained)
    for p in trained:
        p.data, p.grad = p.data.float(), torch.zeros_like(p, dtype=torch.float32)
    assert formulas.adapter(parameters) == sum(p.nbytes for p in trained)
    assert formulas.gradients(parameters) == sum(p.grad.nbytes for p in trained)
    adam = torch.optim.AdamW(trained)
    adam.step()
    moments = [t for state in adam.state.values() for t in state.values() if t.dim() > 0]
    assert formulas.optimizer(parameters) == sum(t.nbytes for t in moments)
    some = formulas.adapter_parameters(shape, 8, ("q_proj", "down_proj"))
    assert some == 8 * 2 * (128 + 128 + 256 + 128)


def test_plans_for_a_small_gpu(shape):
    two_copies, one_copy = RunSizes(768, 512), RunSizes(768, 512, share_base_weights=True)
    plan = plan_run(shape, one_copy, 10 * GB)
    assert plan.fits
    assert (plan.sizes.max_num_seqs or 0) >= 64
    assert (plan.sizes.kv_cache_bytes or 0) >= 64 * 768 * 28_672
    assert plan.total(BACKWARD) <= plan.peak <= 10 * GB
    assert plan_run(shape, two_copies, 10 * GB).fits
    tight = plan_run(shape, two_copies, 6 * GB)
    assert not tight.fits
    assert tight.advice == "share_base_weights=on"
    assert plan_run(shape, replace(two_copies, share_base_weights=True), 6 * GB).fits
    hopeless = plan_run(shape, one_copy, 3 * GB)
    assert not hopeless.fits
    assert "smaller model" in hopeless.advice
    greedy = plan_run(shape, replace(one_copy, micro_batch=64), 10 * GB)
    assert greedy.advice == "per_device_train_batch_size=1"


MORE = [
    lambda s: replace(s, sequence=s.sequence + 256),
    lambda s: replace(s, completion=s.completion + 64, sequence=s.sequence + 64),
    lambda s: replace(s, rank=(s.rank or 1) * 2),
    lambda s: replace(s, micro_batch=s.micro_batch + 1),
    lambda s: replace(s, max_num_seqs=s.max_num_seqs * 2),
    lambda s: replace(s, max_num_batched_tokens=s.max_num_batched_tokens * 2),
    lambda s: replace(s, kv_cache_bytes=s.kv_cache_bytes + GB),
    lambda s: replace(s, gradient_checkpointing=False),
    lambda s: replace(s, share_base_weights=False),
    lambda s: replace(s, width=4),
    lambda s: replace(s, rank=None),
]


@given(
    st.integers(0, len(MORE) - 1),
    st.builds(
        RunSizes,
        sequence=st.integers(600, 4096),
        completion=st.integers(16, 512),
        rank=st.sampled_from([8, 16, 64]),
        policy_link=st.sampled_from(["inline", "adapter"]),
        share_base_weights=st.just(True),
        gradient_checkpointing=st.just(True),
        micro_batch=st.integers(1, 8),
        max_num_seqs=st.integers(1, 256),
        max_num_batched_tokens=st.integers(512, 8192),
        kv_cache_bytes=st.integers(0, 8 * GB),
    ),
)
@settings(deadline=None, max_examples=200)
def test_more_of_anything_never_takes_less_and_takes_more_somewhere(shape, which, sizes):
    before = plan_run(shape, sizes, 100 * GB)
    after = plan_run(shape, MORE[which](sizes), 100 * GB)
    totals = [(before.total(phase), after.total(phase)) for phase in PHASES]
    assert all(later >= earlier for earlier, later in totals)
    assert any(later > earlier for earlier, later in totals)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_a_larger_budget_never_fits_less(shape, gigabytes, more):
    sizes = RunSizes(768, 512, share_base_weights=True)
    small_plan, large_plan = (plan_run(shape, sizes, b * GB) for b in (gigabytes, gigabytes + more))
    assert large_plan.fits or not small_plan.fits
    assert not small_plan.fits or small_plan.peak <= gigabytes * GB


def run(*words):
    command = [sys.executable, "-m", "astarpo.rollout.memory.command", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_command(folder):
    finished = run("--model", folder, "--config", "t4_math", "--json")
    assert finished.returncode == 0, finished.stderr
    plan = json.loads(finished.stdout)
    assert plan["fits"] and plan["peak_gb"] <= 10.0
    assert plan["chosen"]["max_num_seqs"] >= 64 and plan["chosen"]["sequence"] == 768
    assert plan["chosen"]["micro_batch"] in (1, 2, 4, 8, 16, 32)
    assert next(line["gb"] for line in plan["lines"] if line["name"].startswith("base weights")) == pytest.approx(
        3.0874
    )
    two = run("--model_name_or_path", folder, "--config", "t4_math", "--share_base_weights", "off", "--json", "true")
    assert json.loads(two.stdout)["peak_gb"] <= 10.0  # with smaller passes
    assert json.loads(two.stdout)["chosen"]["share_base_weights"] is False
    shown = run("--model", folder, "--budget_gb", "3")
    assert shown.returncode == 1
    assert "does not fit" in shown.stdout and "KV cache" in shown.stdout


QWEN_3B = {**QWEN, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
QWEN_7B = {
    **{**QWEN, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
    **{"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
SMOLLM = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536},
    **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("recipe", "config", "parameters", "limit"),
    [
        ("quickstart", SMOLLM, 134_515_008, 15.0),
        ("t4_math", QWEN, 1_543_714_304, 10.0),
        ("t4_gsm8k", QWEN, 1_543_714_304, 10.0),
        ("t4_pag", QWEN, 1_543_714_304, 10.0),
        ("t4_rounds", QWEN, 1_543_714_304, 10.0),
        ("quickstart_pag", SMOLLM, 134_515_008, 15.0),
        ("l4_math", QWEN_3B, 3_085_938_688, 20.0),
        ("a100_math", QWEN_7B, 7_615_616_512, 40.2),
    ],
)
def test_recipes_fit_their_gpus(tmp_path, recipe, config, parameters, limit):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelShape.of(str(tmp_path)).parameters == parameters
    finished = run("--model_name_or_path", str(tmp_path), "--config", recipe, "--json", "true")
    plan = json.loads(finished.stdout)
    assert finished.returncode == 0 and plan["fits"] and plan["peak_gb"] <= limit
    assert plan["chosen"]["max_num_seqs"] >= 64


def test_rounds_have_batches_that_engine_and_trainer_together_cannot_have(tmp_path):
    """1,024 new tokens within 10 GB: 128 completions decoded at once and 16 trained in one pass, one phase at a time."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    shape = ModelShape.of(str(tmp_path))
    sizes = training_sizes(
        *(256, 1024),
        width=2,
        rank=16,
        gradient_checkpointing=True,
        batch=16,
        is_one_pass=True,
        max_num_seqs=128,
        in_rounds=True,
    )
    apart = plan_run(shape, sizes, int(10e9))
    together = plan_run(shape, replace(sizes, in_rounds=False), int(10e9))
    assert apart.fits and not together.fits and together.peak > 13e9
    assert apart.sizes.micro_batch == 16 and apart.sizes.max_num_seqs == 128
    engine = [line for line in apart.lines if "KV cache" in line.name or "engine" in line.name]
    assert engine and all("backward" not in line.phases and "score" not in line.phases for line in engine)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "abacus"], "Name t4"),
        (["--budget_gb", "40"], "not between 0 and what the GPU has"),
        (["--lora_r", "0"], "at least 1"),
        (["--model_name_or_path", "/nowhere"], "config of `/nowhere` could not be read"),
    ],
)
def test_bad_input_names_the_fix(folder, words, message):
    finished = run("--model_name_or_path", folder, *words)
    assert finished.returncode == 2
    assert message in finished.stderr


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("t4", 15.8),
        ("Tesla T4", 15.8),
        ("3060", 12.6),
        ("RTX 3090", 25.2),
        ("4060 Ti", 16.8),
        ("4060ti-8gb", 8.4),
        ("NVIDIA GeForce RTX 4090", 25.2),
        ("5090", 33.5),
        ("L4", 24.1),
        ("L40S", 47.3),
        ("A10", 24.1),
        ("RTX A6000", 50.5),
        ("V100", 16.6),
        ("A100", 42.3),
        ("A100-80GB", 84.9),
        ("H100", 85.0),
        ("H200", 149.5),
        ("24GB", 24.0),
        ("7.5 gb", 7.5),
    ],
)
def test_cards_as_people_name_them(name, gigabytes):
    assert gpu_bytes(name) == pytest.approx(gigabytes * GB)


@pytest.mark.parametrize("name", ["24000000000", "24", "0GB", "24GiB", "rtx", "4091"])
def test_a_name_that_is_not_known_is_an_error_and_never_bytes(name):
    with pytest.raises(ValueError, match=r"is not known. Name t4"):
        gpu_bytes(name)


def test_the_kv_cache_is_in_the_unit_of_everything_else(folder):
    assert EngineOptions(kv_cache_gb=2.0).kv_cache_bytes == 2 * GB
    options = PlanOptions(folder, kv_cache_gb=2.0, max_num_seqs=8)
    assert sizes(options, 2).kv_cache_bytes == 2 * GB


def test_cuda_graphs_are_planned(shape):
    plain = RunSizes(768, 512)
    more = plan_run(shape, replace(plain, cuda_graphs=True), 20 * GB)
    lines = {line.name: line.bytes for line in more.lines}
    assert lines["CUDA graphs of decoding"] == formulas.GRAPHS
