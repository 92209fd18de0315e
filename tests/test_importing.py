"""Rewards that others have published become a pool, and base models train on plain text."""

import json
import shutil
import sys
from typing import Any

import pytest
from datasets import Dataset
from helpers import LORA
from peft import LoraConfig
from transformers import AutoTokenizer

from astarpo.__main__ import dispatch
from astarpo.rollout import ReferencePool
from astarpo.rollout.fingerprint import model_identity
from astarpo.rollout.pool import check_pool
from astarpo.rollout.pool.importing import reward_columns
from astarpo.trainer import AStarPOConfig, AStarPOTrainer

TEMPLATE = "Question: {question}\nAnswer:"


def published(folder, rows=4):
    """A file as the authors publish theirs: 0 or 1 per sample in columns of their own."""
    path = folder / "evaluated.parquet"
    columns = {f"eval_{i}": [(i + n) % 3 == 0 for n in range(rows)] for i in range(12)}
    questions = [f"What is {n} plus 1?" for n in range(rows)]
    Dataset.from_dict({"problem": questions, "answer": [str(n + 1) for n in range(rows)], **columns}).to_parquet(path)
    return path


def run_import(monkeypatch, path, folder, *words):
    monkeypatch.setattr(sys, "argv", ["astarpo"])
    return dispatch(["pool", "import", str(path), "--columns", "eval_*", "--output_dir", str(folder), *words])


def trainer_on(pool, model, engine, folder, **settings):
    words: dict[str, Any] = dict(
        bf16=False, max_completion_length=8, num_value_samples=12, report_to="none", max_steps=1, pool=str(pool)
    )
    words |= dict(
        per_device_train_batch_size=4,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        logging_steps=1,
    )
    return AStarPOTrainer(
        model, None, AStarPOConfig(str(folder), **(words | settings)), peft_config=LoraConfig(**LORA), engine=engine
    )


@pytest.fixture
def base_model(tiny_model, tmp_path):
    """The tiny model as a base model: its tokenizer has no chat template."""
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return str(folder)


def test_published_rewards_become_a_pool_that_says_what_was_declared(
    base_model, engine, tmp_path, monkeypatch, capsys
):
    path, folder = published(tmp_path), tmp_path / "pool"
    declared = ("--model_name_or_path", base_model, "--max_completion_length", "8", "--temperature", "1.0")
    assert run_import(monkeypatch, path, folder, "--prompt_template", TEMPLATE, *declared) == 0
    assert "not declared: require_eos, verifier" in capsys.readouterr().out
    pool = ReferencePool.open(folder)
    made = pool.manifest.fingerprint
    assert made["declared"] == ["max_completion_length", "model", "temperature"]
    assert made["model"] == model_identity(base_model, None)
    assert check_pool(folder) == [] and pool.is_complete and pool.reward_matrix().shape == (4, 12)
    assert pool.reward_matrix()[1].tolist() == [float((i + 1) % 3 == 0) for i in range(12)]  # eval_2 before eval_10
    assert pool.to_dataset()[0]["prompt"] == "Question: What is 0 plus 1?\nAnswer:"

    with pytest.raises(ValueError, match=r"which require_eos, verifier it was sampled with.*--accept_undeclared true"):
        trainer_on(folder, base_model, engine, tmp_path / "run")
    with pytest.raises(ValueError, match="temperature="):
        trainer_on(folder, base_model, engine, tmp_path / "run", accept_undeclared=True, temperature=0.5)
    trainer = trainer_on(folder, base_model, engine, tmp_path / "run", accept_undeclared=True)
    plain = AutoTokenizer.from_pretrained(base_model)("Question: What is 0 plus 1?\nAnswer:")["input_ids"]
    assert trainer.tokenize([pool.to_dataset()[0]["prompt"]]) == [plain]  # no chat template
    trainer.train()
    assert trainer.state.log_history[0]["v_star"] > 0
    trainer.close()


def test_what_is_wrong_with_a_file_is_said(tmp_path, monkeypatch):
    path = published(tmp_path)
    with pytest.raises(ValueError, match=r"No column is called `reward_\*`; there are problem, answer, eval_0"):
        reward_columns(["problem", "answer", "eval_0"], "reward_*")
    with pytest.raises(ValueError, match=r"no \{question\}"):
        run_import(monkeypatch, path, tmp_path / "pool", "--prompt_template", "Answer:")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"problem": "1 + 1", "answer": "2", "eval_0": "yes"}) + "\n")
    with pytest.raises(ValueError, match="Row 1 has the reward 'yes'"):
        run_import(monkeypatch, bad, tmp_path / "pool")
    monkeypatch.setattr(sys, "argv", ["astarpo"])
    run_import(monkeypatch, path, tmp_path / "pool")
    run_import(monkeypatch, path, tmp_path / "pool")  # the same again
    with pytest.raises(ValueError, match="created with different settings"):  # it holds other prompts
        run_import(monkeypatch, path, tmp_path / "pool", "--system_prompt", "Think.")
    with pytest.raises(ValueError, match="graded by reward functions of evaluated"):
        dispatch(["pool", "regrade", str(tmp_path / "pool")])
