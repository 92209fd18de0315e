"""Rows of a data set: from the hub, from a file, or by the name of a preset."""

import csv
import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import file_hash

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

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


def source_of(name: str, config: str | None, split: str | None, for_evaluation: bool) -> dict[str, str | None]:
    """What a name stands for, as cards and reports state it: id, config and split on the hub, or the name and hash of a file."""
    if name in PRESETS:
        preset = PRESETS[name].evaluation if for_evaluation else PRESETS[name].train
        if preset is not None:
            name, config, split = preset[0], config or preset[1], split or preset[2]
    path = Path(name)
    if path.suffix in FILES:
        return {"file": path.name, "blake2b": file_hash(path) if path.is_file() else None}
    return {"id": name, "config": config, "split": split or ("test" if for_evaluation else "train")}


def load_rows(name: str, config: str | None, split: str | None, for_evaluation: bool) -> "Dataset":
    """The rows of a preset, a data set on the hub, or a file.

    Args:
        name (`str`):
            A preset, a hub id, or the path of a `.jsonl`, `.json`, `.csv` or `.parquet` file.
        config (`str`, *optional*):
            Config name on the hub.
        split (`str`, *optional*):
            Split on the hub; `train`, or `test` for an evaluation, when not given.
        for_evaluation (`bool`):
            Whether a preset's evaluation set is meant.

    Raises:
        ValueError: If there is no such data set, or a file cannot be read; the message names the fix.
    """
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
        return _from_file(path)
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


def _text(path: Path) -> str:
    """A file's text, without the byte order mark that Excel writes."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 ({error}). Save the file as UTF-8.") from error


def _read_csv(path: Path) -> list[dict[str, str | None]]:
    """All cells as text: a gold answer of 007 is no number."""
    rows, table = [], csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in table:
            if any(row.pop(None, None) or ()):  # an empty one is a comma at the end of the line
                raise ValueError(
                    f"{path}, line {table.line_num} has more cells than the header has names. Put a cell with a comma in double quotes."
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(
            f"Data file `{path}` cannot be read as csv, after line {table.line_num} ({error})."
        ) from error
    return rows


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON ({error}). Fix or remove the line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object. Each line must hold one.")
        rows.append(row)
    return _alike(rows)


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same columns, whose cells are text where some are text and others are numbers: Arrow takes neither mixture."""
    names = dict.fromkeys(name for row in rows for name in row)
    as_text = set()
    for name in names:
        kinds = {type(row[name]) for row in rows if row.get(name) is not None}
        if str in kinds and kinds <= {str, int, float}:
            as_text.add(name)
    return [
        {name: str(row[name]) if name in as_text and row.get(name) is not None else row.get(name) for name in names}
        for row in rows
    ]


def _from_file(path: Path) -> "Dataset":
    from datasets import Dataset

    read = {".csv": _read_csv, ".jsonl": _read_jsonl}.get(path.suffix)
    found = None if read is None else read(path)
    try:
        if found is not None:
            return Dataset.from_list(found)
        rows = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else Dataset.from_json(str(path))
    except Exception as error:
        raise ValueError(
            f"Data file `{path}` cannot be read as {path.suffix[1:]} ({type(error).__name__}: {str(error).splitlines()[0][:200]})."
        ) from error
    assert isinstance(rows, Dataset)
    return rows
