"""Plain transformers as an engine: where vLLM will not start, several times slower, and over the trainer's own model."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..hardware import Hardware, log_choices
from ..options import EngineOptions
from .interface import (
    Completion,
    EngineError,
    Failure,
    FinishReason,
    PolicyLink,
    SamplingSettings,
    isolate_failures,
    stop_token_ids,
)
from .slots import SlotDecoder, can_refill, sample


class TransformersEngine:
    """Samples completions with a transformers model. A row that has finished makes room for the next prompt ([`SlotDecoder`]); models with
    another cache than keys and values of every token (sliding windows, states) are sampled by `generate`, in batches of like length.

    It loads a model, or samples one that is ready on its device, such as the trainer's own. The trainer's model is the policy
    itself, so nothing has to be synced; the reference is the same model with its adapter off. Between two batches the caller
    finds that model as it left it: in the same mode, with the same generation config.

    Args:
        model (`str` or `torch.nn.Module`):
            Hub id or folder, or a model that is ready: a transformers model or a [`~peft.PeftModel`].
        max_model_len (`int`):
            Most tokens of prompt and completion together.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights that are loaded.
        options ([`EngineOptions`], *optional*):
            `max_num_seqs` is the batch size.
        adapter (`str`, *optional*):
            Folder or hub id of a LoRA adapter to load; sampled with [`OwnModelLink`].
        stop_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a completion; required with a ready model, looked up otherwise.

    Raises:
        ValueError: If a ready model comes without `stop_token_ids`.
    """

    def __init__(
        self,
        model: "str | torch.nn.Module",
        max_model_len: int,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        options: EngineOptions | None = None,
        adapter: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ):
        self.max_model_len = max_model_len
        self.max_num_seqs = (options or EngineOptions()).sequences
        if not isinstance(model, str):
            if stop_token_ids is None:
                raise ValueError("A ready model needs `stop_token_ids`: the tokens that end a completion.")
            self.model: Any = model
        else:
            self.model = _load(model, revision, dtype, adapter)
        self.stop_token_ids = _stop_token_ids(model, revision) if stop_token_ids is None else sorted(stop_token_ids)

    @property
    def kv_cache_tokens(self) -> None:
        """None: the KV cache lives as long as one batch."""

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt; see [`Engine.stream`]."""

        def check(indices: Sequence[int]) -> None:
            room = self.max_model_len - settings.max_completion_length
            wrong = tuple(index for index in indices if not 0 < len(prompts[index]) <= room)
            if wrong:
                raise EngineError(
                    f"A prompt of {len(prompts[wrong[0]])} tokens: prompts must have 1 to {room}, which leaves room for the completion in "
                    f"{self.max_model_len}.",
                    wrong,
                )

        def refilled(indices: Sequence[int]) -> Iterator[tuple[int, Completion]]:
            check(indices)
            base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            chosen = [prompts[i] for i in indices]
            decoder = SlotDecoder(
                base, chosen, [seeds[i] for i in indices], settings, self.stop_token_ids, self.max_num_seqs
            )
            while not decoder.is_done:
                try:
                    with policy.active() if policy is not None else self._reference(), _ready_to_generate(self.model):
                        finished = decoder.advance()
                except Exception as error:
                    in_flight = tuple(indices[place] for place in decoder.in_flight)
                    raise EngineError(f"{type(error).__name__}: {error}", in_flight) from error
                yield from ((indices[place], completion) for place, completion in finished)

        def in_batches(indices: Sequence[int]) -> Iterator[tuple[int, Completion]]:
            check(indices)
            by_length = sorted(indices, key=lambda index: len(prompts[index]))
            for start in range(0, len(by_length), self.max_num_seqs):
                batch = by_length[start : start + self.max_num_seqs]
                try:
                    with policy.active() if policy is not None else self._reference():
                        completions = self._generate([prompts[i] for i in batch], [seeds[i] for i in batch], settings)
                except Exception as error:
                    raise EngineError(f"{type(error).__name__}: {error}", tuple(batch)) from error
                yield from zip(batch, completions, strict=True)

        if policy is not None:
            policy.sync()
        yield from isolate_failures(prompts, refilled if can_refill(self.model.config) else in_batches)

    def _reference(self) -> Any:
        return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()

    # Not inference mode: what a model keeps from a forward pass (rotary frequencies that grow with the length) would be inference
    # tensors, which autograd refuses in the trainer's next backward pass.
    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings
    ) -> list[Completion]:
        longest = max(map(len, prompts))
        pad = self.stop_token_ids[0] if self.stop_token_ids else 0
        ids_BP, mask_BP = left_padded(prompts, pad)
        sampling = SeededSampling(seeds, settings.temperature, self.model.device, settings.top_p)
        with _ready_to_generate(self.model) as base:
            output_BT = base.generate(
                input_ids=ids_BP.to(self.model.device),
                attention_mask=mask_BP.to(self.model.device),
                logits_processor=LogitsProcessorList([sampling]),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=settings.max_completion_length,
                    eos_token_id=self.stop_token_ids or None,
                    pad_token_id=pad,
                    use_cache=True,
                ),
            )[:, longest:]
        logprobs_BT = torch.stack(sampling.logprobs, dim=1).tolist()
        rows = zip(output_BT.tolist(), logprobs_BT if settings.logprobs else [[]] * len(prompts), strict=True)
        return [self._completion(ids, logps) for ids, logps in rows]

    def _completion(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        """A row without what stands after its first end-of-sequence token."""
        for position, token in enumerate(token_ids):
            if token in self.stop_token_ids:
                end = position + 1
                return Completion(tuple(token_ids[:end]), tuple(logprobs[:end]), FinishReason.STOP)
        return Completion(tuple(token_ids), tuple(logprobs), FinishReason.LENGTH)

    def close(self) -> None:
        """Let go of the model."""
        del self.model


def _load(model: str, revision: str | None, dtype: str, adapter: str | None) -> Any:
    hardware = Hardware.detect(dtype)
    log_choices(hardware)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=hardware.dtype)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _stop_token_ids(model: Any, revision: str | None) -> list[int]:
    return stop_token_ids(model, revision, AutoTokenizer.from_pretrained(model, revision=revision))


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[Any]:
    """Yield the model on which to call `generate`, with everything set that would otherwise change the samples.

    Its adapter's layers are part of the base model, so `generate` is called there: PEFT's own puts the wrapper's generation
    config in the place of the base model's (peft/peft_model.py).
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # In training mode there is dropout, and with gradient checkpointing each layer throws its keys and values away
    # (transformers/modeling_layers.py), so every token would cost a pass over all tokens before it.
    in_training = [module for module in model.modules() if module.training]
    # `generate` fills in from the model's own generation config what ours leaves open (`_prepare_generation_config` in
    # transformers/generation/utils.py): top_p, top_k and repetition penalty must not be mixed in.
    own_config = base.generation_config
    # A `forward` that was replaced for scoring may hide its arguments, and `generate` reads from the signature what it may pass:
    # positions that leave padding out, and that logits are wanted for the last token alone.
    own_forward = vars(base).get("forward")
    model.eval()
    base.generation_config = GenerationConfig()
    if own_forward is not None:
        base.forward = functools.wraps(type(base).forward)(lambda *args, **kwargs: own_forward(*args, **kwargs))
    try:
        yield base
    finally:
        if own_forward is not None:
            base.forward = own_forward
        base.generation_config = own_config
        for module in in_training:
            module.training = True


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompts that end at the same place, each of shape (B, P)."""
    longest = max(map(len, prompts))
    ids_BP = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BP = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids_BP, mask_BP


class SeededSampling(LogitsProcessor):
    """Makes `generate`'s argmax sample as [`sample`] does.

    Args:
        seeds (`Sequence[int]`):
            One seed per row.
        temperature (`float`):
            0 is greedy.
        device (`torch.device`):
            Where the logits are.
        top_p (`float`, *optional*, defaults to `1.0`):
            As in [`sample`].
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device, top_p: float = 1.0):
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[torch.Tensor] = []
        """Log-probability of each sampled token, a tensor of shape (B,) per step."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of shape (B, V) whose argmax is the sampled token."""
        tokens, logprobs = sample(scores, self._generators, self._temperature, self._top_p)
        self.logprobs.append(logprobs)
        chosen: Any = torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
        return chosen
