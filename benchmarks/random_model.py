"""A model of any shape with random weights and a byte-level tokenizer, so that memory can be measured without a download."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

QWEN_1_5B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(folder: Path, sizes: dict[str, Any], dtype: torch.dtype) -> str:
    """Write a Qwen2 of the given sizes; one that is there already is kept."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config: Any = Qwen2Config(
            **{**sizes, "tie_word_embeddings": True, "eos_token_id": 2, "max_position_embeddings": 4096}
        )
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model: Any = Qwen2ForCausalLM(config)
        _write_tokenizer(folder)
        model.to(dtype).save_pretrained(folder)
    return str(folder)


def _write_tokenizer(folder: Path) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
