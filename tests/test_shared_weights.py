"""One copy of the base weights: the trainer's parameters are views of the real engine's tensors, and training is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_engine
from helpers import LORA, completion_logps, move, tiny_policy, toy_rows
from peft import LoraConfig
from safetensors.torch import load_file

from astarpo.rollout import EngineOptions, SamplingSettings
from astarpo.rollout.engines.policy_link import link_policy
from astarpo.rollout.engines.shared_weights import SharedWeights
from astarpo.trainer import AStarPOConfig, AStarPOTrainer


def parity(completion_ids, **kwargs) -> list[float | None]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def trainer(model: str, folder: Path, share: str, lora: bool = True, **settings) -> Any:
    args = {
        **dict(output_dir=str(folder), per_device_train_batch_size=4, max_completion_length=8, learning_rate=1e-2),
        **dict(report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True),
        **dict(use_cpu=True, num_value_samples=4, max_steps=3, model_init_kwargs={"dtype": "float32"}, seed=0),
        **settings,
    }
    return AStarPOTrainer(
        model,
        parity,
        AStarPOConfig(**args),
        toy_rows(8),
        peft_config=LoraConfig(**LORA) if lora else None,
        engine_options=EngineOptions(kv_cache_gb=0.05, max_num_seqs=16, share_base_weights=share),
    )


def base_bits(policy) -> list[int]:
    """A hash of each frozen parameter's bits."""
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    return [int(torch.hash_tensor(p.detach()).item()) for p in frozen]


def engine_tensors(engine) -> dict[str, torch.Tensor]:
    return dict(engine.llm.apply_model(lambda module: dict(module.named_parameters()))[0])


@pytest.fixture(scope="module")
def shared(tiny_model):
    policy: Any = tiny_policy(tiny_model)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    engine = make_engine(tiny_model, shared=SharedWeights(policy))
    yield policy, engine, before
    engine.close()


def test_pointers_are_the_engines(shared):
    policy, engine, before = shared
    held = engine_tensors(engine)
    layer = policy.get_base_model().model.layers[1]
    for target, parts in (
        ("self_attn.qkv_proj", ["q_proj", "k_proj", "v_proj"]),
        ("mlp.gate_up_proj", ["gate_proj", "up_proj"]),
    ):
        fused = held[f"model.layers.1.{target}.weight"]
        row = 0
        for part in parts:
            weight = getattr(getattr(layer, target.partition(".")[0]), part).base_layer.weight
            assert weight.data_ptr() == fused[row].data_ptr()
            row += len(weight)
        assert row == len(fused)
    head = policy.get_base_model().lm_head.weight
    assert head.data_ptr() == held["model.embed_tokens.weight"].data_ptr()
    storages = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    frozen = [p for p in policy.parameters() if not p.requires_grad]
    assert {p.untyped_storage().data_ptr() for p in frozen} <= storages
    assert engine.shared.bytes == sum(p.nbytes for p in frozen)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_engine_samples_the_policy_with_its_own_memory(shared, tokenizer):
    policy, engine, _ = shared
    link = link_policy(engine, policy)
    move(policy)
    prompt = tokenizer("What is 3 plus 4?")["input_ids"]
    completion: Any = next(iter(engine.stream([prompt], [7], SamplingSettings(12, 1.0), link)))[1]
    expected = completion_logps(policy, prompt, completion)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)
    link.close()


@pytest.mark.parametrize("break_it", ["cast", "merge", "reload"])
def test_what_breaks_the_sharing_is_refused(tiny_model, tokenizer, break_it):
    policy: Any = tiny_policy(tiny_model)
    engine = make_engine(tiny_model, shared=SharedWeights(policy))
    if break_it == "cast":
        policy.half()
    elif break_it == "merge":
        policy.merge_adapter()
    else:
        parameter = engine_tensors(engine)["model.layers.0.self_attn.qkv_proj.weight"]
        parameter.data = parameter.data.clone()
    message = "unmerge_adapter" if break_it == "merge" else "no longer shared"
    with pytest.raises(RuntimeError, match=message):
        list(engine.stream([tokenizer("Hello")["input_ids"]], [1], SamplingSettings(4, 1.0)))
    engine.close()


def test_what_cannot_be_shared_says_why(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="all weights are trained"):
        SharedWeights(tiny_policy(tiny_model, lora=False))
    with pytest.raises(ValueError, match=r"share_base_weights=on is not possible: all weights are trained"):
        trainer(tiny_model, tmp_path, "on", lora=False)
    policy: Any = tiny_policy(tiny_model)
    policy.get_base_model().model.norm.half()
    with pytest.raises(ValueError, match="several types"):
        SharedWeights(policy)
    other: Any = tiny_policy(tiny_model)
    other.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data = torch.zeros(32, 64)
    with pytest.raises(Exception, match=r"weight|size|shape"):
        make_engine(tiny_model, shared=SharedWeights(other))


def test_a_redundant_head_is_tied_as_vllm_would(tiny_model, tmp_path, tokenizer):
    """Some checkpoints hold a copy of the head that their config ties: vLLM builds one, compares, and ties it again."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((Path(tiny_model) / name).read_text())
    weights = load_file(Path(tiny_model) / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy: Any = tiny_policy(str(tmp_path))
    engine = make_engine(str(tmp_path), shared=SharedWeights(policy))
    plain = make_engine(tiny_model)
    prompt = tokenizer("What is 3 plus 4?")["input_ids"]
    drawn: list[Any] = [next(iter(e.stream([prompt], [7], SamplingSettings(12, 1.0))))[1] for e in (engine, plain)]
    assert drawn[0].token_ids == drawn[1].token_ids
    engine.close()
    plain.close()


def test_training_is_that_of_two_copies_bit_for_bit(tiny_model, tmp_path):
    logs, adapters = [], []
    for share in ("off", "on"):
        run = trainer(tiny_model, tmp_path / share, share, logging_steps=1)
        assert (run.engine.shared is not None) == (share == "on")
        run.train()
        run.save_model(str(tmp_path / share))
        adapters.append(load_file(tmp_path / share / "adapter_model.safetensors"))
        logs.append([(line["loss"], line["reward"]) for line in run.state.log_history if "loss" in line])
        run.engine.close()
    assert logs[0] == logs[1]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_base_is_untouched_by_200_updates(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, "on", max_steps=200, probe_rows=0)
    before, engine = base_bits(run.model), run.engine
    held = {name: int(torch.hash_tensor(tensor).item()) for name, tensor in engine_tensors(engine).items()}
    start = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    run.train()
    moved = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    assert base_bits(run.model) == before
    assert {name: int(torch.hash_tensor(tensor).item()) for name, tensor in engine_tensors(engine).items()} == held
    run.engine.shared.check()
    engine.close()


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """About 400 MB in float32, so that a copy of it stands out in what a process holds."""
    from conftest import build_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("large")
    build_tokenizer(folder)
    sizes: dict[str, Any] = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8)
    config = Qwen2Config(**sizes, num_key_value_heads=4, vocab_size=320, eos_token_id=2, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


RUN = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from typing import Any
from test_shared_weights import trainer
sizes = dict(max_steps=2, per_device_train_batch_size=8, max_completion_length=48)  # the peak is in training then
run = trainer({model!r}, Path({folder!r}), sys.argv[1], **sizes)
run.train()
base = sum(p.nbytes for p in run.model.parameters() if not p.requires_grad)
# Not ru_maxrss: that of a child begins with what its parent held.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([peak, base]))
"""


@pytest.mark.slow
def test_a_shared_run_holds_one_copy_less(large_model, tmp_path):
    peaks = {}
    program = RUN.format(tests=str(Path(__file__).parent), model=str(large_model), folder=str(tmp_path))
    for share in ("off", "on"):
        # glibc keeps freed memory by chance; this way what is resident is what is held, in both runs.
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", program, share]
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **malloc}
        )
        assert finished.returncode == 0, finished.stderr[-2000:]
        peaks[share], base = json.loads(finished.stdout.splitlines()[-1])
    print(f"peak RSS {peaks}, base {base}")
    assert peaks["off"] - peaks["on"] >= 0.9 * base
