"""Parameters that a wrapper (FSDP2, DeepSpeed ZeRO-3) owns: every process holds a part of each."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_sharded(parameter: "torch.Tensor") -> bool:
    """Whether a process holds only a part of this parameter."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def whole(parameter: Any) -> "torch.Tensor":
    """The whole parameter, detached. Where it is sharded all processes must ask for it at the same time.

    Args:
        parameter (`torch.Tensor`):
            A parameter, a `DTensor` of FSDP2, or one that DeepSpeed has partitioned.

    Raises:
        ValueError: If its wrapper hides it (FSDP1 flattens parameters into one); the message names the fix.
    """
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_id"):
        import deepspeed  # pyright: ignore[reportMissingImports]

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if parameter.dim() != 2 or parameter.numel() == 0:
        raise ValueError(
            "The policy's parameters were flattened by FSDP1, so the engine cannot have them. Use FSDP2 "
            "(`fsdp_version: 2`, see configs/accelerate/fsdp2.yaml) or plain data parallelism (DDP)."
        )
    return parameter.detach()
