"""What installs, how it imports, and the house limits."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("verifier", "rollout", "trainer", "tests") for path in (ROOT / part).rglob("*.py"))
HEAVY = ["torch", "vllm", "trl", "sympy", "transformers", "datasets"]


def python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_importing_is_light(tmp_path):
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "import astarpo.rollout, astarpo.trainer, astarpo.verifier\n"
        "print(time.perf_counter() - began)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    seconds, loaded = python(code, tmp_path).splitlines()
    assert float(seconds) < 1.0
    assert loaded == "[]"


def test_everything_exported_is_there(tmp_path):
    code = (
        "import astarpo.rollout as r, astarpo.trainer as t, astarpo.verifier as v\n"
        "print([name for part in (r, t, v) for name in part.__all__ if not getattr(part, name)])"
    )
    assert python(code, tmp_path).strip() == "[]"


def test_works_beside_a_users_own_trainer_module(tmp_path):
    (tmp_path / "trainer.py").write_text("raise SystemExit('the wrong trainer')\n")
    (tmp_path / "verifier.py").write_text("raise SystemExit('the wrong verifier')\n")
    code = "from astarpo.verifier import grade; print(grade('The answer is 5.', '5').correct)"
    assert python(code, tmp_path).strip() == "True"


@pytest.mark.parametrize("part", ["verifier", "rollout", "trainer"])
def test_imports_go_one_way(part):
    allowed = {"verifier": set(), "rollout": {"verifier"}, "trainer": {"verifier", "rollout"}}[part]
    for path in (ROOT / part).rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
                assert (node.module or "").split(".")[0] in allowed, f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not (node.module or "").startswith("astarpo"), f"{path}:{node.lineno} imports absolutely"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_keep_the_house_limits(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("eval", "exec")
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and not path.is_relative_to(ROOT / "tests"):
            body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name}: {lines} lines"
