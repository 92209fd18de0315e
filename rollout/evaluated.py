"""What an evaluation was of, as its report names it: whoever reads the numbers can repeat them."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cards import installed_versions
from .data import Problem, data_sources
from .engines.policy_link import adapter_folder
from .engines.start import engine_name
from .files import text_hash
from .fingerprint import model_identity, tokenizer_identity, verifier_name
from .options import DataOptions, EngineOptions, EvaluateOptions, ModelOptions
from .prompts import template_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluated_with(
    model: ModelOptions,
    data: DataOptions,
    options: EvaluateOptions,
    engine: EngineOptions,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
) -> dict[str, Any]:
    """Model, adapter, data, sampling, grader and versions of an evaluation, as plain data.

    Args:
        model ([`ModelOptions`]):
            Model and adapter.
        data ([`DataOptions`]):
            Data set and prompts.
        options ([`EvaluateOptions`]):
            Sampling.
        engine ([`EngineOptions`]):
            The engine that sampled.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        problems (`Sequence[Problem]`):
            What was asked.
    """
    adapter = None
    if model.adapter is not None:
        identity = model_identity(str(adapter_folder(model.adapter)), None, ("adapter_*",))
        adapter = {"name": model.adapter, "identity": identity}
    return {
        "model": {
            "name": model.model_name_or_path,
            "revision": model.model_revision,
            "identity": model_identity(model.model_name_or_path, model.model_revision),
            "dtype": model.dtype,
            "tokenizer": tokenizer_identity(tokenizer),
            "chat_template": text_hash(str(tokenizer.chat_template)),
        },
        "adapter": adapter,
        "data": {
            "sources": data_sources(data, for_evaluation=True),
            "num_problems": len(problems),
            "fingerprint": text_hash("".join(problem.prompt_id for problem in problems)),
            "limit": data.limit,
            "limit_seed": data.limit_seed,
            "system_prompt": None if data.prompt_template is not None else data.system_prompt,
            "prompt_template": data.prompt_template,
            "chat_template_kwargs": template_kwargs(data.chat_template_kwargs),
        },
        "sampling": {
            "num_samples": options.num_samples,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_completion_length": options.max_completion_length,
            "require_eos": options.require_eos,
            "seed": options.seed,
            "engine": engine_name(engine),
        },
        "grader": verifier_name(),
        "versions": {"python": sys.version.split()[0]} | installed_versions(),
    }
