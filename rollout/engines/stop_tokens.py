"""Which tokens end a completion."""

from typing import Any


def stop_token_ids(model: str, revision: str | None, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: those the model declares, and the tokenizer's (as TRL does)."""
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:  # a model folder need not have a generation_config.json
        declared = None
    ids = {declared} if isinstance(declared, int) else set(declared or [])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)
