"""Completions of every logged update are kept and can be looked at."""

import sys
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_trainer import make_trainer, vowel_reward
from transformers import TrainerCallback

from astarpo.trainer import completions
from astarpo.trainer.completions import read_completions, select


def noted_reward(completions, log_extra, **kwargs):
    """The same, with columns of its own: only one with a value for every completion is kept."""
    log_extra("letters", [len(completion[0]["content"]) for completion in completions])
    log_extra("odd", [1.0])
    return vowel_reward(completions)


class Board(TrainerCallback):
    """As transformers' tensorboard callback looks from outside."""

    def __init__(self):
        self.tb_writer = self
        self.texts = []

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


@pytest.mark.parametrize("shown", [False, True])
def test_every_update_leaves_its_completions(tiny_model, tmp_path, engine, shown):
    two: dict[str, Any] = {"gradient_accumulation_steps": 2, "logging_steps": 2}
    two |= {"num_completions_to_print": 2, "log_unique_prompts": True}
    trainer = make_trainer(tiny_model, tmp_path, engine=engine, reward=noted_reward, log_completions=shown, **two)
    trainer.add_callback(board := Board())
    trainer.train()
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_{step:05d}.parquet" for step in (1, 2, 3)]
    for file in files:
        table = pq.read_table(file)
        assert table.column_names == ["step", "prompt", "completion", "noted_reward", "letters", "v_star", "advantage"]
        rewards, values, advantages = (table[name].to_pylist() for name in ("noted_reward", "v_star", "advantage"))
        assert table["letters"].to_pylist() == [len(said[0]["content"]) for said in table["completion"].to_pylist()]
        assert rewards == vowel_reward(table["completion"].to_pylist())
        assert advantages == pytest.approx([r - v for r, v in zip(rewards, values, strict=True)])
        assert len(rewards) == 8
    assert [step for _, _, step in board.tb_writer.texts] == ([1, 2, 3] if shown else [])
    assert all(text.count("noted_reward") == 2 and "What is" in text for _, text, _ in board.tb_writer.texts)
    trainer.close()


def test_they_are_shown_in_the_terminal(tmp_path, capsys, monkeypatch):
    logs = {
        "prompt": [[{"role": "user", "content": "2 plus 2?"}], [{"role": "user", "content": "3 plus 3?"}]],
        "completion": [[{"role": "assistant", "content": "four"}], [{"role": "assistant", "content": "seven"}]],
        "math_reward": [1.0, float("nan")],
        "form": [0.0, 0.0],
        "length": [3.0, 4.0],
        "v_star": [0.25, 0.5],
        "advantage": [0.75, 0.0],
    }
    names = ["math_reward", "form"]
    completions.write_completions(str(tmp_path), 7, logs, names)
    completions.write_completions(str(tmp_path), 12, {**logs, "prompt": ["plain", "text"]}, names)
    assert read_completions(str(tmp_path))["prompt"].to_pylist() == ["plain", "text"]
    table = read_completions(str(tmp_path), 7)
    assert len(select(table, "all")) == 2
    assert select(table, "unsolved")["v_star"].to_pylist() == [0.5]
    monkeypatch.setattr(sys, "argv", ["completions", str(tmp_path), "--step", "7", "--which", "solved"])
    assert completions.main() == 0
    shown = capsys.readouterr().out
    assert "[user] 2 plus 2?" in shown
    assert "four" in shown
    assert "math_reward 1.000" in shown
    assert "seven" not in shown
    with pytest.raises(ValueError, match="there are 7 to 12"):
        read_completions(str(tmp_path), 8)
    with pytest.raises(ValueError, match="holds no completions"):
        read_completions(str(tmp_path / "elsewhere"))
