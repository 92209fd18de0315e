"""Math problems from the hub or from a file: which column is the question, which the gold answer."""

import csv
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verifier import extract_gold
from .files import text_hash
from .options import DataOptions
from .subset import LEVELS, SUBJECTS, spread_sample

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Message = dict[str, str]

QUESTION = "{question}"
"""Where a prompt template has the question."""
PROMPT_COLUMNS = ("prompt", "problem", "question")
GOLD_COLUMNS = ("gold", "answer", "final_answer", "solution")
FILES = (".jsonl", ".json", ".csv", ".parquet")
TRAINING_ROWS_OF_MATH = 7500


@dataclass(frozen=True, slots=True)
class Preset:
    """A data set known by name.

    Attributes:
        train (`tuple[str, str | None, str]`, *optional*):
            Hub id, config name and split to train on; None for a benchmark, which is not trained on.
        evaluation (`tuple[str, str | None, str]`):
            The same, to evaluate on.
    """

    train: tuple[str, str | None, str] | None
    evaluation: tuple[str, str | None, str]


PRESETS = {
    # Not `competition_math`: the widely used copy holds MATH's test problems in its only split.
    "math": Preset(("DigitalLearningGmbH/MATH-lighteval", None, "train"), ("HuggingFaceH4/MATH-500", None, "test")),
    "gsm8k": Preset(("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
    "math500": Preset(None, ("HuggingFaceH4/MATH-500", None, "test")),
    "aime24": Preset(None, ("math-ai/aime24", None, "test")),
    "aime25": Preset(None, ("math-ai/aime25", None, "test")),
    "amc23": Preset(None, ("math-ai/amc23", None, "test")),
    "minerva": Preset(None, ("math-ai/minervamath", None, "test")),
    "olympiadbench": Preset(None, ("math-ai/olympiadbench", None, "test")),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its gold answer.

    Attributes:
        messages (`tuple[Message, ...]`):
            The prompt as chat messages, system prompt included.
        gold (`str`):
            The gold answer.
    """

    messages: tuple[Message, ...]
    gold: str

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
    rows = _load_rows(dataset_name, dataset_config, split, for_evaluation)
    prompt_column = _pick_column(rows, dataset_name, "prompt", prompt_column, PROMPT_COLUMNS)
    gold_column = _pick_column(rows, dataset_name, "gold", gold_column, GOLD_COLUMNS)
    if limit is not None:
        columns = {name: rows[name] for name in (*SUBJECTS, *LEVELS) if name in rows.column_names}
        rows = rows.select(spread_sample(columns, len(rows), limit, limit_seed))
    problems = _problems(rows, prompt_column, gold_column, system_prompt)
    unique = list({problem.prompt_id: problem for problem in problems if problem.gold}.values())
    if not unique:
        raise ValueError(
            f"Data set `{dataset_name}` has no usable problem: {len(problems)} rows, none with a gold answer in column "
            f"`{gold_column}`. Check the file or choose another column with --gold_column."
        )
    missing = sum(not problem.gold for problem in problems)
    if len(unique) < len(problems):
        logger.warning(
            "%s: %d rows, skipped %d without a gold answer and %d exact repetitions",
            dataset_name,
            len(problems),
            missing,
            len(problems) - missing - len(unique),
        )
    return unique


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
    template = settings.pop("prompt_template")
    if template is not None:
        settings["system_prompt"] = None
        check_template(template)
    problems = load_problems(
        settings.pop("dataset_name"), split=settings.pop("dataset_split"), for_evaluation=for_evaluation, **settings
    )
    exclude = exclude or (options.dataset_name if options.dataset_name in PRESETS and not for_evaluation else None)
    if exclude is None:
        return with_template(problems, template)
    kept, removed = without_overlap(problems, load_problems(exclude, for_evaluation=True))
    if removed:
        logger.warning("Removed %d training problems that also appear in `%s`", removed, exclude)
    if not kept:
        raise ValueError(f"Every problem of `{options.dataset_name}` also appears in the evaluation set `{exclude}`.")
    return with_template(kept, template)


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
        Problem(({"role": "user", "content": template.replace(QUESTION, problem.question)},), problem.gold)
        for problem in problems
    ]


def import_rows(
    name: str, split: str | None, prompt_column: str | None, gold_column: str | None, system_prompt: str
) -> "tuple[Dataset, list[Problem]]":
    """The rows of a data set with published rewards, and the problem of each.

    Raises:
        ValueError: If the data set or a column is missing.
    """
    rows = _load_rows(name, None, split, for_evaluation=False)
    prompt_column = _pick_column(rows, name, "prompt", prompt_column, PROMPT_COLUMNS)
    gold_column = _pick_column(rows, name, "gold", gold_column, GOLD_COLUMNS)
    return rows, _problems(rows, prompt_column, gold_column, system_prompt)


def _problems(rows: "Dataset", prompt_column: str, gold_column: str, system_prompt: str | None) -> list[Problem]:
    """The problem of each row."""
    questions, golds = list(rows[prompt_column]), list(rows[gold_column])
    return [
        Problem(_messages(question, system_prompt), extract_gold(_gold_text(gold)))
        for question, gold in zip(questions, golds, strict=True)
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


def _load_rows(name: str, config: str | None, split: str | None, for_evaluation: bool) -> "Dataset":
    from datasets import Dataset, load_dataset

    if name in PRESETS:
        preset = PRESETS[name].evaluation if for_evaluation else PRESETS[name].train
        if preset is None:
            raise ValueError(
                f"`{name}` is a benchmark to evaluate on. To train name another data set, such as `math`."
            )
        name, config, split = preset[0], config or preset[1], split or preset[2]
    path = Path(name)
    if path.suffix in FILES:
        if not path.is_file():
            raise ValueError(f"Data file `{name}` does not exist (looked in {Path.cwd()}). Check --dataset_name.")
        return Dataset.from_list(_read_jsonl(path)) if path.suffix == ".jsonl" else _from_file(path)
    try:
        rows = load_dataset(name, config, split=split or ("test" if for_evaluation else "train"))
    except Exception as error:
        raise ValueError(
            f"Data set `{name}` could not be loaded from the hub ({type(error).__name__}: {error}). Check the id, "
            "--dataset_config, --dataset_split and the network, or give a local .jsonl, .csv or .parquet file."
        ) from error
    assert isinstance(rows, Dataset)
    if name.rpartition("/")[2] == "competition_math" and len(rows) > TRAINING_ROWS_OF_MATH:
        logger.warning(
            "%s has MATH's test problems in its only split, so MATH and MATH-500 would be trained on. Use `--dataset_name math`, which has the "
            "training problems alone.",
            name,
        )
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not valid JSON ({error}). Fix or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object. Each line must hold one.")
            rows.append(row)
    return rows


def _from_file(path: Path) -> "Dataset":
    from datasets import Dataset

    if path.suffix == ".csv":
        # As text: a gold answer of 007 is no number.
        with path.open(encoding="utf-8", newline="") as file:
            return Dataset.from_list(list(csv.DictReader(file)))
    rows = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_json(str(path))
    assert isinstance(rows, Dataset)
    return rows


def _pick_column(rows: "Dataset", name: str, role: str, asked: str | None, candidates: Sequence[str]) -> str:
    if len(rows) == 0:
        raise ValueError(f"Data set `{name}` is empty. Check the file or the split.")
    for column in [asked] if asked else candidates:
        if column in rows.column_names:
            return column
    wanted = f"`{asked}`" if asked else " or ".join(f"`{column}`" for column in candidates)
    raise ValueError(
        f"Data set `{name}` has no column {wanted} for the {role}; it has {', '.join(rows.column_names)}. "
        f"Name the right one with --{role}_column."
    )


def _messages(prompt: str | list[Message], system_prompt: str | None) -> tuple[Message, ...]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"A prompt without a user message: {messages!r}. Each prompt needs text or a user turn.")
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tuple(messages)
