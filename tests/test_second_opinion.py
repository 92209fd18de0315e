"""The audit of the verifier (`benchmarks/verifier_audit.py`), whose second grader shares no code with the verifier."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "verifier_audit.py"
second_opinion = runpy.run_path(str(PROGRAM))["second_opinion"]


@pytest.mark.parametrize(
    ("completion", "gold", "equal"),
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", True),
        (r"\boxed{1/2}", r"\frac{1}{2}", True),
        (r"\boxed{x = 5}", "5", True),
        (r"\boxed{5 \text{ cm}}", "5", True),
        (r"\boxed{1,234.50}", "1234.5", True),
        (r"\boxed{\left(1, 2\right)}", "(1,2)", True),
        (r"\boxed{\text{Even}}", "even", True),
        ("The answer is 42.", "42", True),
        ("It must be 42 then", "42", True),
        (r"<think>\boxed{5}</think> \boxed{6}", "5", False),
        (r"\boxed{7", "7", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", False),  # no algebra
        (r"\boxed{5}", "6", False),
        ("", "", False),
    ],
)
def test_normalised_exact_match(completion, gold, equal):
    assert second_opinion(completion, gold)[0] is equal


def test_it_is_independent_of_the_verifier():
    tree = ast.parse(PROGRAM.read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and "astarpo" in (node.module or "")]
    ours = {name.name for node in imports for name in node.names}
    graders = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in ("second_opinion", "_answer", "normalise")
    ]
    assert ours and len(graders) == 3
    used = {node.id for grader in graders for node in ast.walk(grader) if isinstance(node, ast.Name)}
    assert not used & ours


def test_audit_shows_where_a_second_opinion_differs(tmp_path):
    rows = [
        ("agreed", r"\boxed{\frac12}", r"\frac{1}{2}"),
        ("agreed wrong", r"\boxed{3}", "4"),
        ("other form", r"\boxed{\sqrt{50}}", r"5\sqrt{2}"),
        ("false negative?", "Perhaps 12.", "12"),
    ]
    lines = [json.dumps({"id": name, "completion": text, "gold": gold}) for name, text, gold in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, str(PROGRAM), "--input", "in.jsonl", "--output", "out.jsonl"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
    assert "2 disagreements" in finished.stdout
    assert "false" in finished.stdout
    differing = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["outcome"], row["second_opinion"]) for row in differing] == [
        ("other form", "correct", "different"),
        ("false negative?", "no_answer", "equal"),
    ]
