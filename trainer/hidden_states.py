"""Hidden states of the frozen reference: what a value network sees of a state."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

if TYPE_CHECKING:
    from .trainer import AStarPOTrainer


@torch.no_grad()
def reference_hidden(
    trainer: "AStarPOTrainer", sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """The reference's last hidden states at some tokens of some sequences.

    Args:
        trainer ([`AStarPOTrainer`]):
            Has the reference: its model with the adapter off, or its `ref_model`.
        sequences (`Sequence[Sequence[int]]`):
            Token ids.
        positions (`Sequence[Sequence[int]]`):
            Which tokens, for each sequence.

    Returns:
        `list[torch.Tensor]`: For each sequence a float32 tensor of shape (positions, D), on the CPU.
    """
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    is_adapted = isinstance(policy, PeftModel)
    reference: Any = policy.get_base_model() if is_adapted else trainer.ref_model
    decoder: Any = trainer.accelerator.unwrap_model(reference).base_model
    rows = trainer._rows_at_once or trainer.args.per_device_train_batch_size
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    hidden: list[torch.Tensor] = [torch.empty(0)] * len(sequences)
    with policy.disable_adapter() if is_adapted else nullcontext(), trainer.accelerator.autocast():
        start = 0
        while start < len(order):
            group = order[start : start + rows]
            longest = len(sequences[group[-1]])
            # On the right padding needs no mask: a causal model does not look there.
            ids = [list(sequences[number]) + [0] * (longest - len(sequences[number])) for number in group]
            try:
                states = decoder(input_ids=torch.tensor(ids, device=trainer.accelerator.device), use_cache=False)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows = rows // 2
                torch.cuda.empty_cache()
                continue
            for row, number in enumerate(group):
                hidden[number] = states.last_hidden_state[row, list(positions[number])].float().cpu()
            start += len(group)
    return hidden
