r"""Where a second, independent grader disagrees with the verifier, with examples.

    python benchmarks/verifier_audit.py --input graded.jsonl

The second opinion is normalised exact match, in the style of the PRM800K grader. It shares no code with the verifier, on
purpose: where the two disagree, one of them is wrong. It knows no algebra, so it misses equal answers in other forms. It is
good at finding answers that the verifier wrongly rejects.
"""

import argparse
import json
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from astarpo.verifier import Outcome, Verifier
from astarpo.verifier.jsonl import ItemFile

BATCH = 256
_STATED = re.compile(r"(?:answer\s*(?:is|:)|####)\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DROPPED = (
    "\\left",
    "\\right",
    "\\displaystyle",
    "\\!",
    "\\,",
    "\\;",
    "\\:",
    "\\ ",
    "$",
    "\\%",
    "%",
    "\\$",
    "^\\circ",
    "^{\\circ}",
    "\\degree",
    "~",
)


def second_opinion(completion: str, gold: str) -> tuple[bool, str]:
    """Whether a completion's answer is the gold answer by normalised exact match, and the text that was compared.

    Args:
        completion (`str`):
            What the policy wrote.
        gold (`str`):
            The gold answer.
    """
    answer = _answer(completion)
    return normalise(answer) == normalise(gold) and bool(normalise(gold)), answer


def _answer(completion: str) -> str:
    """The last box; without one the last stated answer; without one the last number."""
    text = completion.rpartition("</think>")[2]
    _, box, after = text.rpartition("\\boxed{")
    if box:
        depth = 1
        for index, char in enumerate(after):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return after[:index]
        return ""
    stated = _STATED.findall(text)
    if stated:
        return stated[-1].strip().removesuffix(".")
    numbers = _NUMBER.findall(text[-2_000:])
    return numbers[-1] if numbers else ""


def normalise(answer: str) -> str:
    """One spelling for the usual ones: no spaces, sizes, units in words; `\\frac{a}{b}` for all fractions."""
    text = answer.strip()
    for mark in _DROPPED:
        text = text.replace(mark, "")
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{\s*([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"(?<=\d)\s*(?:[a-zA-Z]{2,}\.?\s*)+(?:\^\{?\d\}?)?$", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(
        r"^(-?)(\d*)\.(\d*?)0*$",
        lambda match: f"{match[1]}{match[2] or '0'}" + (f".{match[3]}" if match[3] else ""),
        text,
    )
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text


def audit(options: argparse.Namespace) -> int:
    """Grade a file twice and report; returns 1 when a line had to be skipped, else 0."""
    source = ItemFile(options.input)
    counts: Counter[tuple[Outcome, bool]] = Counter()
    examples: dict[tuple[Outcome, bool], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        verifier = stack.enter_context(Verifier(options.workers, options.timeout_s))
        out = stack.enter_context(options.output.open("w", encoding="utf-8")) if options.output else None
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


def main() -> int:
    """Read the command line and audit."""
    parser = argparse.ArgumentParser(description="Grade a file twice and show where the two verdicts disagree.")
    parser.add_argument("--input", type=Path, required=True, help="JSONL file with id, completion and gold")
    parser.add_argument("--output", type=Path, help="JSONL file for all disagreements")
    parser.add_argument(
        "--show", type=int, default=5, help="examples printed of each kind of disagreement (default: 5)"
    )
    parser.add_argument("--workers", type=int, default=1, help="grading processes (default: 1)")
    parser.add_argument("--timeout_s", type=float, default=5.0, help="seconds that one item may take (default: 5)")
    return audit(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
