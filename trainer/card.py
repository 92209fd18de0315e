"""The card of a trained model."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

PAPER = "2505.20686"
CITATION = r"""@article{brantley2025accelerating,
    title  = {{Accelerating RL for LLM Reasoning with Optimal Advantage Regression}},
    author = {Brantley, Kiant\'e and Chen, Mingyu and Gao, Zhaolin and Lee, Jason D. and Sun, Wen and Zhan, Wenhao and Zhang, Xuezhou},
    year   = 2025,
    eprint = {arXiv:2505.20686},
}"""


def model_card(name: str, base_model: str, dataset: str | None, tags: list[str], is_adapter: bool) -> ModelCard:
    """The card of an adapter or a model that [`AStarPOTrainer`] trained.

    Args:
        name (`str`):
            The model's name.
        base_model (`str`):
            Hub id or folder of the model that was trained; a folder is not linked.
        dataset (`str`, *optional*):
            Hub id of the data set.
        tags (`list[str]`):
            Further tags.
        is_adapter (`bool`):
            Whether it is a LoRA adapter.
    """
    known = None if Path(base_model).is_dir() else base_model
    data = ModelCardData(
        base_model=known,
        datasets=dataset,
        library_name="peft" if is_adapter else "transformers",
        model_name=name,
        tags=["generated_from_trainer", "trl", "astarpo", *tags],
    )
    of = f"[{known}](https://huggingface.co/{known})" if known else "a local model"
    on = f" on [{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else ""
    what = "a LoRA adapter of" if is_adapter else "a fine-tuned version of"
    text = f"""---
{data.to_yaml()}
---

# {name}

This is {what} {of}, trained{on} with A*-PO, a method introduced in
[Accelerating RL for LLM Reasoning with Optimal Advantage Regression](https://huggingface.co/papers/{PAPER}): one completion y per
prompt x, and the regression (β₂ ln π(y|x)/π_ref(y|x) + V*(x) − r)², where V*(x) comes from samples of the reference.

```bibtex
{CITATION}
```
"""
    return ModelCard(text)
