"""What installs and how it imports. `make check` looks at the direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "vllm", "trl", "sympy", "transformers", "datasets"]


def python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_importing_is_light(tmp_path):
    code = (
        "import sys, time; began = time.perf_counter()\n"
        "import astarpo.cli, astarpo.rollout, astarpo.trainer, astarpo.verifier\n"
        "print(time.perf_counter() - began)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    seconds, loaded = python(code, tmp_path).splitlines()
    assert float(seconds) < 1.0
    assert loaded == "[]"


def test_everything_exported_is_there(tmp_path):
    code = (
        "import astarpo as a, astarpo.rollout as r, astarpo.trainer as t, astarpo.verifier as v\n"
        "print([name for part in (a, r, t, v) for name in part.__all__ if not getattr(part, name)])\n"
        "print(a.AStarPOTrainer is t.AStarPOTrainer, a.ReferencePool is r.ReferencePool, a.__version__)"
    )
    missing, names = python(code, tmp_path).splitlines()
    assert missing == "[]" and names.startswith("True True 0.")


def test_grading_a_file_loads_no_model(tmp_path):
    """Neither `astarpo verify` nor `astarpo-verify` waits for torch, transformers or TRL."""
    (tmp_path / "in.jsonl").write_text('{"id": 1, "completion": "It is \\\\boxed{5}.", "gold": "5"}\n')
    for module in ("astarpo.__main__", "astarpo.verifier.__main__"):
        words = [*(["verify"] if module == "astarpo.__main__" else []), "--input", "in.jsonl", "--output", "out.jsonl"]
        code = (
            f"import sys, runpy; sys.argv[1:] = {words}\n"
            f"try: runpy.run_module('{module}', run_name='__main__')\n"
            f"except SystemExit as end: print(end.code, [name for name in {HEAVY} if name in sys.modules])"
        )
        assert python(code, tmp_path).splitlines()[-1] == "0 []"


def test_works_beside_a_users_own_trainer_module(tmp_path):
    (tmp_path / "trainer.py").write_text("raise SystemExit('the wrong trainer')\n")
    (tmp_path / "verifier.py").write_text("raise SystemExit('the wrong verifier')\n")
    code = "from astarpo.verifier import grade; print(grade('The answer is 5.', '5').correct)"
    assert python(code, tmp_path).strip() == "True"


def test_nothing_is_evaluated():
    for part in ("astarpo", "verifier", "rollout", "trainer", "tests", "benchmarks"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    assert getattr(node.func, "id", "") not in ("eval", "exec"), f"{path}:{node.lineno}"


def test_imports_inside_the_package_are_relative():
    for part in ("astarpo", "verifier", "rollout", "trainer"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert not (node.module or "").startswith("astarpo"), f"{path}:{node.lineno}"
