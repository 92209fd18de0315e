"""Math problems from the hub or from a file: which column is the question, which the gold answer."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..verifier import extract_gold
from .files import text_hash
from .options import ProblemOptions
from .rows import PRESETS, load_rows, source_of
from .subset import LEVELS, SUBJECTS, shares, spread_sample

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Message = dict[str, str]

QUESTION = "{question}"
"""Where a prompt template has the question."""
PROMPT_COLUMNS = ("prompt", "problem", "question")
GOLD_COLUMNS = ("gold", "answer", "final_answer", "solution")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its gold answer.

    Attributes:
        messages (`tuple[Message, ...]`):
            The prompt as chat messages, system prompt included.
        gold (`str`):
            The gold answer.
        columns (`Mapping[str, Any]`, *optional*):
            The other columns of its row, for reward functions. They are no part of what the problem is.
    """

    messages: tuple[Message, ...]
    gold: str
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def prompt_id(self) -> str:
        """Stable id of (messages, gold): equal questions with different answers stay apart."""
        content = json.dumps([list(self.messages), self.gold], ensure_ascii=False, sort_keys=True)
        return text_hash(content)

    @property
    def question(self) -> str:
        """Text of the last user message."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


def load_problems(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    split: str | None = None,
    for_evaluation: bool = False,
    prompt_column: str | None = None,
    gold_column: str | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
    limit_seed: int = 0,
) -> list[Problem]:
    """Load problems from a preset, a hub data set or a local file.

    Args:
        dataset_name (`str`):
            A preset of `PRESETS`, a hub id, or the path of a `.jsonl`, `.json`, `.csv` or `.parquet` file.
        dataset_config (`str`, *optional*):
            Config name of a hub data set.
        split (`str`, *optional*):
            Split; by default `train`, or `test` with `for_evaluation`, or the preset's own.
        for_evaluation (`bool`, *optional*, defaults to `False`):
            Whether a preset's evaluation set is meant.
        prompt_column (`str`, *optional*):
            Column of the question; found by name (`prompt`, `problem`, `question`) when not given. Text or messages.
        gold_column (`str`, *optional*):
            Column of the gold answer; found by name (`gold`, `answer`, `final_answer`, `solution`) when not given.
        system_prompt (`str`, *optional*):
            Put before each question, unless its messages already have one.
        limit (`int`, *optional*):
            Use only so many rows: a sample, spread over subjects and levels ([`spread_sample`]).
        limit_seed (`int`, *optional*, defaults to `0`):
            Seed of that sample.

    Returns:
        `list[Problem]`: The problems, without exact duplicates, in the data set's order.

    Raises:
        ValueError: If the data set, a column or all rows are missing; the message names the fix.
    """
    rows = load_rows(dataset_name, dataset_config, split, for_evaluation)
    return _usable(rows, dataset_name, prompt_column, gold_column, system_prompt, limit, limit_seed)


def _usable(
    rows: "Dataset",
    name: str,
    prompt_column: str | None,
    gold_column: str | None,
    system_prompt: str | None,
    limit: int | None,
    seed: int,
) -> list[Problem]:
    """The problems of some rows that have a question and a gold answer, each once."""
    prompt_column = _pick_column(rows, name, "prompt", prompt_column, PROMPT_COLUMNS)
    gold_column = _pick_column(rows, name, "gold", gold_column, GOLD_COLUMNS)
    asked = [number for number, prompt in enumerate(rows[prompt_column]) if prompt]
    if not asked:
        raise ValueError(
            f"Data set `{name}` has no question in column `{prompt_column}`. Check the file or choose another column with --prompt_column."
        )
    if len(asked) < len(rows):
        logger.warning("%s: skipped %d rows without a question", name, len(rows) - len(asked))
        rows = rows.select(asked)
    if limit is not None:
        columns = {name: rows[name] for name in (*SUBJECTS, *LEVELS) if name in rows.column_names}
        rows = rows.select(spread_sample(columns, len(rows), limit, seed))
    problems = _problems(rows, prompt_column, gold_column, system_prompt)
    unique = list({problem.prompt_id: problem for problem in problems if problem.gold}.values())
    if not unique:
        raise ValueError(
            f"Data set `{name}` has no usable problem: {len(problems)} rows, none with a gold answer in column "
            f"`{gold_column}`. Check the file or choose another column with --gold_column."
        )
    missing = sum(not problem.gold for problem in problems)
    if len(unique) < len(problems):
        logger.warning(
            "%s: %d rows, skipped %d without a gold answer and %d exact repetitions",
            name,
            len(problems),
            missing,
            len(problems) - missing - len(unique),
        )
    return unique


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of a mixture, under the names of TRL's `datasets:`.

    Attributes:
        path (`str`):
            A preset, a hub id, or a file.
        weight (`float`, *optional*):
            Its share of the problems, in proportion to the other weights; without weights all problems are used.
        name (`str`, *optional*):
            Config name on the hub.
        split (`str`, *optional*):
            Split on the hub.
        prompt_column, gold_column (`str`, *optional*):
            As for a single data set.
    """

    path: str
    weight: float | None = None
    name: str | None = None
    split: str | None = None
    prompt_column: str | None = None
    gold_column: str | None = None


def mixture_parts(given: Sequence[Any]) -> list[Part]:
    """The parts of a mixture, from `PATH=WEIGHT` of a command line or from the dictionaries of a recipe.

    Raises:
        ValueError: If a part is neither, has an unknown key or a bad weight, or if only some have a weight.
    """
    parts = []
    for one in given:
        if isinstance(one, Mapping):
            unknown = sorted(map(str, set(one) - set(Part.__slots__)))
            if unknown or "path" not in one:
                wrong = f"the key `{unknown[0]}`" if unknown else "no `path`"
                raise ValueError(f"A data set in `datasets` has {wrong}. It has the keys {', '.join(Part.__slots__)}.")
            part = Part(**one)
        else:
            path, equals, weight = str(one).rpartition("=")
            part = Part(path, _weight(weight)) if equals else Part(str(one))
        if part.weight is not None and not float(part.weight) > 0:
            raise ValueError(f"The weight of `{part.path}` must be above 0, got {part.weight}.")
        parts.append(part)
    weighted = [part for part in parts if part.weight is not None]
    if weighted and len(weighted) < len(parts):
        raise ValueError("Give every data set in `datasets` a weight, or none of them.")
    return parts


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"The weight `{text}` in `datasets` is not a number. Write PATH=WEIGHT, such as gsm8k=0.3."
        ) from None


def load_mixture(
    parts: Sequence[Part], *, system_prompt: str | None, limit: int | None = None, limit_seed: int = 0
) -> list[Problem]:
    """Load problems from several data sets, each problem once.

    With weights as many problems of each are taken as keep the proportions and repeat nothing: at most `limit`, else as many as there are.

    Args:
        parts (`Sequence[Part]`):
            The data sets.
        system_prompt (`str`, *optional*):
            Put before each question.
        limit (`int`, *optional*):
            Most problems of the mixture.
        limit_seed (`int`, *optional*, defaults to `0`):
            Seed of the choice; spread over subjects and levels, as for a single data set.

    Returns:
        `list[Problem]`: The problems, one data set after another.
    """
    rows = [load_rows(part.path, part.name, part.split, for_evaluation=False) for part in parts]
    sizes = [len(one) for one in rows]
    quotas = shares(sizes, [part.weight for part in parts], limit)
    problems: list[Problem] = []
    for part, own, size, quota in zip(parts, rows, sizes, quotas, strict=True):
        if quota == 0:
            raise ValueError(f"`{part.path}` would have no problem in the mixture. Raise --limit or its weight.")
        chosen = None if quota == size else quota
        problems += _usable(own, part.path, part.prompt_column, part.gold_column, system_prompt, chosen, limit_seed)
    return list({problem.prompt_id: problem for problem in problems}.values())


def load_from_options(options: ProblemOptions, *, for_evaluation: bool, exclude: str | None = None) -> list[Problem]:
    """Load the problems that `options` name.

    Args:
        options ([`ProblemOptions`]):
            Data set, columns, system prompt, limit.
        for_evaluation (`bool`):
            Whether a preset's evaluation set is meant.
        exclude (`str`, *optional*):
            An evaluation set whose problems must not be trained on; for a preset its own.

    Raises:
        ValueError: If no data set is named, or there is something wrong with it; the message names the fix.
    """
    template, system_prompt = options.prompt_template, options.system_prompt
    if template is not None:
        system_prompt = ""
        check_template(template)
    if (options.dataset_name is None) == (options.datasets is None):
        said = "both --dataset_name and --datasets" if options.datasets else "no data"
        raise ValueError(
            f"There is {said}: name a data set with --dataset_name (a preset such as math, a hub id, or a .jsonl, .csv or .parquet "
            "file), or several with --datasets PATH=WEIGHT."
        )
    if options.datasets is not None:
        if for_evaluation:
            raise ValueError("Evaluate one data set at a time: name it with --dataset_name.")
        parts = mixture_parts(options.datasets)
        problems = load_mixture(parts, system_prompt=system_prompt, limit=options.limit, limit_seed=options.limit_seed)
        names = [part.path for part in parts]
    else:
        assert options.dataset_name is not None
        problems = load_problems(
            options.dataset_name,
            dataset_config=options.dataset_config,
            split=options.dataset_split,
            for_evaluation=for_evaluation,
            prompt_column=options.prompt_column,
            gold_column=options.gold_column,
            system_prompt=system_prompt,
            limit=options.limit,
            limit_seed=options.limit_seed,
        )
        names = [options.dataset_name]
    if not for_evaluation:
        for name in [exclude] if exclude else [name for name in names if name in PRESETS]:
            held_out = held_out_problems(name, options.prompt_column, options.gold_column)
            problems = _without(problems, held_out, f"`{', '.join(names)}`", name)
    return with_template(problems, template)


def held_out_problems(
    name: str,
    prompt_column: str | None = None,
    gold_column: str | None = None,
    system_prompt: str | None = None,
    limit: int | None = None,
    limit_seed: int = 0,
) -> list[Problem]:
    """The problems of an evaluation set that stands beside a training set; the latter's columns need not be its own.

    Args:
        name (`str`):
            The evaluation set.
        prompt_column, gold_column (`str`, *optional*):
            The training set's columns, which are used where this set has them too.
        system_prompt (`str`, *optional*):
            Put before each question.
        limit, limit_seed (`int`, *optional*):
            As in [`load_problems`].
    """
    rows = load_rows(name, None, None, for_evaluation=True)
    prompt_column, gold_column = (
        column if column in rows.column_names else None for column in (prompt_column, gold_column)
    )
    return _usable(rows, name, prompt_column, gold_column, system_prompt, limit, limit_seed)


def _without(problems: list[Problem], held_out: list[Problem], own: str, name: str) -> list[Problem]:
    """The problems that are not in an evaluation set too; `own` and `name` are how messages call the two."""
    kept, removed = without_overlap(problems, held_out)
    if removed:
        logger.warning("Removed %d training problems that also appear in `%s`", removed, name)
    if not kept:
        raise ValueError(f"Every problem of {own} also appears in the evaluation set `{name}`.")
    return kept


def data_sources(options: ProblemOptions, for_evaluation: bool) -> list[dict[str, Any]]:
    """What was read, for reports, cards and pools: id, config and split of each data set, with its weight in a mixture."""
    if options.datasets is not None:
        return [
            source_of(part.path, part.name, part.split, for_evaluation)
            | ({} if part.weight is None else {"weight": part.weight})
            for part in mixture_parts(options.datasets)
        ]
    if options.dataset_name is None:
        return []
    return [source_of(options.dataset_name, options.dataset_config, options.dataset_split, for_evaluation)]


def check_template(template: str) -> None:
    """Raise a `ValueError` where a prompt template has no place for the question."""
    if QUESTION not in template:
        raise ValueError(
            f"--prompt_template has no {QUESTION}, so every prompt would be the same. Write it where the question goes."
        )


def with_template(problems: Sequence[Problem], template: str | None) -> list[Problem]:
    """Problems whose one message is the whole prompt, made from a template; the problems themselves without one.

    Args:
        problems (`Sequence[Problem]`):
            The problems.
        template (`str`, *optional*):
            Text in which the literal `{question}` is replaced.
    """
    if template is None:
        return list(problems)
    return [
        Problem(
            ({"role": "user", "content": template.replace(QUESTION, problem.question)},), problem.gold, problem.columns
        )
        for problem in problems
    ]


def import_rows(
    name: str, split: str | None, prompt_column: str | None, gold_column: str | None, system_prompt: str
) -> "tuple[Dataset, list[Problem]]":
    """The rows of a data set with published rewards, and the problem of each.

    Raises:
        ValueError: If the data set or a column is missing.
    """
    rows = load_rows(name, None, split, for_evaluation=False)
    prompt_column = _pick_column(rows, name, "prompt", prompt_column, PROMPT_COLUMNS)
    gold_column = _pick_column(rows, name, "gold", gold_column, GOLD_COLUMNS)
    return rows, _problems(rows, prompt_column, gold_column, system_prompt)


def _problems(rows: "Dataset", prompt_column: str, gold_column: str, system_prompt: str | None) -> list[Problem]:
    """The problem of each row."""
    return [
        Problem(
            _messages(row[prompt_column], system_prompt),
            extract_gold(_gold_text(row[gold_column])),
            {name: value for name, value in row.items() if name not in (prompt_column, gold_column)},
        )
        for row in rows.to_list()
    ]


def _gold_text(gold: Any) -> str:
    """A gold answer as text: several in a list are one answer with several values, None is none."""
    if gold is None:
        return ""
    return ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold)


def without_overlap(train: Sequence[Problem], evaluation: Sequence[Problem]) -> tuple[list[Problem], int]:
    """Remove from `train` the problems whose question also appears in `evaluation`.

    Returns:
        `tuple[list[Problem], int]`: The remaining training problems and how many were removed.
    """
    held_out = {_normalised(problem.question) for problem in evaluation}
    kept = [problem for problem in train if _normalised(problem.question) not in held_out]
    return kept, len(train) - len(kept)


def _normalised(question: str) -> str:
    return re.sub(r"\s+", " ", question).strip().casefold()


def _pick_column(rows: "Dataset", name: str, role: str, asked: str | None, candidates: Sequence[str]) -> str:
    if len(rows) == 0:
        raise ValueError(f"Data set `{name}` is empty. Check the file or the split.")
    there = [column for column in ([asked] if asked else candidates) if column in rows.column_names]
    if len(there) == 1:
        return there[0]
    if there:  # the fullest, and of equals the first: a stray `answer` in one row must not hide the `solution` of all
        return min(there, key=lambda column: sum(cell is None or cell == "" for cell in rows[column]))
    wanted = f"`{asked}`" if asked else " or ".join(f"`{column}`" for column in candidates)
    raise ValueError(
        f"Data set `{name}` has no column {wanted} for the {role}; it has {', '.join(rows.column_names)}. "
        f"Name the right one with --{role}_column."
    )


def _messages(prompt: str | list[Message], system_prompt: str | None) -> tuple[Message, ...]:
    if not isinstance(prompt, str | list):
        raise ValueError(f"A prompt must be text, or a list of messages, got {prompt!r}.")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"A prompt without a user message: {messages!r}. Each prompt needs text or a user turn.")
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tuple(messages)
