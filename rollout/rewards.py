"""Rewards of completions by TRL's reward functions: several, weighted, async, models, and None for no signal.

Suffixes name the dimensions: N answers of this process, F reward functions.
"""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

logger = logging.getLogger(__name__)

ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")
"""What reward functions are given beside the columns of the data set."""

RewardFunc = str | PreTrainedModel | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to grade.

    Attributes:
        row (`dict[str, Any]`):
            The row of the data set that it answers.
        text (`str`):
            What the model wrote.
        token_ids (`list[int]`):
            The same as tokens.
        is_truncated (`bool`):
            Whether it ended at the length limit.
    """

    row: dict[str, Any]
    text: str
    token_ids: list[int]
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class Rewards:
    """What the reward functions said of N answers.

    Attributes:
        per_function_NF (`torch.Tensor`):
            Rewards of shape (N, F), NaN for no signal.
        weighted_N (`torch.Tensor`):
            Their weighted sums, NaN where no function gives a signal.
        metrics (`dict[str, list[float]]`):
            What the functions logged with `log_metric`.
        extra (`dict[str, list[Any]]`):
            Columns that they logged with `log_extra`; only those with a value for every answer.
    """

    per_function_NF: torch.Tensor
    weighted_N: torch.Tensor
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class RewardFunctions:
    """Calls reward functions as [`~trl.GRPOTrainer`] does.

    Args:
        functions (`list[RewardFunc]`):
            Functions, coroutine functions, reward models, or the names of reward models.
        tokenizers (`Any`, *optional*):
            Tokenizers of the reward models, one per function (None for those that are no models).
        weights (`list[float]`, *optional*):
            One per function; 1 by default.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for reward models given by name.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the reward models' chat templates.
        device (`torch.device`):
            Where reward models run.

    Raises:
        ValueError: If there is no function, or the numbers of functions, weights and tokenizers differ.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunc],
        tokenizers: Any,
        weights: Sequence[float] | None,
        model_init_kwargs: dict[str, Any] | None,
        chat_template_kwargs: dict[str, Any] | None,
        device: torch.device,
    ):
        if not functions:
            raise ValueError("No reward function given. Pass `reward_funcs`, or leave it out for `math_reward`.")
        init = dict(model_init_kwargs or {})
        self.functions: list[Any] = [
            AutoModelForSequenceClassification.from_pretrained(one, num_labels=1, **init)
            if isinstance(one, str)
            else one
            for one in functions
        ]
        self.names = [_name_of(function) for function in self.functions]
        if weights is not None and len(weights) != len(functions):
            raise ValueError(
                f"Number of reward weights ({len(weights)}) must match number of reward functions ({len(functions)})."
            )
        self.weights_F = torch.tensor(weights if weights is not None else [1.0] * len(functions), dtype=torch.float32)
        given = tokenizers if isinstance(tokenizers, list) else [tokenizers] * (1 if tokenizers is not None else 0)
        given = given or [None] * len(functions)
        if len(given) != len(functions):
            raise ValueError(
                f"The number of reward processing classes ({len(given)}) must match the number of reward functions "
                f"({len(functions)})."
            )
        self._tokenizers = [
            _tokenizer_of(function, tokenizer, init.get("revision")) if isinstance(function, nn.Module) else tokenizer
            for function, tokenizer in zip(self.functions, given, strict=True)
        ]
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._device = device
        for function in self.functions:
            if isinstance(function, nn.Module):
                function.to(device).eval()
        # One loop for the life of the run: clients that a coroutine function keeps are bound to their loop.
        self._loop = _loop_in_thread() if any(map(_is_async, self.functions)) else None

    def __call__(self, answers: Sequence[Answer], require_eos: bool, trainer_state: Any) -> Rewards:
        """Grade answers; each is passed to every function once.

        Args:
            answers (`Sequence[Answer]`):
                The answers, at least one.
            require_eos (`bool`):
                Whether a truncated answer earns 0 (no signal stays none).
            trainer_state ([`~transformers.TrainerState`], *optional*):
                For functions that follow the progress of training.

        Raises:
            ValueError: If a function returns another number of rewards, or inf.
        """
        prompts = [answer.row["prompt"] for answer in answers]
        is_chat = isinstance(prompts[0], list)
        completions: list[Any] = [
            [{"role": "assistant", "content": answer.text}] if is_chat else answer.text for answer in answers
        ]
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        # Of several data sets only what all have: a pool's batch may mix their rows.
        shared = [name for name in answers[0].row if all(name in answer.row for answer in answers)]
        columns = [name for name in shared if name not in ("prompt", "completion", "completion_ids")]
        arguments: dict[str, Any] = {name: [answer.row[name] for answer in answers] for name in columns}
        arguments |= {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [answer.token_ids for answer in answers],
            "trainer_state": trainer_state,
            "log_metric": lambda name, value: metrics.setdefault(name, []).append(float(value)),
            "log_extra": lambda column, values: extra.setdefault(column, []).extend(values),
        }
        check_columns(self.functions, columns)
        rewards_NF = torch.full((len(answers), len(self.functions)), torch.nan)
        pending: list[tuple[int, Coroutine[Any, Any, Any]]] = []
        for number, function in enumerate(self.functions):
            if isinstance(function, nn.Module):
                rewards_NF[:, number] = self._by_model(function, self._tokenizers[number], prompts, completions)
            elif _is_async(function):
                pending.append((number, function(**arguments)))
            else:
                rewards_NF[:, number] = self._checked(number, function(**arguments), len(answers))
        for number, output in self._all(pending):
            rewards_NF[:, number] = self._checked(number, output, len(answers))
        if require_eos:
            truncated_N = torch.tensor([answer.is_truncated for answer in answers])
            rewards_NF[truncated_N[:, None] & ~rewards_NF.isnan()] = 0.0
        ungraded_N = rewards_NF.isnan().all(1)
        if ungraded_N.any():
            row = int(ungraded_N.nonzero()[0, 0])
            logger.debug("No reward function gave a signal for %r after %r.", completions[row], prompts[row])
        weighted_N = (rewards_NF * self.weights_F).nansum(1).masked_fill(ungraded_N, torch.nan)
        whole = {name: values for name, values in extra.items() if len(values) == len(answers)}
        return Rewards(rewards_NF, weighted_N, metrics, whole)

    @torch.inference_mode()
    def _by_model(self, model: nn.Module, tokenizer: Any, prompts: list[Any], completions: list[Any]) -> torch.Tensor:
        if isinstance(prompts[0], list):
            texts = [
                tokenizer.apply_chat_template([*prompt, *said], tokenize=False, **self._chat_template_kwargs)
                for prompt, said in zip(prompts, completions, strict=True)
            ]
        else:
            texts = [prompt + said for prompt, said in zip(prompts, completions, strict=True)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        return model(**inputs.to(self._device)).logits[:, 0].float().cpu()

    def _checked(self, number: int, output: Sequence[float | None], count: int) -> torch.Tensor:
        if len(output) != count:
            raise ValueError(
                f"The reward function '{self.names[number]}' returned {len(output)} rewards, but {count} were expected, one "
                "per completion."
            )
        rewards_N = torch.tensor([torch.nan if reward is None else float(reward) for reward in output])
        if rewards_N.isinf().any():
            raise ValueError(
                f"Reward function {self.names[number]} returned inf. Rewards must be finite, or None for no signal."
            )
        return rewards_N

    def _all(self, pending: list[tuple[int, Coroutine[Any, Any, Any]]]) -> list[tuple[int, Any]]:
        """The results of all coroutines, which run at the same time."""
        if not pending:
            return []
        assert self._loop is not None

        async def gathered() -> list[Any]:
            return await asyncio.gather(*(coroutine for _, coroutine in pending))

        outputs = asyncio.run_coroutine_threadsafe(gathered(), self._loop).result()
        return [(number, output) for (number, _), output in zip(pending, outputs, strict=True)]


def _loop_in_thread() -> asyncio.AbstractEventLoop:
    """An event loop in a daemon thread: a notebook's main thread has one that is running already."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="astarpo-rewards", daemon=True).start()
    return loop


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def check_columns(functions: Sequence[Any], columns: Sequence[str], where: str = "the data set") -> None:
    """Raise a `ValueError` where a reward function asks for a column that a data set does not have.

    Args:
        functions (`Sequence[Any]`):
            The reward functions; models ask for none.
        columns (`Sequence[str]`):
            Columns of the data set.
        where (`str`, *optional*):
            How the message names the data set.
    """
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # a model's name, or a builtin
            continue
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        wanted = [one.name for one in parameters if one.kind in named and one.default is inspect.Parameter.empty]
        missing = [name for name in wanted if name not in (*columns, *ALWAYS)]
        if missing and not hasattr(function, "config"):
            name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
            raise ValueError(
                f"The reward function `{name}` asks for `{missing[0]}`, which is no column of {where}. It has: {', '.join(columns)}."
            )


def _name_of(function: Any) -> str:
    if isinstance(function, nn.Module):
        return str(function.config._name_or_path).split("/")[-1]  # pyright: ignore
    function = getattr(function, "func", function)  # functools.partial
    return getattr(function, "__name__", type(function).__name__)


def _tokenizer_of(model: Any, tokenizer: Any, revision: str | None) -> Any:
    """A reward model's tokenizer, with a padding token that the model knows: it rewards the last token that is no padding."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer
