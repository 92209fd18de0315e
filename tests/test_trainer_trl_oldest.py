"""The tests in TRL's manner against the oldest TRL that `pyproject.toml` allows; the installed one is the newest."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TESTS = Path(__file__).parent
PYPROJECT = TESTS.parent / "pyproject.toml"


def oldest_supported() -> str:
    """The lower bound on TRL among the dependencies."""
    listed = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]["rollout"]
    (requirement,) = [one for one in map(Requirement, listed) if one.name == "trl"]
    (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return bound


def test_the_installed_trl_is_the_one_that_is_meant():
    """In the run below, the folder on the path must not be shadowed by what is installed."""
    import trl

    meant = os.environ.get("ASTARPO_TEST_TRL", trl.__version__)
    assert Version(trl.__version__) == Version(meant)


@pytest.mark.slow
@pytest.mark.skipif("ASTARPO_TEST_TRL" in os.environ, reason="this is the run with the oldest TRL")
def test_the_oldest_trl_passes_the_same_tests(tmp_path):
    oldest = oldest_supported()
    pip = [sys.executable, "-m", "pip"]
    asked = subprocess.run([*pip, "index", "versions", "trl"], capture_output=True, text=True)
    if asked.returncode:
        pytest.skip(f"pip reaches no index: {asked.stderr.strip().splitlines()[-1]}")
    command = [*pip, "install", "--quiet", "--no-deps", "--target", str(tmp_path / "trl"), f"trl=={oldest}"]
    subprocess.run(command, check=True)
    files = sorted(str(path) for path in TESTS.glob("test_trainer_trl*.py"))
    paths = [str(tmp_path / "trl"), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ASTARPO_TEST_TRL": oldest},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
