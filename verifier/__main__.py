"""`astarpo-verify`: grade a JSONL file of completions."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from .command_line import parse_command, run_command
from .grading import Outcome
from .pool import Verifier

BATCH = 256


@dataclass
class VerifyOptions:
    """What to grade.

    Args:
        input (`str`):
            JSONL file with `id`, `completion` and `gold` on each line.
        output (`str`):
            JSONL file for `id`, `outcome`, `correct`, `answer` and `seconds`.
        workers (`int`, *optional*, defaults to `1`):
            Grading processes.
        timeout_s (`float`, *optional*, defaults to `5.0`):
            Seconds that one item may take.
        memory_mb (`int`, *optional*, defaults to `2048`):
            Memory of one worker in MiB.
    """

    input: str = field(metadata={"help": "JSONL file with id, completion and gold on each line."})
    output: str = field(metadata={"help": "JSONL file for id, outcome, correct, answer and seconds."})
    workers: int = field(default=1, metadata={"help": "Grading processes."})
    timeout_s: float = field(default=5.0, metadata={"help": "Seconds that one item may take."})
    memory_mb: int = field(default=2048, metadata={"help": "Memory of one worker in MiB."})


def _items(path: Path, bad_lines: list[int]) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                yield {"id": item["id"], "completion": str(item["completion"]), "gold": str(item["gold"])}
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                print(f"{path}, line {number} skipped: {type(error).__name__}: {error}", file=sys.stderr)
                bad_lines.append(number)


def verify(options: VerifyOptions) -> int:
    """Grade a file; returns 1 when a line had to be skipped, else 0."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    source = Path(options.input)
    if not source.is_file():
        raise ValueError(f"Input file `{source}` does not exist. Check --input.")
    counts: Counter[Outcome] = Counter()
    bad_lines: list[int] = []
    items = _items(source, bad_lines)
    with (
        Verifier(options.workers, options.timeout_s, options.memory_mb) as verifier,
        Path(options.output).open("w", encoding="utf-8") as out,
        tqdm(desc="verify", unit=" items") as bar,
    ):
        while batch := list(islice(items, BATCH)):
            grades = verifier.grade_batch([item["completion"] for item in batch], [item["gold"] for item in batch])
            for item, grade in zip(batch, grades, strict=True):
                out.write(json.dumps({"id": item["id"], **grade.to_json()}, ensure_ascii=True) + "\n")
                counts[grade.outcome] += 1
            bar.update(len(batch))
    table = Table("outcome", "items", "share", title=f"{counts.total()} items in {source.name}")
    for outcome in Outcome:
        if counts[outcome]:
            table.add_row(outcome.value, str(counts[outcome]), f"{counts[outcome] / counts.total():.1%}")
    Console().print(table)
    if bad_lines:
        print(f"{len(bad_lines)} lines skipped, the first is line {bad_lines[0]}", file=sys.stderr)
    return 1 if bad_lines else 0


def main() -> None:
    """Entry point of `astarpo-verify`."""
    run_command(
        lambda: verify(
            *parse_command(
                [VerifyOptions],
                section="verify",
                prog="astarpo-verify",
                description="Grade completions against gold answers: which text is the answer, and is it right.",
            )
        )
    )


if __name__ == "__main__":
    main()
