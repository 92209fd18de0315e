"""Publishing a pool as a data set on the hub, with a card. `ReferencePool.open` fetches one."""

import json
from pathlib import Path
from typing import Any, cast

from ..cards import HUB, license_of, linked
from ..files import write_text
from .reading import FILES, PROMPTS, ReferencePool
from .writing import check_pool

CARD = "README.md"


def publish_pool(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Upload the pool in `folder` as a data set, with a card.

    Args:
        folder (`Path`):
            The pool's folder.
        repo_id (`str`):
            `user/name` of the data set; made when it is not there.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new data set is private.

    Returns:
        `str`: Address of the commit.

    Raises:
        ValueError: If the pool is broken or unfinished, or the hub is switched off; nothing is sent then.
    """
    import huggingface_hub

    if is_offline():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing is sent to the hub. Unset it to publish.")
    faults = check_pool(folder)
    if faults:
        raise ValueError(f"The pool in `{folder}` is broken: {faults[0].file}: {faults[0].problem}. Repair it first.")
    pool = ReferencePool.open(folder)
    if not pool.manifest.is_settled:
        raise ValueError(f"The pool in `{folder}` is unfinished. Run the command that began it again, then publish.")
    write_text(folder / CARD, pool_card(pool, repo_id))
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    message = f"Reference pool of {pool.num_rows} samples"
    patterns = [*FILES, CARD]
    return str(
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=str(folder),
            allow_patterns=patterns,
            # A pool that was merged or graded again since must not leave its old shards there.
            delete_patterns=patterns,
            commit_message=message,
        )
    )


def is_offline() -> bool:
    """Whether the user has switched the hub off (`HF_HUB_OFFLINE=1`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def pool_card(pool: ReferencePool, repo_id: str) -> str:
    """The data set's card: how to load it, what it holds, how it was made."""
    from huggingface_hub import DatasetCard, DatasetCardData

    summary, made = pool.summary(), pool.manifest.fingerprint
    solving = [
        f"| {name} | {_share(summary[key])} |"
        for name, key in (("prompts never solved", "never_solved"), ("prompts always solved", "always_solved"))
    ]
    passes = [f"| pass@{k} | {_share(value)} |" for k, value in summary.get("pass_at_k", {}).items()]
    roles = ", ".join(["attempt", *summary.get("later_turns", {})])
    what = "samples" if summary["turns"] == 1 else f"episodes ({roles}: a row for each turn)"
    rows = [f"| `{key}` | `{json.dumps(value, ensure_ascii=False)}` |" for key, value in made.items()]
    sources = made.get("sources") or []
    name = str(made.get("model_name") or "")
    model = "" if str(made.get("model")).startswith("local ") else name  # of a folder there is nothing to link to
    data = DatasetCardData(
        license=license_of(model) if model else None,
        task_categories=["text-generation", "question-answering"],
        tags=["astarpo", "reference-pool", "reinforcement-learning", "math"],
        source_datasets=[one["id"] for one in sources if one.get("id")] or None,
        pretty_name=repo_id.split("/")[-1],
        configs=[
            {"config_name": "samples", "data_files": "samples-*.parquet", "default": True},
            {"config_name": "prompts", "data_files": PROMPTS},
        ],
        **cast(Any, {"base_model": model} if model else {}),
    )
    of = f" of {linked(model)}" if model else f" of {name}" if name else ""
    on = ", ".join(linked(one["id"], "datasets/") if one.get("id") else str(one.get("file")) for one in sources)
    text = "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            f"# {repo_id.split('/')[-1]}",
            "",
            f"{summary['num_samples']} graded {what}{of} for each of {summary['num_prompts']} prompts{f' of {on}' if on else ''}: a reference "
            f"pool for [A*-PO]({HUB}/papers/2505.20686), made with astarpo.",
            "",
            "```python",
            "from astarpo.rollout import ReferencePool",
            "",
            f'pool = ReferencePool.open("{repo_id}")',
            "values = pool.values(beta1=0.5)  # V* of each prompt",
            "```",
            "",
            f'Without astarpo: `datasets.load_dataset("{repo_id}", "samples")` and `"prompts"`, joined on `prompt_id`.',
            "",
            "| | |",
            "|---|---|",
            f"| samples | {summary['rows']} |",
            f"| mean reward | {_share(summary['mean_reward'])} |",
            *solving,
            *passes,
            f"| mean tokens | {summary['mean_tokens'] or 0:.0f} |",
            "",
            "## How it was made",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )
    return str(DatasetCard(text))


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"
