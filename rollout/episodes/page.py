"""Episodes for people: in the terminal, and as a page."""

from html import escape as html_escape
from pathlib import Path
from typing import Any

from ..files import write_text
from .evaluation import EpisodeReport, EvaluatedEpisode

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}pre{white-space:pre-wrap;background:#f5f5f5;"
    "padding:.6rem}.right{color:#06732d}.wrong{color:#b00020}article{border-top:1px solid #ccc;margin-top:2rem}"
)
LINES = (
    ("Acc@t1", "acc_t1"),
    ("Acc@final", "acc_final"),
    ("Acc@final, PAG's own gate", "acc_final_official"),
    ("wrong to right", "improved"),
    ("right to wrong", "spoiled"),
    ("revised", "revise_rate"),
    ("of these with another answer", "answer_change"),
    ("verifier accuracy", "verifier_accuracy"),
    ("correct recall", "correct_recall"),
    ("wrong recall", "wrong_recall"),
    ("no verdict", "no_verdict"),
    ("best of n by the verifier", "best_of_n"),
    ("majority vote", "majority_vote"),
)


def figures(report: EpisodeReport) -> list[tuple[str, str]]:
    """The report's figures with their names."""
    found = [(name, getattr(report, field)) for name, field in LINES]
    return [(name, "-" if value is None else f"{value:.3f}") for name, value in found]


def turns(episode: EvaluatedEpisode) -> list[tuple[str, str, bool]]:
    """Headline, text and success of each turn that counts."""
    rows = [
        (f"Attempt: {episode.first_answer or 'no answer'}", episode.attempt, episode.first_right),
        (f"Verification: {episode.verdict}", episode.verification, episode.verdict_right),
    ]
    if episode.is_revised:
        headline = f"Revision: {episode.second_answer or 'no answer'}"
        rows.append((headline, episode.revision, episode.second_right))
    return rows


def print_episodes(report: EpisodeReport, output: str, show: int = 0) -> None:
    """Show the figures as a table, and the first episodes turn by turn."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for episode in report.episodes[: show * report.num_samples]:
        console.rule(f"[bold]{escape(episode.question)}[/] (gold {escape(episode.gold)})")
        for headline, text, is_right in turns(episode):
            console.print(f"[{'green' if is_right else 'red'}]{escape(headline)}[/]")
            console.print(escape(text), "\n")
    title = f"{report.num_problems} problems, {report.num_samples} episodes each, {report.verdict_parser} verdicts"
    table = Table(title=title, show_header=False)
    for name, value in figures(report):
        table.add_row(name, value)
    table.add_row("95 % interval of Acc@final", "{:.3f} to {:.3f}".format(*report.ci95))
    console.print(table)
    console.print(f"report: {output}")


def write_page(report: EpisodeReport, path: Path) -> None:
    """Write all episodes as one page of HTML."""
    rows = "".join(f"<tr><td>{html_escape(name)}</td><td>{value}</td></tr>" for name, value in figures(report))
    articles = "".join(_article(episode) for episode in report.episodes)
    write_text(
        path,
        f'<!doctype html><meta charset="utf-8"><title>PAG episodes</title><style>{STYLE}</style><h1>{report.num_problems} '
        f"problems, {report.num_samples} episodes each</h1><p>Verdict parser: {report.verdict_parser}</p><table>{rows}</table>"
        f"{articles}\n",
    )


def _article(episode: EvaluatedEpisode) -> str:
    parts: list[Any] = [f"<article><h2>{html_escape(episode.question)}</h2><p>Gold: {html_escape(episode.gold)}</p>"]
    for headline, text, is_right in turns(episode):
        kind = "right" if is_right else "wrong"
        parts.append(f'<h3 class="{kind}">{html_escape(headline)}</h3><pre>{html_escape(text)}</pre>')
    return "".join(parts) + "</article>"
