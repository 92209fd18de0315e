"""Every block of README and of the guides is run, and so are the example in one file and the short notebook: all on a tiny model, README and
the tour on SmolLM2 too (`make test-long`)."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from blocks import PAGES, README, ROOT, blocks, run_page
from conftest import build_tokenizer
from helpers import taught_qwen2
from nbclient import NotebookClient
from transformers import AutoTokenizer

from astarpo.trainer.division import write_problems
from astarpo.trainer.quickstart import fetch_model

TOUR = next(page for page in PAGES if page.name == "start.md")
GUIDES = [page for page in PAGES if page != TOUR and any(block.is_run for block in blocks(page))]
MODEL, DATA = "runs/models/SmolLM2-135M-Instruct", "runs/quickstart/data"
"""What the pages take from `make quickstart`."""
ANSWERS = range(2, 16)


@pytest.fixture(scope="module")
def divider(tmp_path_factory):
    """A tiny model that answers every division with some number from 2 to 15, so that it is right now and then."""
    folder = tmp_path_factory.mktemp("divider")
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, _ = write_problems(folder / "data")
    chats = [json.loads(line)["prompt"] for line in train.read_text(encoding="utf-8").splitlines()]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]

    def rows_of(step):
        texts = [
            f"{prompts[(8 * step + number) % len(prompts)]}The answer is {ANSWERS[(step + number) % len(ANSWERS)]}.<|im_end|>"
            for number in range(8)
        ]
        return [tokenizer(text)["input_ids"] for text in texts]

    taught_qwen2(rows_of, 300, below=0.5).save_pretrained(folder)
    return folder


def after_quickstart(folder: Path, model: Path) -> Path:
    """A folder as `make quickstart` leaves it."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()  # the tests' own environment is on the path
    write_problems(folder / DATA)
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).symlink_to(model)
    return folder


@pytest.fixture(scope="module")
def toured(divider, tmp_path_factory):
    """The folder after the tour, in which the guides begin."""
    folder = after_quickstart(tmp_path_factory.mktemp("tour"), divider)
    run_page(TOUR, folder, timeout_s=900)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tour_leaves_what_it_says(toured):
    for name in ("pool/manifest.json", "out/adapter_model.safetensors", "after.html", "merged/config.json"):
        assert (toured / "runs" / name).is_file(), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(toured, tmp_path, page):
    folder = Path(shutil.copytree(toured, tmp_path / "folder", symlinks=True))
    run_page(page, folder, timeout_s=900)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_blocks_of_the_readme_run(divider, tmp_path):
    run_page(README, after_quickstart(tmp_path / "folder", divider), timeout_s=900)


@pytest.mark.slow
def test_the_algorithm_in_one_file(divider, tmp_path):
    script = ROOT / "examples" / "minimal.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 250
    sizes = ["--learning_rate", "0.01", "--updates", "2", "--prompts", "4", "--reference_samples", "2"]
    command = [sys.executable, str(script), "--model", str(divider), *sizes]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "V* of 93 prompts" in ended.stdout and "after 2 updates" in ended.stdout
    first, second = re.findall(r"ln π/π_ref +(-?[\d.]+)", ended.stdout)
    assert float(first) == 0 and float(second) != 0  # the first update samples the reference


@pytest.mark.slow
def test_the_short_notebook(divider, tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "ten_minutes.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "install" in tags:
            cell.source = "import shutil\nimport subprocess"
        elif "parameters" in tags:
            cell.source += f"\nMODEL, UPDATES, PROMPTS = {str(divider)!r}, 2, 4"
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert re.search(r"right of 40 held out: \d+ before, \d+ after", printed)
    assert (tmp_path / "ten_minutes" / "merged" / "config.json").is_file()


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", [README, TOUR], ids=lambda page: page.stem)
def test_the_same_with_a_real_model(tmp_path, page):
    model = fetch_model(tmp_path / "models")
    run_page(page, after_quickstart(tmp_path / "folder", model), timeout_s=1800)
