"""`astarpo-verify audit`: where a second, independent grader disagrees, with examples."""

import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .grading import Outcome
from .jsonl import ItemFile
from .pool import Verifier
from .second_opinion import second_opinion

BATCH = 256


@dataclass
class AuditOptions:
    """What to audit.

    Args:
        input (`str`):
            JSONL file with `id`, `completion` and `gold` on each line.
        output (`str`, *optional*):
            JSONL file for all disagreements.
        show (`int`, *optional*, defaults to `5`):
            Examples printed of each kind of disagreement.
        workers (`int`, *optional*, defaults to `1`):
            Grading processes.
        timeout_s (`float`, *optional*, defaults to `5.0`):
            Seconds that one item may take.
    """

    input: str = field(metadata={"help": "JSONL file with id, completion and gold on each line."})
    output: str | None = field(default=None, metadata={"help": "JSONL file for all disagreements."})
    show: int = field(default=5, metadata={"help": "Examples printed of each kind of disagreement."})
    workers: int = field(default=1, metadata={"help": "Grading processes."})
    timeout_s: float = field(default=5.0, metadata={"help": "Seconds that one item may take."})


def audit(options: AuditOptions) -> int:
    """Grade a file twice and report; returns 1 when a line had to be skipped, else 0."""
    from rich.console import Console
    from tqdm import tqdm

    source = ItemFile(Path(options.input))
    counts: Counter[tuple[Outcome, bool]] = Counter()
    examples: dict[tuple[Outcome, bool], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        verifier = stack.enter_context(Verifier(options.workers, options.timeout_s))
        out = stack.enter_context(Path(options.output).open("w", encoding="utf-8")) if options.output else None
        bar = stack.enter_context(tqdm(desc="audit", unit=" items", total=source.count()))
        for batch in source.batches(BATCH):
            grades = verifier.grade_batch([item.completion for item in batch], [item.gold for item in batch])
            for item, grade in zip(batch, grades, strict=True):
                equal, text = second_opinion(item.completion, item.gold)
                counts[grade.outcome, equal] += 1
                if equal == grade.correct:
                    continue
                row = {"id": item.id, "gold": item.gold, "outcome": grade.outcome.value, "answer": grade.answer}
                row |= {"second_opinion": "equal" if equal else "different", "second_answer": text}
                kind = examples.setdefault((grade.outcome, equal), [])
                if len(kind) < options.show:
                    kind.append(row)
                if out is not None:
                    out.write(json.dumps(row | {"completion": item.completion}) + "\n")
            bar.update(len(batch))
    Console().print(_summary(counts, source.path.name))
    if examples:
        Console().print(_examples(examples))
    return source.report()


def _summary(counts: Counter[tuple[Outcome, bool]], name: str):
    from rich.table import Table

    table = Table("verifier", "second: equal", "second: different", title=f"{counts.total()} items in {name}")
    for outcome in Outcome:
        equal, different = counts[outcome, True], counts[outcome, False]
        if equal or different:
            table.add_row(outcome.value, str(equal), str(different))
    disagreements = sum(count for (outcome, equal), count in counts.items() if equal != (outcome is Outcome.CORRECT))
    table.caption = (
        f"{disagreements} disagreements. `equal` but not correct: look for false negatives. `different` but correct: "
        "mostly equal answers in another form, which the second opinion cannot see."
    )
    return table


def _examples(examples: dict[tuple[Outcome, bool], list[dict[str, Any]]]):
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "verifier", "second", "gold", "verifier's answer", "second's answer", title="disagreements")
    for (_, equal), rows in sorted(examples.items(), key=lambda kind: not kind[0][1]):
        for row in rows:
            cells = (
                row["id"],
                row["outcome"],
                row["second_opinion"],
                row["gold"],
                row["answer"],
                row["second_answer"],
            )
            table.add_row(*(escape(str(cell)[:80]) for cell in cells), style="yellow" if equal else "")
    return table
