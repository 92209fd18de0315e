"""Completions of every logged update are kept and can be looked at."""

import sys
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_trainer import make_trainer, vowel_reward
from transformers import TrainerCallback

from astarpo.trainer import completions
from astarpo.trainer.completions import read_completions, select


class Board(TrainerCallback):
    """As transformers' tensorboard callback looks from outside."""

    def __init__(self):
        self.tb_writer = self
        self.texts = []

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


@pytest.mark.parametrize("by_trl", [False, True])
def test_every_update_leaves_its_completions(tiny_model, tmp_path, engine, by_trl):
    two: dict[str, Any] = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "logging_steps": 2}
    trainer = make_trainer(tiny_model, tmp_path, engine=engine, log_completions=by_trl, **two)
    trainer.add_callback(board := Board())
    trainer.train()
    files = sorted((tmp_path / "completions").iterdir())
    assert [file.name for file in files] == [f"completions_{step:05d}.parquet" for step in (1, 2, 3)]
    for file in files:
        table = pq.read_table(file)
        assert table.column_names == ["step", "prompt", "completion", "vowel_reward", "v_star", "advantage"]
        rewards, values, advantages = (table[name].to_pylist() for name in ("vowel_reward", "v_star", "advantage"))
        assert rewards == vowel_reward(table["completion"].to_pylist())
        assert advantages == pytest.approx([r - v for r, v in zip(rewards, values, strict=True)])
        assert len(rewards) == 8
    assert [step for _, _, step in board.tb_writer.texts] == ([1, 2, 3] if by_trl else [])
    assert all("vowel_reward" in text and "What is" in text for _, text, _ in board.tb_writer.texts)
    trainer.vllm_generation.link.close()


def test_they_are_shown_in_the_terminal(tmp_path, capsys, monkeypatch):
    logs = {
        "prompt": [[{"role": "user", "content": "2 plus 2?"}], [{"role": "user", "content": "3 plus 3?"}]],
        "completion": [[{"role": "assistant", "content": "four"}], [{"role": "assistant", "content": "seven"}]],
        "rewards": {"math_reward": [1.0, float("nan")], "form": [0.0, 0.0]},
        "extra": {"v_star": [0.25, 0.5], "odd": [1.0], "length": [3.0, 4.0]},
        "advantages": [0.75, 0.0],
    }
    completions.write_completions(str(tmp_path), 7, logs)
    completions.write_completions(str(tmp_path), 12, {**logs, "prompt": ["plain", "text"]})
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
