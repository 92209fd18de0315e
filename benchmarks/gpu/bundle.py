"""Wheels, a model and this project in one folder, for a machine without a network.

    python benchmarks/gpu/bundle.py --output bundle --requirement vllm==0.24.0 --have torch==2.11.0 \\
        --python 3.12 --platform manylinux_2_28_x86_64 --model runs/models/SmolLM2-135M-Instruct --piece_mb 60

On the other machine `bash bundle/install.sh` puts the pieces together, checks them, and installs into the Python in use, asking no index.
What `--have` names is taken to be there already, with all that belongs to it, and is left out; torch decides which builds fit, so
name the version that is there. A model in GGUF (90 MB for SmolLM2-135M) is a third of the same in bfloat16.
"""

import argparse
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITH_TORCH = ("torch", "triton", "nvidia-*", "cuda-*")
"""Packages that come with torch."""
INSTALL = """#!/usr/bin/env bash
# Puts the pieces together, checks them, and installs the wheels into the Python in use (PYTHON=... names another). Asks no index.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
if ls pieces/bundle.tar.* >/dev/null 2>&1; then
  (cd pieces && sha256sum --quiet --check SHA256SUMS)
  cat pieces/bundle.tar.* | tar -x
fi
"$PYTHON" -m pip install --quiet --no-index --no-deps wheels/*.whl
echo "installed: $(ls wheels | wc -l) wheels"
"""


def resolve(
    requirements: Sequence[str], constraints: Sequence[str], target: Sequence[str], left_out: Sequence[str]
) -> list[str]:
    """The packages that are needed, each as `name==version`, without those that are there already.

    Args:
        requirements (`Sequence[str]`):
            What is wanted.
        constraints (`Sequence[str]`):
            Versions that are there already.
        target (`Sequence[str]`):
            pip's words for another Python or platform.
        left_out (`Sequence[str]`):
            Patterns of names.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, given = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        given.write_text("".join(f"{line}\n" for line in constraints))
        elsewhere = ["--target", f"{folder}/target"] if target else []  # pip wants one for another platform
        _pip(
            *("install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--report", str(report)),
            *("--constraint", str(given), *elsewhere, *target, *requirements),
        )
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    names = [(item["name"].lower().replace("_", "-"), item["version"]) for item in found]
    return [
        f"{name}=={version}"
        for name, version in names
        if not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)
    ]


def write_bundle(given: argparse.Namespace) -> list[str]:
    """Write the folder; returns the packages in it."""
    output: Path = given.output
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"error: {output} is not empty; remove it, or name another folder")
    wheels = output / "wheels"
    wheels.mkdir(parents=True)
    target = []
    if given.python:
        target += ["--python-version", given.python, "--implementation", "cp"]
    target += [word for platform in given.platform for word in ("--platform", platform)]
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    project = next(wheels.glob("astarpo-*.whl"))
    wanted = [*given.requirement, *([] if given.requirement_only else [str(project)])]
    there = [line.partition("==")[0].lower() for line in given.have]
    left_out = [*there, *(WITH_TORCH if "torch" in there else ()), "astarpo"]
    packages = resolve(wanted, given.have, target, left_out)
    if packages:
        only = ["--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
        _pip("download", *only, *target, *packages)
    if given.model:
        shutil.copytree(given.model, output / "model" / Path(given.model).name)
    install = output / "install.sh"
    install.write_text(INSTALL)
    install.chmod(0o755)
    if given.piece_mb:
        _cut(output, given.piece_mb)
    return packages


def _cut(output: Path, piece_mb: int) -> None:
    """Put wheels and model into one archive, in pieces of so many MB, with a file of their hashes."""
    pieces = output / "pieces"
    pieces.mkdir()
    archive = pieces / "bundle.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("wheels", "model"):
            if (output / name).is_dir():
                tar.add(output / name, name)
                shutil.rmtree(output / name)
    sums = []
    with archive.open("rb") as file:
        number = 0
        while piece := file.read(piece_mb * 10**6):
            path = pieces / f"bundle.tar.{number:03d}"
            path.write_bytes(piece)
            sums.append(f"{hashlib.sha256(piece).hexdigest()}  {path.name}\n")
            number += 1
    archive.unlink()
    (pieces / "SHA256SUMS").write_text("".join(sums))


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--requirement", nargs="*", default=[], help="what is wanted beside astarpo, such as vllm==0.24.0"
    )
    parser.add_argument("--requirement_only", action="store_true", help="not what astarpo's own package asks for")
    parser.add_argument("--have", nargs="*", default=[], help="packages that are there already, such as torch==2.11.0")
    parser.add_argument("--python", default="", help="version of the other Python, such as 3.12; default: this one's")
    parser.add_argument(
        "--platform", nargs="*", default=[], help="pip's names of the other platform; default: this one's"
    )
    parser.add_argument("--model", default="", help="folder of a model to take along")
    parser.add_argument("--piece_mb", type=int, default=0, help="cut into pieces of so many MB; default: do not")
    given = parser.parse_args()
    if given.python and not given.platform:
        parser.error("--python needs --platform, such as manylinux_2_28_x86_64")
    packages = write_bundle(given)
    size = sum(path.stat().st_size for path in given.output.rglob("*") if path.is_file())
    print(
        f"{given.output}: astarpo and {len(packages)} packages, {size / 1e6:.0f} MB; run {given.output}/install.sh there"
    )


if __name__ == "__main__":
    main()
