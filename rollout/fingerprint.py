"""What decides a sample: model, tokenizer, data, sampling, engine, verifier, as plain data that two runs can compare."""

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verifier.grading import RULES_VERSION
from .data import Problem, data_sources
from .engines.policy_link import adapter_folder
from .engines.start import engine_name
from .files import file_hash, text_hash
from .options import DataOptions, EngineOptions, ModelOptions
from .prompts import template_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .options import SampleOptions

SEED_SCHEME = "blake2b(seed, prompt_id, sample_index)"
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "generation_config.json")


def pool_fingerprint(
    model: ModelOptions,
    engine: EngineOptions,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    options: "SampleOptions",
) -> dict[str, Any]:
    """Everything that decides a sample of a pool; a pool is continued only by a run with an equal one."""
    systems = sorted({m["content"] for problem in problems for m in problem.messages if m["role"] == "system"})
    return {
        "model": model_identity(model.model_name_or_path, model.model_revision),
        # Of a folder only its own name: a published pool says nothing of the machine that made it.
        "model_name": Path(model.model_name_or_path).name
        if Path(model.model_name_or_path).is_dir()
        else model.model_name_or_path,
        "adapter": model_identity(str(adapter_folder(model.adapter)), None, ("adapter_*",)) if model.adapter else None,
        "dtype": model.dtype,
        "tokenizer": tokenizer_identity(tokenizer),
        "chat_template": text_hash(str(tokenizer.chat_template)),
        "system_prompt": systems[0] if len(systems) == 1 else systems,
        "data": text_hash("".join(problem.prompt_id for problem in problems)),
        "num_prompts": len(problems),
        "num_samples": options.num_samples,
        "max_completion_length": options.max_completion_length,
        "temperature": options.temperature,
        "require_eos": options.require_eos,
        "seed": options.seed,
        "seed_scheme": SEED_SCHEME,
        "engine": engine_name(engine),
        "verifier": verifier_name(),
        **({"logprobs": True} if options.logprobs else {}),
    }


def data_fields(data: DataOptions) -> dict[str, Any]:
    """What a pool's fingerprint says of its data beside the hash of the problems; only what is not the default, and where they come from."""
    fields: dict[str, Any] = {"sources": data_sources(data, for_evaluation=False)}
    if data.limit is not None:
        fields |= {"limit": data.limit, "limit_seed": data.limit_seed}
    if data.prompt_template is not None:
        fields |= {"prompt_template": data.prompt_template, "text_prompts": True}
    elif template_kwargs(data.chat_template_kwargs):
        fields["chat_template_kwargs"] = template_kwargs(data.chat_template_kwargs)
    return fields


def verifier_name() -> str:
    """The verifier and its version, as fingerprints name it."""
    return f"astarpo rules {RULES_VERSION}, math-verify {version('math-verify')}"


def model_identity(model: str, revision: str | None, patterns: Sequence[str] = _WEIGHTS) -> str:
    """What the weights are: the hash of a local folder's weights and config, or a hub id with its commit."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{_commit(model, revision) or revision or 'main'}"
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return "local " + text_hash(json.dumps([[file.name, _content(file)] for file in files]))


def _content(file: Path) -> str:
    state = file.stat()
    return _content_of(str(file), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _content_of(path: str, size: int, changed: int) -> str:
    """The hash of a file as it was then: gigabytes of weights are read once, not once a round."""
    return file_hash(Path(path))


def _commit(model: str, revision: str | None) -> str | None:
    """The commit that a hub id and a branch stand for now, as far as the local cache tells."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        cached = try_to_load_from_cache(model, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
    return None


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The hash of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return text_hash(json.dumps([tokenizer.get_vocab(), str(tokenizer.special_tokens_map)], sort_keys=True))
    content = json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # set by the last call, not by the tokenizer's files
        content.pop(state, None)
    return text_hash(json.dumps([content, str(tokenizer.special_tokens_map)], sort_keys=True))
