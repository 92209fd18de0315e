"""GPUs that the planner knows by name: what a process can have of their memory, and how fast they are."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its maker specifies it.

    Attributes:
        bytes (`float`):
            What a process can have: what `nvidia-smi` shows as total, less what the driver keeps.
        bandwidth (`float`):
            Bytes a second between memory and chip.
        flops (`float`):
            Dense float16 operations a second that accumulate in float32.
    """

    bytes: float
    bandwidth: float
    flops: float


GPUS = {
    "t4": Card(15.8e9, 320e9, 65e12),
    "v100": Card(16.6e9, 900e9, 125e12),
    "v100-32gb": Card(33.4e9, 900e9, 125e12),
    "3060": Card(12.6e9, 360e9, 25e12),
    "4060ti": Card(16.8e9, 288e9, 44e12),
    "4060ti-8gb": Card(8.4e9, 288e9, 44e12),
    "3090": Card(25.2e9, 936e9, 71e12),
    "4090": Card(25.2e9, 1008e9, 165e12),
    "5090": Card(33.5e9, 1792e9, 210e12),
    "l4": Card(24.1e9, 300e9, 121e12),
    "l40s": Card(47.3e9, 864e9, 362e12),
    "a10": Card(24.1e9, 600e9, 125e12),
    "a6000": Card(50.5e9, 768e9, 155e12),
    "a100": Card(42.3e9, 1555e9, 312e12),
    "a100-80gb": Card(84.9e9, 2039e9, 312e12),
    "h100": Card(85.0e9, 3350e9, 989e12),
    "h200": Card(149.5e9, 4800e9, 989e12),
}
"""An A100 is planned with 40 GB."""


def find_card(name: str) -> Card | None:
    """The card of a name as people write it (`t4`, `RTX 4090`, `A100-80GB`); None where it is not known."""
    known = {card.replace("-", ""): size for card, size in GPUS.items()}
    return known.get(_plain(name))


def gpu_bytes(name: str) -> float:
    """Bytes that a process can have of a card.

    Args:
        name (`str`):
            A name as people write it (`t4`, `RTX 4090`, `A100-80GB`), or a size (`24GB`, which is 24 · 10⁹ bytes).

    Raises:
        ValueError: If the name is not known.
    """
    card = find_card(name)
    if card is not None:
        return card.bytes
    size = re.fullmatch(r"(\d+(?:\.\d+)?)gb", _plain(name))
    if size is None or float(size[1]) == 0:
        raise ValueError(f"`--gpu {name}` is not known. Name {', '.join(GPUS)}, or a size such as 24GB.")
    return float(size[1]) * 1e9


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|tesla|quadro|[\s_-]", "", name.lower())
