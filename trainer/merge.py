"""An adapter merged into its base model: plain weights that any program loads, checked against base and adapter.

The merged weights are rounded to their type, so they are not exactly base plus adapter. How far apart the two are is measured on
greedy completions of the adapter, in float32 arithmetic: by their log-probs under both, and by whether the merged model writes the same.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..rollout.engines.interface import stop_token_ids
from ..rollout.engines.policy_link import adapter_folder
from ..rollout.engines.transformers_engine import left_padded
from ..rollout.files import folder_at_once
from ..rollout.prompts import load_tokenizer

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 48
"""Most tokens of a completion on which the merged weights are checked."""
LIMITS = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.01}
"""Largest mean |Δ log-prob| in nats that is still rounding; beyond it the merge is refused."""
PROMPTS = tuple(
    f"{question} Please reason step by step, and put your final answer within \\boxed{{}}."
    for question in (
        "What is 17 + 25?",
        "What is 144 / 12?",
        "What is 9 * 14?",
        "Solve x + 7 = 12.",
        "Solve 3x = 27.",
        "What is the square root of 81?",
        "What is 2 to the power of 10?",
        "What is 15% of 200?",
        "Simplify (x + 1)(x - 1).",
        "What is the derivative of x^2?",
        "How many sides does a hexagon have?",
        "What is the sum of the first 10 positive integers?",
        "Find the greatest common divisor of 24 and 36.",
        "Find the least common multiple of 4 and 6.",
        "Write 3/4 as a decimal.",
        "What is the area of a circle with radius 3?",
        "A train drives 120 km in 2 hours. How fast is it?",
        "Is 97 a prime number?",
        "What is the next number: 2, 4, 8, 16?",
        "If a dozen eggs cost 3 dollars, what do 4 eggs cost?",
    )
)


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """How far merged weights are from base and adapter, on greedy completions of the latter.

    Attributes:
        mean_gap (`float`):
            Mean |Δ log-prob| of a token in nats, teacher-forced.
        moved (`float`):
            Mean |Δ log-prob| between base and adapter on the same tokens: what the adapter does.
        differences (`tuple[tuple[str, str, str], ...]`):
            Prompt, completion of base and adapter, and completion of the merged weights, where these two differ.
        num_prompts (`int`):
            Prompts that were looked at.
    """

    mean_gap: float
    moved: float
    differences: tuple[tuple[str, str, str], ...]
    num_prompts: int


def merge_adapter(
    adapter: str, output_dir: Path, *, base: str | None = None, revision: str | None = None, dtype: str = "auto"
) -> MergeCheck:
    """Merge a LoRA adapter into its base model, check the result, and save it with the tokenizer.

    The merge is computed in float32, which takes 4 bytes a parameter of memory. Nothing is written unless the check passes.

    Args:
        adapter (`str`):
            Folder or hub id of the adapter.
        output_dir (`Path`):
            Folder for the merged model; must not be there yet.
        base (`str`, *optional*):
            Hub id or folder of the base model; the one that the adapter names when not given.
        revision (`str`, *optional*):
            Branch, tag or commit of the base model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `float16`, `bfloat16`, `float32`, or `auto`: as the base model is stored, and `bfloat16` where that is float32.

    Returns:
        [`MergeCheck`]: What the check found.

    Raises:
        ValueError: If the folder is there already, the adapter cannot be read or changes nothing, or the check fails.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"`{output_dir}` is not empty. Choose another --output_dir, or delete it.")
    if dtype not in ("auto", *LIMITS):
        raise ValueError(f"There is no dtype `{dtype}`. Choose auto, {', '.join(LIMITS)}.")
    folder = adapter_folder(adapter, "*token*", "*.jinja", "vocab*", "merges*")
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"`{folder}` is not an adapter: it has no adapter_config.json. Check --adapter.")
    name = base or str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path or "")
    if not name:
        raise ValueError("The adapter does not say which model it is for: name it with --model_name_or_path.")
    # The adapter's own where it has one: the trainer saves the chat template that it trained with.
    if (folder / "tokenizer_config.json").is_file():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise ValueError(f"The tokenizer beside the adapter in `{folder}` cannot be loaded: {error}") from error
    else:
        tokenizer = load_tokenizer(name, revision)
    model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto")
    stored = str(model.dtype).removeprefix("torch.")
    wanted = dtype if dtype != "auto" else "bfloat16" if stored == "float32" else stored
    model = model.float()
    try:
        policy: Any = PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(
            f"The adapter in `{folder}` does not fit the model `{name}`: {str(error).splitlines()[0]} Check --model_name_or_path."
        ) from error

    prompts = [_prompt_ids(text, tokenizer) for text in PROMPTS]
    ends = stop_token_ids(name, revision, tokenizer)
    completions = _greedy(policy, prompts, tokenizer, ends)
    with_adapter = [_logprobs(policy, *pair) for pair in zip(prompts, completions, strict=True)]
    with policy.disable_adapter():
        without = [_logprobs(policy, *pair) for pair in zip(prompts, completions, strict=True)]
    moved = _mean_gap(with_adapter, without)
    if moved == 0:
        raise ValueError(f"The adapter in `{folder}` changes nothing: it was saved before its first update.")

    merged = policy.merge_and_unload().to(getattr(torch, wanted))
    merged.config.dtype = getattr(torch, wanted)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    if output_dir.is_dir():
        output_dir.rmdir()
    with folder_at_once(output_dir) as scratch:
        merged.save_pretrained(str(scratch))
        tokenizer.save_pretrained(str(scratch))
        # What is on disk is what is checked, in the arithmetic of the other side: only the weights are rounded.
        found: Any = AutoModelForCausalLM.from_pretrained(str(scratch), dtype=wanted).float().eval()
        check = MergeCheck(
            mean_gap=_mean_gap(with_adapter, [_logprobs(found, *p) for p in zip(prompts, completions, strict=True)]),
            moved=moved,
            differences=tuple(
                (text, str(tokenizer.decode(said)), str(tokenizer.decode(now)))
                for text, said, now in zip(PROMPTS, completions, _greedy(found, prompts, tokenizer, ends), strict=True)
                if now != said
            ),
            num_prompts=len(PROMPTS),
        )
        if not check.mean_gap <= LIMITS[wanted]:
            raise ValueError(
                f"The merged weights are not base plus adapter: log-probs differ by {check.mean_gap:.4f} nats in the mean, {wanted} explains "
                f"{LIMITS[wanted]:g}. Nothing was written. Is `{name}` the model that was trained? Else try --dtype float32."
            )
    return check


def merged_reference(adapter: str, model: str | None, revision: str | None, folder: Path) -> Path:
    """The model that a training goes on from: `adapter` merged into its base, in `folder`; made once.

    Raises:
        ValueError: If the folder holds another adapter's merge.
    """
    from ..rollout.fingerprint import model_identity

    source = folder / "merged_from.txt"
    wanted = model_identity(str(adapter_folder(adapter)), None, ("adapter_*",))
    if folder.is_dir():
        if not source.is_file() or source.read_text(encoding="utf-8") != wanted:
            raise ValueError(
                f"`{folder}` holds a model that was merged from another adapter than `{adapter}`. Choose another --output_dir, or set "
                "--overwrite_output_dir true."
            )
        return folder
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as name:
        merged = Path(name) / "merged"
        check = merge_adapter(adapter, merged, base=model, revision=revision)
        (merged / source.name).write_text(wanted, encoding="utf-8")
        merged.rename(folder)
    logger.info(
        "merged `%s` into its base: %s (log-probs differ by %.4f nats in the mean)", adapter, folder, check.mean_gap
    )
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(text)["input_ids"])  # pyright: ignore[reportArgumentType]
    rendered: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
    )
    return list(rendered["input_ids"])


@torch.no_grad()
def _greedy(
    model: Any, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> list[list[int]]:
    """Greedy completions, all at once: on a CPU a token of twenty rows takes about as long as a token of one."""
    pad: Any = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    pad = 0 if pad is None else pad
    ids_BP, mask_BP = left_padded(prompts, pad)
    said_BT = model.generate(
        input_ids=ids_BP.to(model.device),
        attention_mask=mask_BP.to(model.device),
        max_new_tokens=CHECKED_TOKENS,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=ends or None,
        pad_token_id=pad,
    )[:, ids_BP.shape[1] :]
    lengths = [next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in said_BT.tolist()]
    return [row[:length] for row, length in zip(said_BT.tolist(), lengths, strict=True)]


@torch.no_grad()
def _logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probs of a completion's tokens, shape (T,)."""
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()


def _mean_gap(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return float((torch.cat(one) - torch.cat(other)).abs().mean())
