"""Common first steps of the commands: tokenizer and problems; everything that can fail early."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .data import PRESETS, Problem, load_problems, without_overlap
from .options import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def load_from_options(options: DataOptions, *, for_evaluation: bool, exclude: str | None = None) -> list[Problem]:
    """Load the problems that `options` name.

    Args:
        options ([`DataOptions`]):
            Data set, columns, system prompt, limit.
        for_evaluation (`bool`):
            Whether a preset's evaluation set is meant.
        exclude (`str`, *optional*):
            An evaluation set whose problems must not be trained on; for a preset its own.
    """
    settings = asdict(options)
    for own in ("max_prompt_length", "overlong_prompts"):
        settings.pop(own)
    problems = load_problems(
        settings.pop("dataset_name"), split=settings.pop("dataset_split"), for_evaluation=for_evaluation, **settings
    )
    exclude = exclude or (options.dataset_name if options.dataset_name in PRESETS and not for_evaluation else None)
    if exclude:
        problems, removed = without_overlap(problems, load_problems(exclude, for_evaluation=True))
        print(f"{removed} problems removed that stand in the evaluation set `{exclude}` too", flush=True)
        if not problems:
            raise ValueError(f"Every problem of `{options.dataset_name}` stands in the evaluation set `{exclude}`.")
    return problems
