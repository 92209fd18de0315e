"""Two evaluations of the same problems, compared problem by problem."""

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .evaluation import Z95


@dataclass(frozen=True, slots=True)
class Comparison:
    """What changed from one evaluation to another.

    Attributes:
        before (`float`):
            Accuracy of the first, on the problems that both have.
        after (`float`):
            Accuracy of the second.
        difference (`float`):
            `after - before`.
        ci95 (`tuple[float, float]`):
            Paired 95 % interval of the difference over the choice of problems.
        num_problems (`int`):
            Problems that both have.
        gained (`tuple[str, ...]`):
            Questions that are answered more often now.
        lost (`tuple[str, ...]`):
            Questions that are answered less often now.
        differs (`dict[str, tuple[Any, Any]]`):
            Settings in which the evaluations differ beside the model and the adapter.
    """

    before: float
    after: float
    difference: float
    ci95: tuple[float, float]
    num_problems: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    differs: dict[str, tuple[Any, Any]]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def compare_reports(before: Path, after: Path) -> Comparison:
    """Compare two JSON reports of `astarpo eval`.

    Raises:
        ValueError: If one is no such report, or they have no problem in common.
    """
    reports = [_load(path) for path in (before, after)]
    rates = [_rates(report) for report in reports]
    shared = [problem for problem in rates[0] if problem in rates[1]]
    if not shared:
        raise ValueError(f"`{before}` and `{after}` have no problem in common, so there is nothing to compare.")
    pairs = [(fmean(rates[0][problem]), fmean(rates[1][problem])) for problem in shared]
    first, second = (fmean(column) for column in zip(*pairs, strict=True))
    return Comparison(
        before=first,
        after=second,
        difference=second - first,
        ci95=paired_interval(pairs),
        num_problems=len(shared),
        gained=tuple(question for (question, _), (a, b) in zip(shared, pairs, strict=True) if b > a),
        lost=tuple(question for (question, _), (a, b) in zip(shared, pairs, strict=True) if b < a),
        differs=_different(*(report.get("evaluated", {}) for report in reports)),
    )


def paired_interval(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """95 % interval of the mean difference of pairs, one pair a problem.

    Agresti and Min's for pairs of 0 and 1 (half a problem is added to each cell of the table), which stays honest where few problems
    changed; the normal one of the differences else.

    Args:
        pairs (`list[tuple[float, float]]`):
            Accuracy on each problem, before and after.
    """
    count = len(pairs)
    if all(rate in (0, 1) for pair in pairs for rate in pair):
        gained, lost = sum(b > a for a, b in pairs) + 0.5, sum(b < a for a, b in pairs) + 0.5
        total = count + 2
        middle = (gained - lost) / total
        half = Z95 * math.sqrt(gained + lost - (gained - lost) ** 2 / total) / total
    else:
        differences = [b - a for a, b in pairs]
        middle = fmean(differences)
        half = Z95 * stdev(differences) / math.sqrt(count) if count > 1 else 1.0
    return max(-1.0, middle - half), min(1.0, middle + half)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file `{path}`.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(report["samples"], list) and all("question" in sample for sample in report["samples"])
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"`{path}` is not a report of `astarpo eval` ({type(error).__name__}: {error}).") from error
    return report


def _rates(report: dict[str, Any]) -> dict[tuple[str, str], list[float]]:
    """Whether each sample of a problem is correct, by question and gold answer."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for sample in report["samples"]:
        found[sample["question"], sample["gold"]].append(float(sample["correct"]))
    return found


def _different(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two evaluations differ; another model or adapter is what one compares."""
    found = {}
    for part in ("data", "sampling"):
        one, other = before.get(part) or {}, after.get(part) or {}
        found |= {
            f"{part}.{name}": (one[name], other[name]) for name in one if name in other and one[name] != other[name]
        }
    if before.get("grader") != after.get("grader"):
        found["grader"] = before.get("grader"), after.get("grader")
    return found


def print_comparison(comparison: Comparison, show: int = 0) -> None:
    """Show a comparison as a table, with the first problems that were gained and lost."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    low, high = comparison.ci95
    console = Console()
    table = Table(title=f"{comparison.num_problems} problems", show_header=False)
    table.add_row("before", f"{comparison.before:.3f}")
    table.add_row("after", f"{comparison.after:.3f}")
    table.add_row("difference", f"{comparison.difference:+.3f}  (paired 95 % interval {low:+.3f} to {high:+.3f})")
    table.add_row("gained", str(len(comparison.gained)))
    table.add_row("lost", str(len(comparison.lost)))
    console.print(table)
    for name, (one, other) in comparison.differs.items():
        console.print(
            f"[yellow]{escape(name)} differs: {escape(str(one))} and {escape(str(other))}[/]", soft_wrap=True
        )
    for name, questions in (("gained", comparison.gained), ("lost", comparison.lost)):
        for question in questions[:show]:
            console.print(f"{name}: {escape(question)}", soft_wrap=True)
