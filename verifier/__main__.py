"""`astarpo-verify`: grade a JSONL file of completions; `astarpo-verify audit`: ask for a second opinion."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .audit import AuditOptions, audit
from .command_line import parse_command, run_command
from .grading import Outcome
from .jsonl import ItemFile
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


def verify(options: VerifyOptions) -> int:
    """Grade a file; returns 1 when a line had to be skipped, else 0."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    source, target = ItemFile(Path(options.input)), Path(options.output)
    if target.exists() and target.samefile(source.path):
        raise ValueError(f"--output would overwrite --input `{source.path}`. Name another file.")
    if not target.parent.is_dir():
        raise ValueError(f"Folder `{target.parent}` of --output does not exist. Create it, or name another file.")
    counts: Counter[Outcome] = Counter()
    with (
        Verifier(options.workers, options.timeout_s, options.memory_mb) as verifier,
        target.open("w", encoding="utf-8") as out,
        tqdm(desc="verify", unit=" items", total=source.count()) as bar,
    ):
        for batch in source.batches(BATCH):
            grades = verifier.grade_batch([item.completion for item in batch], [item.gold for item in batch])
            for item, grade in zip(batch, grades, strict=True):
                out.write(json.dumps({"id": item.id, **grade.to_json()}) + "\n")
                counts[grade.outcome] += 1
            bar.update(len(batch))
    table = Table("outcome", "items", "share", title=f"{counts.total()} items in {source.path.name}")
    for outcome in Outcome:
        if counts[outcome]:
            table.add_row(outcome.value, str(counts[outcome]), f"{counts[outcome] / counts.total():.1%}")
    Console().print(table)
    return source.report()


def _audit_command() -> int:
    description = "Grade a file twice, the second time by normalised exact match, and show where the two disagree."
    words = sys.argv[2:]
    (options,) = parse_command(
        [AuditOptions], section="verify", prog="astarpo-verify audit", description=description, argv=words
    )
    return audit(options)


def _verify_command() -> int:
    description = (
        "Grade completions against gold answers: which text is the answer, and is it right. "
        "`astarpo-verify audit --help` is about a second opinion on the same file."
    )
    (options,) = parse_command([VerifyOptions], section="verify", prog="astarpo-verify", description=description)
    return verify(options)


def main() -> None:
    """Entry point of `astarpo-verify`."""
    run_command(_audit_command if sys.argv[1:2] == ["audit"] else _verify_command)


if __name__ == "__main__":
    main()
