"""The wheel without extras: the grader alone, small and quick. Builds the wheel, so it needs pip to find setuptools and math-verify."""

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "trl", "pyarrow", "datasets", "ray", "vllm", "numpy")
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """An empty environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("light")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = folder.glob("astarpo-*.whl")
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    # From elsewhere: the checkout must not be importable.
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], cwd=folder, check=True)
    return python, built.stdout + built.stderr


def timed(python: Path, code: str, cwd: Path) -> tuple[float, str]:
    """The least of three times from the start of the process to its end, and what it printed."""
    seconds, said = [], ""
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([python, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
        said = done.stdout.strip()
    return min(seconds), said


def test_it_is_small_and_has_nothing_heavy(light):
    python, _ = light
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    size = sum(
        path.stat().st_size
        for path in packages.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not path.relative_to(packages).parts[0].startswith(NOT_OURS)
    )
    print(f"{size / 2**20:.1f} MB")
    assert size <= 60 * 2**20
    assert not [name for name in HEAVY if (packages / name).exists()]


def test_it_grades_at_once(light, tmp_path):
    python, _ = light
    code = "from astarpo.verifier import grade; print(grade({!r}, {!r}).correct)"
    exact, said = timed(python, code.format(r"so \boxed{\frac12}", "0.5"), tmp_path)
    assert said == "True"
    symbolic, said = timed(python, code.format(r"\boxed{(x+1)^2}", "x^2+2x+1"), tmp_path)
    print(f"exact {exact:.2f} s, symbolic {symbolic:.2f} s")
    assert said == "True"
    assert exact <= 0.5 and symbolic <= 3


def test_its_commands_say_which_extra_is_missing(light, tmp_path):
    python, _ = light
    command = python.parent / "astarpo"
    (tmp_path / "in.jsonl").write_text('{"id": 1, "completion": "\\\\boxed{5}", "gold": "5"}\n')
    graded = subprocess.run(
        [command, "verify", "--input", "in.jsonl", "--output", "out.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert graded.returncode == 0 and '"correct": true' in (tmp_path / "out.jsonl").read_text(), graded.stderr
    for words in (["train", "--help"], ["eval", "--model_name_or_path", "m"], ["pool", "summary", "x"]):
        ended = subprocess.run([command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and 'pip install "astarpo[' in ended.stderr, ended.stderr[-500:]
        assert "Traceback" not in ended.stderr
    reward = "from astarpo.verifier import math_reward; print(math_reward(['q'], ['The answer is 5.'], ['5']))"
    assert timed(python, reward, tmp_path)[1] == "[1.0]"


def test_building_it_warns_of_nothing(light):
    _, log = light
    assert not re.findall(r"Setuptools\w*Warning|is absent from the|PackageDiscoveryWarning|!!", log), log[-3000:]
