"""Runs the install steps of a Dockerfile in a clean environment, without Docker.

    python docker/check_install.py docker/Dockerfile.cpu

The steps after `USER` are run as they stand there, in a fresh copy of the committed tree, by an unprivileged user (when this
is root) with an empty environment and home. Of the steps before it, which need root and the image's own system, only the
packages are checked: apt-get must know them. Exit code 1 names the step that failed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOBODY = 65534
KEPT = re.compile(r"(PIP|UV)_.*|.*_proxy", re.IGNORECASE)
"""Variables that say how packages are found here; a build would get them as arguments."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A Dockerfile's commands: those of root, those of the user, where the tree is copied to, what its arguments are by default, and
    what the image starts with."""

    as_root: tuple[str, ...]
    as_user: tuple[str, ...]
    tree: str
    arguments: dict[str, str]
    start: str


def read(dockerfile: Path) -> Steps:
    """The commands of a Dockerfile."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    as_root, as_user, user, tree, start = [], [], "root", ".", ""
    arguments: dict[str, str] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "USER":
            user = rest
        elif word == "RUN":
            (as_root if user == "root" else as_user).append(rest)
        elif word == "COPY":
            tree = rest.split()[-1]
        elif word == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value.strip('"')
        elif word == "CMD":
            start = " ".join(shlex.quote(part) for part in json.loads(rest))
    if user == "root":
        raise SystemExit(f"error: {dockerfile} ends as root; add a USER")
    return Steps(tuple(as_root), tuple(as_user), tree, arguments, start)


def check_packages(step: str) -> None:
    """Ask apt-get whether it knows the packages of an install command."""
    found = re.search(r"apt-get install ([^&]*)", step)
    if found is None or shutil.which("apt-get") is None:
        print(f"not checked (no apt-get here): {step[:80]}", flush=True)
        return
    packages = [word for word in found.group(1).split() if not word.startswith("-")]
    has_lists = subprocess.run(["apt-cache", "show", "make"], capture_output=True, check=False).returncode == 0
    for package in packages:
        known = subprocess.run(["apt-cache", "show", package], capture_output=True, check=False).returncode == 0
        installed = subprocess.run(["dpkg", "-s", package], capture_output=True, check=False).returncode == 0
        if has_lists and not known:
            raise SystemExit(f"error: apt-get knows no package `{package}`")
        state = "known" if known else "installed here" if installed else "not checked (apt-get has no lists here)"
        print(f"package {package}: {state}", flush=True)


def run_as_user(step: str, home: Path, arguments: dict[str, str]) -> int:
    """Run a step as the image would."""
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    environment = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **kept, **arguments}
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
    print(f"$ {step}", flush=True)
    return subprocess.run([*as_nobody, "bash", "-ec", step], cwd=home, env=environment, check=False).returncode


def main() -> None:
    """Check one Dockerfile."""
    dockerfile = Path(sys.argv[1]) if len(sys.argv) == 2 else None
    if dockerfile is None or not dockerfile.is_file():
        raise SystemExit("usage: python docker/check_install.py DOCKERFILE")
    steps = read(dockerfile)
    for step in steps.as_root:
        check_packages(step)
    with tempfile.TemporaryDirectory(prefix="astarpo-image-") as name:
        home = Path(name) / "home"
        folder = home / steps.tree
        folder.mkdir(parents=True)
        tree = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x"], cwd=folder, input=tree, check=True)
        if os.getuid() == 0:
            Path(name).chmod(0o755)
            subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(home)], check=True)
        works = (
            ".venv/bin/python -c 'import transformers, vllm, astarpo.trainer'",
            ".venv/bin/astarpo train --help > /dev/null",
            ".venv/bin/astarpo env",
        )
        for step in (*steps.as_user, *works):
            if run_as_user(step.replace("/home/astarpo", str(home)), home, steps.arguments):
                raise SystemExit(f"error: this step of {dockerfile} failed: {step}")
    print(f"{dockerfile}: every install step passed; the image starts with `{steps.start}`")


if __name__ == "__main__":
    main()
