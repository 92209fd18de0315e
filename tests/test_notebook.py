"""The Colab notebook, executed as it is, on a tiny model on the CPU; only its parameters differ, and nothing is installed."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from conftest import build_tokenizer
from nbclient import NotebookClient
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from astarpo.rollout.options import SYSTEM_PROMPT

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "astarpo_t4.ipynb"


def problem(number: int) -> dict[str, str]:
    return {"problem": f"Guess {number}", "answer": str(number % 2)}


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    """A tiny model that boxes 0 or 1 at random, so that half of its answers are right."""
    folder = tmp_path_factory.mktemp("guesser")
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(**sizes, num_key_value_heads=1, vocab_size=320, eos_token_id=2, max_position_embeddings=512)
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for step in range(150):
        rows = []
        for number in range(8):
            messages = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": problem((8 * step + number) % 20)["problem"]},
            ]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(f"{prompt}\\boxed{{{(step + number) % 2}}}<|im_end|>")["input_ids"]
            rows.append(ids + [0] * (160 - len(ids)))
        ids = torch.tensor(rows)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
    model.save_pretrained(folder)
    return folder


def parameters(guesser: Path, run: Path) -> str:
    for name, numbers in (("train", range(12)), ("heldout", range(12, 20))):
        lines = "".join(json.dumps(problem(number)) + "\n" for number in numbers)
        (run.parent / f"{name}.jsonl").write_text(lines)
    values = {
        **{
            "SOURCE": "astarpo",
            "MODEL": str(guesser),
            "RUN": str(run),
            "HUB_POOL": "",
            "SAVE_BY": "1h",
            "NUM_TRAIN": 10,
        },
        **{"TRAIN": str(run.parent / "train.jsonl"), "HELDOUT": str(run.parent / "heldout.jsonl"), "NUM_HELDOUT": 8},
        **{"MAX_PROMPT": 200, "MAX_COMPLETION": 16, "NUM_SAMPLES": 4, "PROMPTS_PER_PASS": 2, "PASSES": 2, "EPOCHS": 1},
        **{"LEARNING_RATE": 1e-2, "BUDGET_GB": 2},
    }
    return "\n".join(f"{name} = {value!r}" for name, value in values.items())


def execute(guesser: Path, run: Path) -> str:
    """Run all cells; returns what they printed."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            names = {line.split(" = ")[0] for line in cell.source.splitlines() if " = " in line and line[0] != "#"}
            cell.source = parameters(guesser, run)
            assert {name for part in names for name in part.split(", ")} == {
                line.split(" = ")[0] for line in cell.source.splitlines()
            }
        elif "install" in cell.metadata.get("tags", []):
            cell.source = ""
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": run.parent}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_runs_and_goes_on_where_it_stopped(guesser, tmp_path):
    run = tmp_path / "run"
    printed = execute(guesser, run)
    assert "planned: peak" in printed and "accuracy before" in printed
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    for picture in ("pool.png", "curves.png"):
        assert (run / picture).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run / "after.json").read_text())["num_problems"] == 8
    again = execute(guesser, run)
    assert "complete already" in again
    assert "stage 1: " not in again.replace("complete already; nothing to sample", "")
