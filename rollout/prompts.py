"""The tokenizer, from messages to token ids, and the seeds of samples."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .data import Problem
    from .options import DataOptions

logger = logging.getLogger(__name__)


def load_tokenizer(model: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer; raises a `ValueError` that names the fix when the model is not there."""
    from transformers import AutoTokenizer

    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"`{model}` is a folder without config.json, so not a model. Check --model_name_or_path.")
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Model `{model}` could not be found: it is neither a folder here nor could it be fetched from the hub "
            f"({type(error).__name__}). Check --model_name_or_path, --model_revision and the network."
        ) from error


def template_kwargs(given: Any) -> dict[str, Any]:
    """Further arguments of the chat template, from JSON or from a recipe's dictionary.

    Raises:
        ValueError: If it is no JSON object.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(f"--chat_template_kwargs is not JSON: {given}") from None
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"--chat_template_kwargs must be a JSON object with the arguments' names, got {given!r}.")
    return dict(given or {})


def tokenize_prompts(
    problems: "Sequence[Problem]",
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Render prompts through the tokenizer's own chat template.

    Args:
        problems (`Sequence[Problem]`):
            Problems to render.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with a chat template.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the template.

    Returns:
        `list[list[int]]`: Token ids of each prompt, generation prompt included.
    """
    require_chat_template(tokenizer)
    conversations: Any = [list(problem.messages) for problem in problems]
    rendered: Any = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_dict=True, **(chat_template_kwargs or {})
    )
    return rendered["input_ids"]


def tokenize_texts(problems: "Sequence[Problem]", tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Token ids of prompts that are plain text, as base models take them: no chat template, only what the tokenizer itself adds."""
    rendered: Any = tokenizer([problem.question for problem in problems])
    return rendered["input_ids"]


def fitting_prompts(
    problems: "Sequence[Problem]", tokenizer: "PreTrainedTokenizerBase", options: "DataOptions"
) -> "tuple[list[Problem], list[list[int]]]":
    """The problems whose prompts are not longer than `options.max_prompt_length`, and the prompts.

    A prompt is never truncated: that would change the problem.

    Raises:
        ValueError: If a prompt is longer and `options.overlong_prompts` is `error`, or if none is left.
    """
    if options.prompt_template is not None:
        prompts = tokenize_texts(problems, tokenizer)
    else:
        prompts = tokenize_prompts(problems, tokenizer, template_kwargs(options.chat_template_kwargs))
    limit = options.max_prompt_length
    if limit is None:
        return list(problems), prompts
    kept = [(problem, ids) for problem, ids in zip(problems, prompts, strict=True) if len(ids) <= limit]
    if len(kept) < len(prompts):
        lengths = [len(ids) for ids in prompts]
        longest = problems[lengths.index(max(lengths))].question
        what = (
            f"{len(prompts) - len(kept)} of {len(prompts)} prompts are longer than {limit} tokens (the longest has "
            f"{max(lengths)}: {longest[:60]!r}...)"
        )
        if options.overlong_prompts == "error" or not kept:
            raise ValueError(f"{what}. Raise --max_prompt_length, or leave them out with --overlong_prompts skip.")
        logger.warning("%s; they are left out", what)
    return [problem for problem, _ in kept], [ids for _, ids in kept]


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a `ValueError` that names the fix when `tokenizer` has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of `{tokenizer.name_or_path}` has no chat template, so a prompt cannot be rendered. Use an "
            "instruct model, give a base model its prompt as text (--prompt_template), or save a template with the tokenizer "
            "(`tokenizer.chat_template = ...`)."
        )
