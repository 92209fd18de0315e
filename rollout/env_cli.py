"""`astarpo env`: what this machine has and which engine it runs, for a bug report."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from ..cli import run_command
from .startup import Machine, judge, look

LIBRARIES = (
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "math-verify",
    "ray",
    "bitsandbytes",
    "deepspeed",
)


def lines(machine: Machine) -> list[str]:
    """The report, one fact a line."""
    gigabyte = 10**9
    gpus = ", ".join(machine.gpus) or "none that the driver sees"
    memory = (
        ""
        if machine.total_bytes is None or machine.free_bytes is None
        else (f", {machine.free_bytes / gigabyte:.1f} of {machine.total_bytes / gigabyte:.1f} GB free")
    )
    capability = (
        "" if machine.capability is None else f", compute capability {machine.capability[0]}.{machine.capability[1]}"
    )
    return [
        f"python          {platform.python_version()} on {platform.platform()}",
        f"NVIDIA driver   {machine.driver or 'none'}",
        f"GPUs            {gpus}{capability}{memory}{' (hidden by CUDA_VISIBLE_DEVICES)' if machine.is_hidden else ''}",
        f"torch           {machine.torch}, {_build(machine.torch_cuda)}, {'sees' if machine.torch_sees_gpu else 'sees no'} GPU",
        f"vllm            {'not installed' if machine.vllm is None else f'{machine.vllm}, {_build(machine.vllm_cuda)}'}",
        *(f"{name:<15} {found}" for name, found in _installed()),
    ]


def _build(cuda: str | None) -> str:
    return "CPU build" if cuda is None else f"built for CUDA {cuda}"


def _installed() -> list[tuple[str, str]]:
    found = []
    for name in ("astarpo", *LIBRARIES):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Entry point of `astarpo env`."""
    run_command(_main)


def _main() -> int:
    words = sys.argv[1:]
    if words and words[0] in ("-h", "--help"):
        print(
            "usage: astarpo env\n\nPrint driver, GPU, versions and the engine that runs here, for a bug report. Exit code 2: the GPU cannot be used."
        )
        return 0
    if words:
        raise ValueError(f"`astarpo env` takes no options, got `{words[0]}`.")
    machine = look()
    print("\n".join(lines(machine)))
    verdict = judge(machine)
    print(f"engine          {verdict.engine}{f': {verdict.note}' if verdict.note else ''}")
    return 0


if __name__ == "__main__":
    main()
