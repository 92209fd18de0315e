"""The planner at work: jobs take its choices, refuse before loading, and the GPU decides types and kernels."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import LORA, toy_rows
from peft import LoraConfig
from test_plan import QWEN

from astarpo.rollout import EngineOptions
from astarpo.rollout.engines.start import start_engine
from astarpo.rollout.hardware import KERNEL_CONFIGS, Hardware
from astarpo.rollout.memory import ModelShape, RunSizes, formulas, plan_run
from astarpo.rollout.memory.job import cache_of_share, memory_budget, plan_rollout
from astarpo.rollout.options import ModelOptions
from astarpo.trainer import AStarPOConfig, AStarPOTrainer
from astarpo.trainer.sizes import plan_training


@pytest.fixture
def only_config(tmp_path):
    """A model of which there is nothing but the config, so that loading it would fail."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return str(tmp_path)


def settings(folder, **changes):
    return AStarPOConfig(
        **{
            **dict(output_dir=str(folder), per_device_train_batch_size=4, max_completion_length=8, max_steps=1),
            **dict(report_to="none", save_strategy="no", bf16=False, use_cpu=True, disable_tqdm=True),
            **dict(num_value_samples=4, model_init_kwargs={"dtype": "float32"}),
            **changes,
        }
    )


def test_a_rollout_that_does_not_fit_is_refused_before_loading(only_config):
    model = ModelOptions(only_config)
    with pytest.raises(ValueError, match=r"would need .* GB .* may take 3\.0 GB\. What would fit"):
        start_engine(model, EngineOptions(budget_gb=3), [[1] * 256], 512)
    with pytest.raises(ValueError, match="must be above 0"):
        plan_rollout(model, EngineOptions(budget_gb=0), 768, 512)


def test_a_rollout_takes_the_choices_unless_they_are_set(only_config):
    model, options = ModelOptions(only_config), EngineOptions(budget_gb=10)
    chosen = plan_rollout(model, options, 768, 512)
    assert (chosen.max_num_seqs or 0) >= 64
    assert chosen.kv_cache_bytes >= (chosen.max_num_seqs or 0) * 768 * 28_672
    assert chosen.max_num_batched_tokens
    kept = plan_rollout(model, replace(options, max_num_seqs=24, kv_cache_gb=2.0), 768, 512)
    assert (kept.max_num_seqs, kept.kv_cache_gb) == (24, 2.0)


def test_without_a_gpu_nothing_is_planned():
    options = EngineOptions()
    assert memory_budget(options) is None
    assert (options.sequences, options.kv_cache_bytes) == (64, 10**9)


def test_training_that_does_not_fit_is_refused_before_loading(only_config, tmp_path):
    with pytest.raises(ValueError, match="astarpo-plan"):
        AStarPOTrainer(
            only_config,
            args=settings(tmp_path, max_prompt_length=256, max_completion_length=512),
            train_dataset=toy_rows(),
            peft_config=LoraConfig(**LORA),
            engine_options=EngineOptions(budget_gb=3),
        )


def test_training_takes_the_choices(tiny_model, tmp_path, caplog):
    caplog.set_level("INFO", logger="astarpo")
    engine: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 128}  # so small that training decides

    def sizes_of(budget, **changes):
        trainer = AStarPOTrainer(
            tiny_model,
            args=settings(tmp_path, max_prompt_length=64, per_device_train_batch_size=8, **changes),
            train_dataset=toy_rows(),
            peft_config=LoraConfig(**LORA),
            engine_options=EngineOptions(budget_gb=budget, share_base_weights="on", **engine),
        )
        trainer.train()
        trainer.close()
        return trainer

    roomy = sizes_of(2)
    assert roomy.engine_options.kv_cache_gb and roomy.rows_at_once == 8
    assert roomy.args.gradient_checkpointing is False
    assert "planned: peak" in caplog.text
    shape = ModelShape.of(tiny_model)
    sizes = RunSizes(72, 8, rank=8, width=4, share_base_weights=True, batch=8, **engine)
    tight = sizes_of((plan_run(shape, sizes, 2 * 10**9).peak - 1) / 1e9)
    assert tight.rows_at_once == 4 and tight.args.gradient_checkpointing is False
    asked = sizes_of(2, gradient_checkpointing=True)
    assert asked.args.gradient_checkpointing is True


def test_without_a_gpu_activations_are_recomputed_only_where_they_are_large(only_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("astarpo.trainer.sizes._memory_of_machine", lambda: 16 * 2**30)

    def sizes(**changes):
        args = settings(tmp_path, max_prompt_length=64, **changes)
        return plan_training(only_config, args, EngineOptions(), LoraConfig(**LORA)).gradient_checkpointing

    assert sizes() is False
    assert sizes(per_device_train_batch_size=100_000) is True
    assert sizes(gradient_checkpointing=True) is True
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8}))
    assert sizes() is True  # an architecture that the formulas do not know


def test_planned_kv_cache_and_weights_are_the_engines(engine, writable_engine, tiny_model):
    """Bytes of the real engine's tensors."""
    shape = ModelShape.of(tiny_model)
    core = engine.llm.llm_engine.engine_core.engine_core
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    cache = core.scheduler.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    assert sum(tensor.nbytes for tensor in caches) == tokens * formulas.key_values_per_token(shape, 4)
    assert tokens * formulas.key_values_per_token(shape, 4) == pytest.approx(0.05 * 1e9, rel=0.05)
    weights = writable_engine.llm.apply_model(lambda m: sum(p.nbytes for p in m.parameters()))[0]
    assert weights == pytest.approx(formulas.weights(shape, 4), rel=0.05)


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch report a GPU."""

    def pretend(name, capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return pretend


def test_a_t4_gets_float16_and_triton_attention(gpu, monkeypatch):
    gpu("Tesla T4", (7, 5))
    hardware = Hardware.detect()
    assert hardware.dtype == "float16"
    assert hardware.engine_arguments() == {"attention_backend": "TRITON_ATTN"}
    assert len(hardware.reasons) == 2 and all("7.5 is below 8.0" in reason for reason in hardware.reasons)
    assert Hardware.detect("float32").dtype == "float32"
    with pytest.raises(ValueError, match="has no bf16 arithmetic"):
        Hardware.detect("bfloat16")
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "mine")
    hardware.use_tuned_kernels()
    assert __import__("os").environ["VLLM_TUNED_CONFIG_FOLDER"] == "mine"


def test_vllm_reads_our_kernel_sizes_on_a_t4(gpu, monkeypatch):
    gpu("Tesla T4", (7, 5))
    from vllm.lora.ops.triton_ops import utils

    # Not by the environment: vLLM reads that once, when the first engine starts.
    monkeypatch.setattr(utils, "envs", SimpleNamespace(VLLM_TUNED_CONFIG_FOLDER=str(KERNEL_CONFIGS)))
    for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
        cached.cache_clear()
    for slices in (1, 2, 3):
        found = utils.get_lora_op_configs("shrink", 1, 16, 8960, 16, slices)
        assert (found["block_k"], found["split_k"]) == (32, 8)
    for cached in (utils.load_lora_op_config, utils.get_lora_op_configs):
        cached.cache_clear()


def test_newer_gpus_are_left_to_vllm(gpu):
    gpu("NVIDIA L4", (8, 9))
    assert Hardware.detect() == Hardware("NVIDIA L4", (8, 9), "auto")
    assert Hardware.detect("bfloat16").engine_arguments() == {}


def test_trls_share_of_the_gpu_becomes_a_kv_cache(only_config):
    shape, sizes = ModelShape.of(only_config), RunSizes(768, 512, share_base_weights=True)
    total = 16 * 10**9
    step = formulas.engine_activations(shape, 2048, 2) + formulas.sampler(shape, 64)
    assert cache_of_share(0.3, total, shape, sizes) == int(0.3 * total) - formulas.weights(shape, 2) - step
    with pytest.raises(ValueError, match=r"0\.2 is 3\.2 GB of this GPU.*one sequence needs 0\.02 GB"):
        cache_of_share(0.2, total, shape, sizes)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        cache_of_share(1.5, total, shape, sizes)


def test_without_a_gpu_the_share_is_left_out_and_said_so(tiny_model, tmp_path, caplog):
    trainer = AStarPOTrainer(
        tiny_model,
        args=settings(tmp_path, max_prompt_length=64, vllm_gpu_memory_utilization=0.3),
        train_dataset=toy_rows(),
        peft_config=LoraConfig(**LORA),
        engine_options=EngineOptions(budget_gb=2, max_num_seqs=8),
    )
    trainer.close()
    assert "vllm_gpu_memory_utilization=0.3 is left out" in caplog.text


def test_a_quantised_policy_is_refused_beside_vllm(only_config, tmp_path):
    def trainer(**engine):
        return AStarPOTrainer(
            only_config,
            args=settings(tmp_path),
            train_dataset=toy_rows(),
            peft_config=LoraConfig(**LORA),
            quantization_config=SimpleNamespace(),
            engine_options=EngineOptions(**engine),
        )

    with pytest.raises(ValueError, match=r"refused with vLLM in the same process.*--engine transformers"):
        trainer(engine="vllm")


@pytest.mark.parametrize("rank", [16, None])
def test_the_transformers_engine_holds_no_weights_and_its_cache_only_while_it_samples(only_config, rank):
    shape = ModelShape.of(only_config)
    own = RunSizes(768, 512, rank, engine="transformers", max_num_seqs=64, width=2 if rank else 4)
    plan = plan_run(shape, own, 100 * 10**9)
    vllm = plan_run(shape, replace(own, engine="vllm", share_base_weights=rank is not None), 100 * 10**9)
    cache = next(line for line in plan.lines if line.name.startswith("KV cache"))
    assert cache.bytes == 64 * 768 * formulas.key_values_per_token(shape, own.width)
    assert set(cache.phases) == {"stage 1", "generate"}
    names = {line.name for line in plan.lines}
    assert not any("engine" in name for name in names)
    saved = plan.total("score") - vllm.total("score")
    assert saved <= -cache.bytes - (0 if rank else formulas.weights(shape, own.width)) + 10**7


def test_a_rollout_by_transformers_is_planned(only_config):
    chosen = plan_rollout(ModelOptions(only_config), EngineOptions(engine="transformers", budget_gb=10), 768, 512)
    assert (chosen.max_num_seqs or 0) >= 64
