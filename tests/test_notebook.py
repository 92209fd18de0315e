"""The Colab notebook, executed as it is, on a tiny model on the CPU; only its parameters differ, and nothing is installed."""

import json
from pathlib import Path

import nbformat
import pytest
from conftest import build_tokenizer
from helpers import taught_qwen2
from nbclient import NotebookClient
from transformers import AutoTokenizer

from astarpo.cli import TIME_IS_UP
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

    def rows_of(step):
        rows = []
        for number in range(8):
            messages = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": problem((8 * step + number) % 20)["problem"]},
            ]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            rows.append(tokenizer(f"{prompt}\\boxed{{{(step + number) % 2}}}<|im_end|>")["input_ids"])
        return rows

    taught_qwen2(rows_of, 150, below=0.5).save_pretrained(folder)
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
            "EPISODE": "pag",
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


def test_the_notebook_goes_on_to_the_evaluation_when_time_is_up():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = [cell.source for cell in notebook.cells if "astarpo train" in cell.source]
    assert f"accept=(0, {TIME_IS_UP})" in training


@pytest.mark.slow
def test_the_notebook_runs_and_goes_on_where_it_stopped(guesser, tmp_path):
    run = tmp_path / "run"
    printed = execute(guesser, run)
    assert "planned: peak" in printed and "accuracy before" in printed
    assert "engine          vllm" in printed and "stage 1, 10 problems" in printed
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    for picture in ("pool.png", "curves.png"):
        assert (run / picture).read_bytes()[:4] == b"\x89PNG"
    assert json.loads((run / "after.json").read_text())["num_problems"] == 8
    again = execute(guesser, run)
    assert "complete already" in again
    assert "stage 1: " not in again.replace("complete already; nothing to sample", "")
