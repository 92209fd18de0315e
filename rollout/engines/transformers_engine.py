"""Plain transformers as an engine, for machines on which vLLM will not start. Several times slower."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..hardware import Hardware, tell
from ..options import EngineOptions
from .interface import Completion, EngineError, Failure, FinishReason, PolicyLink, SamplingSettings
from .isolation import isolate_failures
from .stop_tokens import stop_token_ids


class TransformersEngine:
    """Samples completions with `generate` of transformers, in batches of prompts of like length.

    Args:
        model (`str`):
            Hub id or folder.
        max_model_len (`int`):
            Most tokens of prompt and completion together.
        revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights.
        options ([`EngineOptions`], *optional*):
            `max_num_seqs` is the batch size.
        adapter (`str`, *optional*):
            Folder or hub id of a LoRA adapter; sampled with [`OwnAdapter`].
    """

    def __init__(
        self,
        model: str,
        max_model_len: int,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        options: EngineOptions | None = None,
        adapter: str | None = None,
    ):
        self.max_model_len = max_model_len
        self._batch_size = (options or EngineOptions()).sequences
        device = "cuda" if torch.cuda.is_available() else "cpu"
        hardware = Hardware.detect(dtype)
        tell(hardware)
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=hardware.dtype)
        # The model's own top_p, top_k and repetition penalty must not be mixed in.
        loaded.generation_config = GenerationConfig()
        self.stop_token_ids = stop_token_ids(model, revision, AutoTokenizer.from_pretrained(model, revision=revision))
        if adapter is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(loaded, adapter)
        self.model: Any = loaded.to(device).eval()

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt; see [`Engine.stream`]."""

        def run(indices: Sequence[int]) -> Iterator[tuple[int, Completion]]:
            by_length = sorted(indices, key=lambda index: len(prompts[index]))
            for start in range(0, len(by_length), self._batch_size):
                batch = by_length[start : start + self._batch_size]
                try:
                    completions = self._generate([prompts[i] for i in batch], [seeds[i] for i in batch], settings)
                except Exception as error:
                    raise EngineError(f"{type(error).__name__}: {error}", tuple(batch)) from error
                yield from zip(batch, completions, strict=True)

        if policy is not None:
            policy.sync()
        with policy.active() if policy is not None else self._reference():
            yield from isolate_failures(prompts, run)

    def _reference(self) -> Any:
        return self.model.disable_adapter() if hasattr(self.model, "peft_config") else nullcontext()

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: SamplingSettings
    ) -> list[Completion]:
        longest = max(map(len, prompts))
        if not all(prompts):
            raise ValueError("A prompt without tokens.")
        if longest + settings.max_completion_length > self.max_model_len:
            raise ValueError(f"A prompt of {longest} tokens and its completion exceed {self.max_model_len} tokens.")
        pad = self.stop_token_ids[0] if self.stop_token_ids else 0
        ids_BP, mask_BP = left_padded(prompts, pad)
        draw = SeededDraw(seeds, settings.temperature, self.model.device)
        output_BT = self.model.generate(
            input_ids=ids_BP.to(self.model.device),
            attention_mask=mask_BP.to(self.model.device),
            logits_processor=LogitsProcessorList([draw]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=settings.max_completion_length,
                eos_token_id=self.stop_token_ids or None,
                pad_token_id=pad,
            ),
        )[:, longest:]
        logprobs_BT = torch.stack(draw.logprobs, dim=1).tolist()
        rows = zip(output_BT.tolist(), logprobs_BT if settings.logprobs else [[]] * len(prompts), strict=True)
        return [self._cut(ids, logps) for ids, logps in rows]

    def _cut(self, token_ids: list[int], logprobs: list[float]) -> Completion:
        """A row without what stands after its first end-of-sequence token."""
        for position, token in enumerate(token_ids):
            if token in self.stop_token_ids:
                end = position + 1
                return Completion(tuple(token_ids[:end]), tuple(logprobs[:end]), FinishReason.STOP)
        return Completion(tuple(token_ids), tuple(logprobs), FinishReason.LENGTH)

    def close(self) -> None:
        """Free the model."""
        del self.model


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompts that end at the same place, each of shape (B, P)."""
    longest = max(map(len, prompts))
    ids_BP = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BP = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids_BP, mask_BP


class SeededDraw(LogitsProcessor):
    """Makes argmax a draw from softmax(logits / temperature), by Gumbel noise from a generator of each row's own.

    So a sample depends on its seed, and not on which prompts share its batch.

    Args:
        seeds (`Sequence[int]`):
            One seed per row.
        temperature (`float`):
            0 is greedy.
        device (`torch.device`):
            Where the logits are.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device):
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[torch.Tensor] = []
        """Log-probability of each drawn token, a tensor of shape (B,) per step."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of shape (B, V) whose argmax is the draw."""
        logps_BV = (scores.float() / (self._temperature or 1.0)).log_softmax(-1)
        drawn_BV: Any = logps_BV
        if self._temperature > 0:
            rows = zip(logps_BV, self._generators, strict=True)
            noise = [torch.empty_like(row).exponential_(generator=generator) for row, generator in rows]
            drawn_BV = logps_BV - torch.stack(noise).log()
        self.logprobs.append(logps_BV.gather(1, drawn_BV.argmax(-1, keepdim=True))[:, 0])
        return drawn_BV
