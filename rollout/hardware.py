"""What this machine's GPU can do, and what is chosen because of it."""

import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BF16_CAPABILITY = (8, 0)
"""First compute capability with bf16 arithmetic, tensor cores for Triton's kernels and FlashAttention-2."""
KERNEL_CONFIGS = Path(__file__).parent / "engines" / "kernels"
"""Sizes of vLLM's LoRA kernels (vllm/lora/ops/triton_ops/) that do not spill registers on a T4; its own defaults do."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """A GPU, or none.

    Attributes:
        name (`str`):
            The GPU's name; `"CPU"` without one.
        capability (`tuple[int, int]`, *optional*):
            Its compute capability.
        dtype (`str`):
            Type of the weights: what was asked for, and `float16` where bf16 arithmetic is missing.
        attention_backend (`str`, *optional*):
            vLLM's attention kernels; None leaves it to vLLM.
        tuned_kernels (`Path`, *optional*):
            Folder with sizes for vLLM's LoRA kernels.
        reasons (`tuple[str, ...]`):
            What was chosen and why, one sentence each.
    """

    name: str
    capability: tuple[int, int] | None
    dtype: str
    attention_backend: str | None = None
    tuned_kernels: Path | None = None
    reasons: tuple[str, ...] = ()

    @classmethod
    def detect(cls, dtype: str = "auto") -> "Hardware":
        """Look at the first visible GPU.

        Args:
            dtype (`str`, *optional*, defaults to `"auto"`):
                Type of the weights that was asked for.

        Raises:
            ValueError: If that type needs a newer GPU.
        """
        import torch

        if not torch.cuda.is_available():
            return cls("CPU", None, dtype)
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        if capability >= BF16_CAPABILITY:
            return cls(name, capability, dtype)
        if dtype == "bfloat16":
            raise ValueError(
                f"dtype=bfloat16, but {name} has no bf16 arithmetic (it needs compute capability 8.0, this is "
                f"{capability[0]}.{capability[1]}). Set --dtype float16, or leave it out."
            )
        is_older = f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        reasons = [f"TRITON_ATTN for attention: vLLM's other kernels do not run here or are slower, {is_older}"]
        if dtype == "auto":
            reasons.insert(0, f"float16 weights: {is_older}, so there is no bf16 arithmetic")
        chosen = "float16" if dtype == "auto" else dtype
        return cls(name, capability, chosen, "TRITON_ATTN", KERNEL_CONFIGS, tuple(reasons))

    def engine_arguments(self) -> dict[str, Any]:
        """vLLM's arguments that follow from the GPU."""
        return {"attention_backend": self.attention_backend} if self.attention_backend else {}

    def use_tuned_kernels(self) -> None:
        """Let vLLM find its LoRA kernels' sizes, unless the user has named others.

        vLLM looks for them in this folder, in a file named after the GPU (vllm/lora/ops/triton_ops/utils.py).
        """
        if self.tuned_kernels is not None:
            os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(self.tuned_kernels))


@cache
def log_choices(hardware: Hardware) -> None:
    """Log what was chosen and why, once a process."""
    for reason in hardware.reasons:
        logger.warning("%s: %s", hardware.name, reason)
