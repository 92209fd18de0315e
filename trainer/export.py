"""`astarpo export`: an adapter as merged weights that any program loads, with a card, checked, and pushed to the hub where asked."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import parse_command, run_command

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


@dataclass
class ExportOptions:
    """What to export."""

    adapter: str = field(metadata={"help": "Folder or hub id of the adapter."})
    output_dir: str = field(metadata={"help": "Folder for the merged model."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model. Default: the one that the adapter names."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit on the hub."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the merged weights. auto: as the base model is stored, and bfloat16 where that is float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the merged model, too."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "user/name on the hub. Default: the name of output_dir, as yours."}
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})


def export(options: ExportOptions) -> int:
    """Merge, check, write the card, and push; returns the exit code."""
    from huggingface_hub import HfApi
    from peft import PeftConfig

    from ..rollout.engines.policy_link import adapter_folder
    from ..rollout.pool.publishing import is_offline
    from .merge import merge_adapter
    from .summary import SERVED

    if options.push_to_hub and is_offline():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or leave --push_to_hub out.")
    folder = Path(options.output_dir)
    print(
        f"merging {options.adapter}, and checking the result on 20 prompts: a minute or two for 135M on a CPU, longer for a larger model",
        flush=True,
    )
    check = merge_adapter(
        options.adapter,
        folder,
        base=options.model_name_or_path,
        revision=options.model_revision,
        dtype=options.dtype,
    )
    source = adapter_folder(options.adapter)
    base = options.model_name_or_path or str(PeftConfig.from_pretrained(str(source)).base_model_name_or_path)
    name = (options.hub_model_id or folder.resolve().name).rpartition("/")[2]
    card = merged_card(source / "README.md", name, base)
    card.save(folder / "README.md")
    print(
        f"merged model: {folder}\nlog-probs differ from base and adapter by {check.mean_gap:.5f} nats a token in the mean (the adapter moves "
        f"them by {check.moved:.3f}); {check.num_prompts - len(check.differences)} of {check.num_prompts} greedy completions are the same"
        + (", and these differ, usually where two tokens are almost equally likely:" if check.differences else "")
    )
    for prompt, said, now in check.differences:
        same = next(
            (place for place, (a, b) in enumerate(zip(said, now, strict=False)) if a != b), min(len(said), len(now))
        )
        print(
            f"  {prompt.split(' Please')[0]}  after {same} characters: {said[same:][:40]!r}, merged {now[same:][:40]!r}"
        )
    if options.push_to_hub:
        api, repo = HfApi(), options.hub_model_id or name
        try:
            repo = str(api.create_repo(repo, private=options.hub_private_repo, exist_ok=True).repo_id)
            print(api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Merged weights"))
        except Exception as error:
            print(
                f"The merged model in `{folder}` is whole, but it could not be uploaded ({type(error).__name__}: {error}). Upload it with "
                f"`hf upload {repo} {shlex.quote(str(folder))}{' --private' if options.hub_private_repo else ''}`.",
                file=sys.stderr,
            )
            return 1
    print(f"next:\n  transformers chat {folder}\n  vllm serve {folder}\n{SERVED}")
    return 0


def merged_card(adapter_card: Path, name: str, base: str) -> "ModelCard":
    """The adapter's card as that of the merged model: same facts, another library, and its base as the model that was fine-tuned."""
    from huggingface_hub import ModelCard

    from ..rollout.cards import license_of
    from .card import CardFacts, model_card

    fresh = model_card(CardFacts(name, base, license_of(base), is_adapter=False))
    if not adapter_card.is_file():
        return fresh
    card = ModelCard.load(str(adapter_card), ignore_metadata_errors=True)
    head, _, rest = fresh.text.partition("## Results")
    _, found, own = card.text.partition("## Results")
    data: Any = card.data
    data.library_name, data.model_name = "transformers", name
    text = f"{head}## Results{own if found else rest}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


def main() -> None:
    """Entry point of `astarpo export`."""

    def command() -> int:
        return export(
            *parse_command(
                [ExportOptions],
                section="export",
                prog="astarpo export",
                description="Merge an adapter into its base model, check that the merged weights say what base and adapter say, and save them "
                "for transformers, vLLM or llama.cpp.",
            )
        )

    run_command(command, interrupted="nothing was written; run the same command again")


if __name__ == "__main__":
    main()
