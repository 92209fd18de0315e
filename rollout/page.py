"""Evaluations for people: a table in the terminal, and all samples as one page of HTML with filters."""

from html import escape as html_escape
from pathlib import Path

from .evaluation import Estimate, EvaluatedSample, EvaluatedTurn, EvaluationReport
from .files import write_text

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}pre{white-space:pre-wrap;background:#f5f5f5;"
    "padding:.6rem}.right{color:#06732d}.wrong{color:#b00020}article{border-top:1px solid #ccc;margin-top:2rem}"
    "nav{position:sticky;top:0;background:#fff;padding:.6rem 0;border-bottom:1px solid #ccc}nav label{margin-right:1rem}"
)
FILTERS = ("wrong", "changed", "truncated")
"""What an article can be, and a reader can ask for: its last answer is wrong, a turn changed the answer, a turn was truncated."""
SCRIPT = """
const boxes = [...document.querySelectorAll("nav input")], articles = [...document.querySelectorAll("article")];
function show() {
  const wanted = boxes.filter(box => box.checked).map(box => box.value);
  for (const one of articles) one.hidden = !wanted.every(name => one.classList.contains(name));
  document.getElementById("shown").textContent = articles.filter(one => !one.hidden).length + " of " + articles.length + " samples";
}
boxes.forEach(box => box.addEventListener("change", show));
show();
"""


def lines(report: EvaluationReport) -> list[tuple[str, str]]:
    """The report's metrics, named as in its JSON file."""
    k, (low, high) = report.num_samples, report.ci95
    found = [
        (f"avg@{k}", f"{report.avg_at_k:.3f}  (95 % interval {low:.3f} to {high:.3f})"),
        (f"pass@{k}", f"{report.pass_at_k:.3f}"),
    ]
    if k > 1:
        found += [(f"pass@{j}", _with_interval(report.pass_at[j])) for j in powers_of_two(k)]
        found.append((f"maj@{k}", _with_interval(report.maj_at_k)))
    found += [(name, "-" if value is None else f"{value:.3f}") for name, value in report.metrics.items()]
    found += [("truncated", f"{report.truncated:.1%}"), ("mean tokens", f"{report.mean_tokens:.1f}")]
    return found + [(outcome, str(count)) for outcome, count in sorted(report.outcomes.items())]


def powers_of_two(k: int) -> list[int]:
    """1, 2, 4 and so on below k: the pass@j that are shown, of all that the JSON file has."""
    return [2**power for power in range(k.bit_length()) if 2**power < k]


def _with_interval(estimate: Estimate) -> str:
    low, high = estimate.ci95
    return f"{estimate.value:.3f}  (95 % interval {low:.3f} to {high:.3f})"


def title(report: EvaluationReport) -> str:
    """What was evaluated, in one line."""
    what = f"{report.kind['episode']} episodes" if report.kind else "samples"
    return f"{report.num_problems} problems, {report.num_samples} {what} each"


def headline(turn: EvaluatedTurn, before: EvaluatedTurn | None) -> str:
    """A turn in one line: its role, its answer or its outcome, and whether the answer is another one than before."""
    said = turn.answer or turn.outcome
    notes = []
    if before is not None and turn.answer and before.answer:
        notes.append("answer unchanged" if turn.answer == before.answer else "answer changed")
    if turn.finish_reason == "length":
        notes.append("truncated")
    if not turn.counts:
        notes.append("not in training, not counted")
    return f"{turn.role.capitalize()}: {said}" + (f" ({', '.join(notes)})" if notes else "")


def headlines(sample: EvaluatedSample) -> list[tuple[str, EvaluatedTurn]]:
    """Each turn with its headline."""
    found, before = [], None
    for turn in sample.turns:
        found.append((headline(turn, before), turn))
        before = turn if turn.answer else before
    return found


def print_report(report: EvaluationReport, output: str, show: int = 0) -> None:
    """Show the metrics as a table, and the samples of the first `show` problems turn by turn."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for sample in report.samples[: show * report.num_samples]:
        console.rule(f"[bold]{escape(sample.question)}[/] (gold {escape(sample.gold)})")
        for line, turn in headlines(sample):
            console.print(f"[{'green' if turn.correct else 'red'}]{escape(line)}[/]")
            console.print(escape(turn.text), "\n")
    table = Table(title=title(report), show_header=False)
    for name, value in lines(report):
        table.add_row(name, value)
    console.print(table)
    console.print(f"report: {output}")


def write_page(report: EvaluationReport, path: Path) -> None:
    """Write all samples as one page of HTML."""
    named = [*lines(report), *((name, str(value)) for name, value in report.kind.items())]
    rows = "".join(f"<tr><td>{html_escape(name)}</td><td>{html_escape(value)}</td></tr>" for name, value in named)
    articles = "".join(_article(sample) for sample in report.samples)
    write_text(
        path,
        f'<!doctype html><meta charset="utf-8"><title>astarpo evaluation</title><style>{STYLE}</style>'
        f"<h1>{html_escape(title(report))}</h1><table>{rows}</table>{_filters()}{articles}<script>{SCRIPT}</script>\n",
    )


def _filters() -> str:
    boxes = "".join(f'<label><input type="checkbox" value="{name}"> {name}</label>' for name in FILTERS)
    return f'<nav>Only: {boxes}<span id="shown"></span></nav>'


def kinds_of(sample: EvaluatedSample) -> list[str]:
    """Which of `FILTERS` hold of a sample."""
    answers = [turn.answer for turn in sample.turns if turn.answer and turn.counts]
    is_truncated = any(turn.finish_reason == "length" for turn in sample.turns)
    holds = (not sample.correct, len(set(answers)) > 1, is_truncated)
    return [name for name, held in zip(FILTERS, holds, strict=True) if held]


def _article(sample: EvaluatedSample) -> str:
    names = " ".join(kinds_of(sample))
    parts = [
        f'<article class="{names}"><h2>{html_escape(sample.question)}</h2><p>Gold: {html_escape(sample.gold)}</p>'
    ]
    for line, turn in headlines(sample):
        name = "right" if turn.correct else "wrong"
        parts.append(f'<h3 class="{name}">{html_escape(line)}</h3><pre>{html_escape(turn.text)}</pre>')
    return "".join(parts) + "</article>"
