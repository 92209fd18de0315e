"""Merged weights say what base and adapter say; what does not is refused and nothing is written."""

import shutil
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from helpers import move
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from astarpo.rollout import SamplingSettings, VLLMEngine
from astarpo.rollout.engines.interface import Completion
from astarpo.rollout.options import EngineOptions
from astarpo.trainer.export import ExportOptions, export
from astarpo.trainer.merge import PROMPTS, merge_adapter, merged_reference

SIZES: dict[str, Any] = {
    **{
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    **{
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.1,
    },
}
SHAPES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, tmp_path_factory):
    """A model and an adapter that moves its log-probs by half a nat and more."""
    folder = tmp_path_factory.mktemp(request.param)
    config, model = SHAPES[request.param]
    build_tokenizer(folder / "base")
    torch.manual_seed(0)
    base = model(config(**SIZES, tie_word_embeddings=request.param == "qwen2")).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    torch.manual_seed(1)
    policy = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    move(policy, 0.15)
    policy.save_pretrained(folder / "adapter")
    return folder


def logps(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])


def mean_gaps(folder, merged, dtype):
    """Teacher-forced on 20 prompts: mean |Δ| of merged against base plus adapter, and of the base alone, each by transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    policy: Any = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found = AutoModelForCausalLM.from_pretrained(merged)
    assert found.dtype == getattr(torch, dtype)
    found = found.float().eval()
    gaps, moved = [], []
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        wanted = logps(policy, ids)
        gaps.append((logps(found, ids) - wanted).abs())
        with policy.disable_adapter():
            moved.append((logps(policy, ids) - wanted).abs())
    return float(torch.cat(gaps).mean()), float(torch.cat(moved).mean())


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 0.02), ("float16", 0.01)])
def test_merged_weights_say_what_base_and_adapter_say(trained, tmp_path, dtype, limit, capsys):
    assert export(ExportOptions(str(trained / "adapter"), str(tmp_path / "merged"), dtype=dtype)) == 0
    gap, moved = mean_gaps(trained, tmp_path / "merged", dtype)
    print(trained.name, dtype, gap, moved)
    assert gap <= limit and moved >= 0.5
    out = capsys.readouterr().out
    count = int(out.split(" of 20 greedy completions are the same")[0].split()[-1])
    assert out.count("  after ") == 20 - count  # each that differs is listed
    assert count == 20 or dtype != "float32"
    assert (
        "vllm serve" in out
        and ModelCard.load(str(tmp_path / "merged" / "README.md")).data.to_dict()["library_name"] == "transformers"
    )


def test_vllm_loads_the_merged_model(trained, tmp_path):
    merge_adapter(str(trained / "adapter"), tmp_path / "merged", dtype="float32")
    options = EngineOptions(kv_cache_gb=0.05, max_num_seqs=4)
    with torch.no_grad():
        engine = VLLMEngine(str(tmp_path / "merged"), 256, dtype="float32", options=options)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer("What is 1 + 1?")["input_ids"]
    ((_, completion),) = engine.stream([prompt], [0], SamplingSettings(8, 0.0))
    assert isinstance(completion, Completion)
    engine.close()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([prompt + list(completion.token_ids)])
    own = logps(model, ids)[len(prompt) - 1 :, 0]
    assert torch.allclose(own, torch.tensor(completion.logprobs), atol=1e-3)


def test_the_chat_template_that_was_trained_with_goes_along(trained, tmp_path):
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(trained / "base")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", dtype="float32")
    found: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == tokenizer.chat_template


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(trained, tmp_path):
    adapter = str(trained / "adapter")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="There is no dtype"):
        merge_adapter(adapter, out, dtype="int8")
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        merge_adapter(str(trained / "base"), out)
    base = AutoModelForCausalLM.from_pretrained(trained / "base", dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "new"
    )
    with pytest.raises(ValueError, match="changes nothing"):
        merge_adapter(str(tmp_path / "new"), out, base=str(trained / "base"))
    build_tokenizer(tmp_path / "other")
    Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "hidden_size": 32})).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="does not fit the model"):
        merge_adapter(adapter, out, base=str(tmp_path / "other"))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(adapter, out)
    assert (out / "mine.txt").read_text() == "kept"


def test_a_merge_that_is_not_base_plus_adapter_is_refused(trained, tmp_path, monkeypatch):
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())
    with pytest.raises(ValueError, match="are not base plus adapter"):
        merge_adapter(str(trained / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_reference_is_made_once_for_one_adapter(trained, tmp_path):
    adapter, base = str(trained / "adapter"), str(trained / "base")
    folder = merged_reference(adapter, base, None, tmp_path / "run" / "reference")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert merged_reference(adapter, base, None, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    other = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    move(other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="merged from another adapter"):
        merged_reference(str(tmp_path / "other"), base, None, folder)
