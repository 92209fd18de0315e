"""Checkpoints that are whole or do not count: a marker is written last, and older checkpoints are deleted only after it."""

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..rollout.files import flush_to_disk, write_json

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import AStarPOConfig

logger = logging.getLogger(__name__)

MARKER = "astarpo_complete.json"
PREFIX = "checkpoint-"
_OPTIMIZER = ("optimizer", "global_step", "pytorch_model_fsdp", "distrib_optim")
"""How files or folders begin that hold an optimizer's state: plain, DeepSpeed's, FSDP's."""

# Fields that change where results go or how a run is watched, not what is computed.
_OPERATIONAL = {
    *("output_dir", "run_name", "report_to", "disable_tqdm", "resume_from_checkpoint", "project"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_by", "load_best_model_at_end"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size", "do_eval"),
    *(
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "probe_rows",
        "log_completions",
        "num_completions_to_print",
        "log_unique_prompts",
        "log_level",
        "log_level_replica",
    ),
    *("engine_timeout_s", "pool", "local_rank"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *(
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataloader_persistent_workers",
    ),
}
_OPERATIONAL_PREFIXES = ("_", "logging_", "hub_", "push_to_hub", "trackio_")
# With a constant learning rate a longer run is the same run, only longer.
_LENGTH = {"max_steps", "num_train_epochs"}


def run_fingerprint(args: "AStarPOConfig", data: str, peft_config: Any, model: str, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint, as plain data.

    Of the batch sizes only the global ones: a smaller micro-batch with more accumulation is the same run.
    """
    settings, _ = settings_of(args)
    adapter = None if peft_config is None else {k: _plain(v) for k, v in sorted(peft_config.to_dict().items())}
    if adapter is not None:
        adapter.pop("inference_mode", None)
    rows = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    fingerprint = {
        "model": model,
        "data": data,
        "adapter": adapter,
        "rows_per_update": rows,
        **settings,
    }
    return json.loads(json.dumps(fingerprint, sort_keys=True, default=str))


def settings_of(args: "AStarPOConfig") -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that decide what a run computes; and its length, which is none of them where the learning rate is constant."""
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    skipped = _OPERATIONAL | (_LENGTH if schedule == "constant" else set())
    settings = {
        name: value
        for name, value in args.to_dict().items()
        if name not in skipped and not name.startswith(_OPERATIONAL_PREFIXES)
    }
    return settings, {name: getattr(args, name) for name in sorted(_LENGTH)}


def data_identity(dataset: "Dataset") -> str:
    """A hash of the prompts, gold answers and V* that are trained on."""
    columns = [name for name in ("prompt", "solution", "v_star") if name in dataset.column_names]
    content = hashlib.blake2b(digest_size=16)
    for row in dataset.select_columns(columns):
        content.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    return content.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else value


def mark_complete(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write the marker that makes the checkpoint in `folder` count, once everything else is on disk."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        flush_to_disk(path)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    write_json(folder / MARKER, {"written": time.time(), "files": files, "fingerprint": fingerprint})


def rotate(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the complete checkpoints written first above `limit`, and incomplete ones when there is a complete one."""
    complete = [path for path in checkpoints(output_dir) if what_is_missing(path) is None]
    if not complete:
        return
    kept = set(complete[-limit:] if limit and limit > 0 else complete)
    for path in checkpoints(output_dir):
        is_best = best is not None and path.resolve() == Path(best).resolve()
        if path not in kept and not is_best:
            shutil.rmtree(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, whole or not, in the order in which they were written.

    Not in the order of their steps: a run that goes on from an earlier checkpoint writes lower steps after higher ones.
    """
    folders = [path for path in output_dir.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdigit()]
    return sorted(folders, key=lambda folder: (_written(folder), step_of(folder)))


def _written(folder: Path) -> float:
    try:
        return float(json.loads((folder / MARKER).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError):
        return folder.stat().st_mtime


def step_of(folder: Path) -> int:
    """The update after which a checkpoint was written."""
    return int(folder.name[len(PREFIX) :])


def what_is_missing(folder: Path) -> str | None:
    """Why the checkpoint in `folder` does not count, or None for a whole one."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no marker, so its writing was cut short"
    except ValueError as error:
        return f"its marker cannot be read ({error})"
    for name, size in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"its file {name} is missing or has another size"
    return None


def last_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are named on stderr and passed over."""
    for folder in reversed(checkpoints(output_dir)):
        missing = what_is_missing(folder)
        if missing is None:
            return folder
        logger.warning("%s is passed over: %s.", folder, missing)
    return None


def refuse_changes(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Raise a `ValueError` that shows what differs when `folder` belongs to another run, or is not whole."""
    missing = what_is_missing(folder)
    if missing is not None:
        raise ValueError(
            f"The checkpoint `{folder}` cannot be resumed: {missing}. Name another, or `true` for the newest."
        )
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if not any(name.startswith(_OPTIMIZER) for name in marker["files"]):
        raise ValueError(
            f"The checkpoint `{folder}` was saved with save_only_model, so it holds no optimizer and cannot be resumed. Start a "
            "new run, or merge its adapter into the model and go on from there."
        )
    stored, wanted = _flat(marker["fingerprint"]), _flat(fingerprint)
    # Only what both know is compared: a checkpoint of an older astarpo has fields that are gone, and lacks new ones.
    lines = differences(stored, wanted)
    if lines:
        raise ValueError(
            f"The checkpoint `{folder}` belongs to another run:\n{lines}\nSet these back to resume it, or start a new run in another "
            "--output_dir (the adapter in the checkpoint can be merged into the model to go on from there)."
        )


def differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """A line for each field that both have and in which they differ; `prefix` stands before its name."""
    return "\n".join(
        f"  {prefix}{name}: {stored[name]!r} there, {wanted[name]!r} now"
        for name in sorted(stored.keys() & wanted.keys())
        if stored[name] != wanted[name]
    )


def _flat(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint with the options of its episodes beside the others; checkpoints of completions once had none."""
    episode = fingerprint.get("episode", {"episode": "single"})
    flat = {name: value for name, value in fingerprint.items() if name != "episode"}
    return flat | {name if name == "episode" else f"episode {name}": value for name, value in episode.items()}
