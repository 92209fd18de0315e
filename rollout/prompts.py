"""From messages to token ids, and the seeds of samples."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import Problem


def tokenize_prompts(
    problems: "Sequence[Problem]", tokenizer: "PreTrainedTokenizerBase", max_prompt_length: int | None = None
) -> list[list[int]]:
    """Render prompts through the tokenizer's own chat template.

    Args:
        problems (`Sequence[Problem]`):
            Problems to render.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with a chat template.
        max_prompt_length (`int`, *optional*):
            Longest prompt allowed, in tokens. A truncated prompt would be another problem, so a longer one is an error.

    Returns:
        `list[list[int]]`: Token ids of each prompt, generation prompt included.
    """
    require_chat_template(tokenizer)
    conversations: Any = [list(problem.messages) for problem in problems]
    rendered: Any = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=True)
    prompts: list[list[int]] = rendered["input_ids"]
    if max_prompt_length is not None:
        longest, question = max(
            zip((len(ids) for ids in prompts), (problem.question for problem in problems), strict=True)
        )
        if longest > max_prompt_length:
            count = sum(len(ids) > max_prompt_length for ids in prompts)
            raise ValueError(
                f"{count} of {len(prompts)} prompts are longer than {max_prompt_length} tokens (the longest has {longest}: "
                f"{question[:60]!r}...). Raise --max_prompt_length and --max_model_len, or leave those problems out."
            )
    return prompts


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a `ValueError` that names the fix when `tokenizer` has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of `{tokenizer.name_or_path}` has no chat template, so a prompt cannot be rendered. Use an "
            "instruct model, or save a template with the tokenizer (`tokenizer.chat_template = ...`)."
        )


def sample_seed(*parts: str | int) -> int:
    """A seed in [0, 2^63) that is a hash of `parts`, so that there is no generator state to save or to share."""
    content = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) >> 1
