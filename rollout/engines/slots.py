"""Decoding with transformers in which a row that has finished makes room for the next prompt.

`generate` decodes a batch until its longest completion ends, and all other rows wait. Here every row of a static cache has a length
of its own: the key and value of its next token go to its own column, and a mask hides the columns beyond. What all prompts of a call begin
with (a system prompt, examples) is computed once, and so is a prompt that several rows sample.

B rows of the cache, R rows of one pass, T tokens of one pass, C columns, V words.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..memory.formulas import PASS_TOKENS
from .attention import FOLDED
from .interface import Completion, FinishReason, SamplingSettings

LEAST_SHARED = 16
"""Tokens that prompts must have in common before they are computed apart."""
SDPAS = ("sdpa", "astarpo_sdpa")
"""Implementations of attention in whose place [`folded_sdpa`] decodes."""
ATTENTIONS = ("eager", *SDPAS)
"""Implementations of attention that take a mask of every row and column."""


def can_refill(config: Any) -> bool:
    """Whether a model's cache is keys and values of every token in every layer, and its attention takes any mask.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            The model's config.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    # Qwen2 has a `sliding_window` that `use_sliding_window` turns off; its `layer_types` tell. Others, such as Mistral, have no types.
    has_window = getattr(text, "layer_types", None) is None and getattr(text, "sliding_window", None) is not None
    return kinds == {"full_attention"} and not has_window and text._attn_implementation in ATTENTIONS


@dataclass(slots=True)
class _Window:
    """Where a pass writes: `rows` of shape (R,), `columns` of shape (R, T), and how many columns it looks at."""

    rows: torch.Tensor
    columns: torch.Tensor
    seen: int
    is_whole: bool


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, of shape (B, heads, C, D); see [`SlotDecoder`]."""

    is_sliding = False

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self._size = rows, columns
        self.window: _Window | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate; zeros, because a masked column still takes part with weight 0."""
        rows, columns = self._size
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the new columns, and return those that the pass looks at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        assert window is not None and self.keys is not None and self.values is not None
        rows = window.rows[:, None]
        self.keys[rows, :, window.columns] = key_states.transpose(1, 2)
        self.values[rows, :, window.columns] = value_states.transpose(1, 2)
        seen = self.keys[:, :, : window.seen], self.values[:, :, : window.seen]
        return seen if window.is_whole else (seen[0][window.rows], seen[1][window.rows])

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows only."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, columns: int) -> None:
        """Copy the first columns of rows to other rows."""
        assert self.keys is not None and self.values is not None
        self.keys[targets, :, :columns] = self.keys[sources, :, :columns]
        self.values[targets, :, :columns] = self.values[sources, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass looks at, and the first of them."""
        return (self.window.seen if self.window else query_length), 0

    def get_seq_length(self) -> int:
        """Columns that were looked at last."""
        return self.window.seen if self.window else 0

    def get_max_length(self) -> int:
        """Columns."""
        return self._size[1]


@dataclass(slots=True)
class _Row:
    """A prompt that is being answered: its place in the job, its seed's generator, and what was sampled."""

    index: int
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class SlotDecoder:
    """Answers prompts; `advance` returns what has finished, a few at a time.

    Between two calls of `advance` the model may be used for something else.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model for which [`can_refill`].
        prompts (`Sequence[Sequence[int]]`):
            Token ids.
        seeds (`Sequence[int]`):
            One seed a prompt.
        settings ([`SamplingSettings`]):
            Length and temperature.
        stops (`Sequence[int]`):
            Tokens that end a completion.
        max_rows (`int`):
            Most rows decoded at once.
        max_pass_tokens (`int`, *optional*, defaults to `8192`):
            Most prompt tokens of one pass.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        stops: Sequence[int],
        max_rows: int,
        max_pass_tokens: int = PASS_TOKENS,
    ):
        self._model, self._prompts, self._settings, self._stops = model, prompts, settings, frozenset(stops)
        self._seeds, self._device = seeds, model.device
        self._waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        self._rows: list[_Row | None] = [None] * min(max_rows, len(prompts))
        self._enough = max(1, len(self._rows) // 8)
        self._max_pass_tokens = max_pass_tokens
        columns = max(map(len, prompts)) + settings.max_completion_length
        layers = model.config.get_text_config().num_hidden_layers
        self._layers = [SlotLayer(len(self._rows), columns) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))
        self._tokens = torch.zeros(len(self._rows), dtype=torch.long, device=self._device)
        self._columns = torch.zeros(len(self._rows), dtype=torch.long, device=self._device)
        """The next token of each row, and the column that it goes to."""
        self._shared = _common(prompts) if len(prompts) > 1 else 0
        self._has_shared = self._shared == 0

    @property
    def in_flight(self) -> tuple[int, ...]:
        """Places of the prompts that are being answered."""
        return tuple(row.index for row in self._rows if row is not None)

    @property
    def is_done(self) -> bool:
        """Whether every prompt is answered."""
        return not self._waiting and not self.in_flight

    # Not inference mode: what a model keeps from a forward pass (rotary frequencies that grow with the length) would be inference
    # tensors, which autograd refuses in the trainer's next backward pass.
    @torch.no_grad()
    def advance(self) -> list[tuple[int, Completion]]:
        """Decode until an eighth of the rows has finished, and return (place, completion) of those."""
        if not self._has_shared:
            self._read_shared()
        self._fill()
        finished: list[tuple[int, Completion]] = []
        while self.in_flight and len(finished) < self._enough:
            finished += self._step()
        return finished

    def _read_shared(self) -> None:
        """Compute what all prompts begin with, for the first row, and copy it to the others."""
        columns = torch.arange(self._shared, device=self._device)[None]
        ids = torch.tensor([list(self._prompts[0][: self._shared])], device=self._device)
        self._forward(ids, torch.zeros(1, dtype=torch.long, device=self._device), columns)
        others = torch.arange(1, len(self._rows), device=self._device)
        for layer in self._layers:
            layer.copy(torch.zeros_like(others), others, self._shared)
        self._has_shared = True

    def _fill(self) -> None:
        """Give free rows to waiting prompts; where none waits, drop free rows once they are many."""
        free = [number for number, row in enumerate(self._rows) if row is None]
        if not self._waiting:
            if len(free) > len(self._rows) // 4 and len(free) < len(self._rows):
                self._keep([number for number, row in enumerate(self._rows) if row is not None])
            return
        taken = [(number, self._waiting.pop(0)) for number in free[: len(self._waiting)]]
        first: dict[tuple[int, ...], int] = {}
        copies: list[tuple[int, int]] = []
        for number, index in taken:
            prompt = tuple(self._prompts[index])
            self._rows[number] = _Row(index, torch.Generator(self._device).manual_seed(self._seeds[index]))
            # The last token is the first step's: then no logits of the prompt are wanted.
            self._tokens[number], self._columns[number] = prompt[-1], len(prompt) - 1
            if prompt in first:
                copies.append((first[prompt], number))
            first.setdefault(prompt, number)
        self._read([(number, prompt[self._shared : -1]) for prompt, number in first.items()])
        sources, targets = torch.tensor(copies, dtype=torch.long, device=self._device).reshape(-1, 2).T
        read = int(self._columns[targets].max()) if copies else 0
        for layer in self._layers if read else ():
            layer.copy(sources, targets, read)

    def _read(self, prompts: list[tuple[int, tuple[int, ...]]]) -> None:
        """Compute keys and values of prompts (row, token ids) after what is shared, longest first, in passes of bounded size.

        Padding stands at the right: no token of the row looks at it, and the completion overwrites it.
        """
        prompts = [(number, ids) for number, ids in prompts if ids]
        while prompts:
            longest = len(prompts[0][1])
            count = max(1, self._max_pass_tokens // longest)
            now, prompts = prompts[:count], prompts[count:]
            ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for _, ids in now], device=self._device)
            rows = torch.tensor([number for number, _ in now], device=self._device)
            columns = (self._shared + torch.arange(longest, device=self._device)).expand(len(now), longest)
            self._forward(ids, rows, columns)

    def _step(self) -> list[tuple[int, Completion]]:
        """Sample the next token of every row, and return the rows that ended with it."""
        everyone = torch.arange(len(self._rows), device=self._device)
        logits_BV = self._forward(self._tokens[:, None], everyone, self._columns[:, None])[:, -1]
        active = [number for number, row in enumerate(self._rows) if row is not None]
        rows = [row for row in self._rows if row is not None]
        chosen = torch.tensor(active, device=self._device)
        generators, settings = [row.generator for row in rows], self._settings
        tokens, logprobs = sample(logits_BV[chosen], generators, settings.temperature, settings.top_p)
        self._tokens[chosen] = tokens
        self._columns[chosen] += 1
        finished = []
        for number, row, token, logprob in zip(active, rows, tokens.tolist(), logprobs.tolist(), strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            is_stopped = token in self._stops
            if is_stopped or len(row.token_ids) == self._settings.max_completion_length:
                reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
                kept = tuple(row.logprobs) if self._settings.logprobs else ()
                finished.append((row.index, Completion(tuple(row.token_ids), kept, reason)))
                self._rows[number] = None
                self._columns[number] -= 1  # it stays within the cache until the row is given away
        return finished

    def _forward(self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits of the last token, of shape (R, 1, V); `ids` and `columns` of shape (R, T)."""
        seen = int(columns.max()) + 1
        window = _Window(rows, columns, seen, is_whole=len(rows) == len(self._rows))
        for layer in self._layers:
            layer.window = window
        mask = torch.arange(seen, device=self._device) <= columns[:, None, :, None]
        own = self._model.config._attn_implementation
        if own == "eager":  # which adds the mask to its scores
            lowest = torch.finfo(self._model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self._model.dtype, device=self._device).masked_fill_(~mask, lowest)
        if own in SDPAS:  # each layer looks its attention up by this name when it is called
            self._model.config._attn_implementation = FOLDED
        try:
            return self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=columns,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        finally:
            self._model.config._attn_implementation = own

    def _keep(self, numbers: list[int]) -> None:
        rows = torch.tensor(numbers, device=self._device)
        for layer in self._layers:
            layer.select(rows)
        self._rows = [self._rows[number] for number in numbers]
        self._tokens, self._columns = self._tokens[rows], self._columns[rows]


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, the last one of each left out; 0 where they are too few to be worth it."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    shared = min(sum(1 for _ in columns), min(map(len, prompts)) - 1)
    return shared if shared >= LEAST_SHARED else 0


def sample(
    logits: torch.Tensor, generators: Sequence[torch.Generator], temperature: float, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens from softmax(logits / temperature), by Gumbel noise from a generator of each row's own, and their log-probs.

    `torch.multinomial` samples all rows with one generator. Here a sample depends on its seed, and not on which prompts share its
    batch.

    Args:
        logits (`torch.Tensor`):
            Of shape (R, V).
        generators (`Sequence[torch.Generator]`):
            One a row.
        temperature (`float`):
            0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the likeliest tokens whose chances add up to at least this, and from no others.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Two tensors of shape (R,).
    """
    logps_RV = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p < 1:
        sorted_RV, order_RV = logps_RV.sort(descending=True)
        # A token stays where those before it have not reached top_p yet; the likeliest one always does.
        before_RV = sorted_RV.exp().cumsum(-1) - sorted_RV.exp()
        sorted_RV = sorted_RV.masked_fill(before_RV >= top_p, -torch.inf).log_softmax(-1)
        logps_RV = torch.empty_like(logps_RV).scatter_(1, order_RV, sorted_RV)
    noisy_RV = logps_RV
    if temperature > 0:
        noise_RV = torch.empty_like(logps_RV)
        for row, generator in zip(noise_RV, generators, strict=True):
            row.exponential_(generator=generator)
        noisy_RV = logps_RV - noise_RV.log_()
    tokens = noisy_RV.argmax(-1)
    return tokens, logps_RV.gather(1, tokens[:, None])[:, 0]
