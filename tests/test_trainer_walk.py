"""The walk through one update in docs/architecture.md is the one that the code takes."""

import re
import sys
from pathlib import Path

from helpers import LORA, toy_rows
from peft import LoraConfig
from transformers import TrainerCallback

import astarpo.trainer
from astarpo.trainer import AStarPOConfig, AStarPOTrainer
from astarpo.verifier import math_reward

ROOT = Path(__file__).parent.parent
MOST_FILES = 15


class Trace(TrainerCallback):
    """Which functions of ours run in the second update, in the order in which they are first entered."""

    def __init__(self):
        self.calls: list[tuple[str, str]] = []
        self._below_reward = 0

    def on_step_end(self, args, state, control, **kwargs):
        sys.setprofile(self._profile if state.global_step == 1 else None)

    def _profile(self, frame, event, arg):
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "tests") or ".venv" in path.parts:
            return
        place = (str(path.relative_to(ROOT)), name)
        if place == ("verifier/reward.py", "math_reward"):
            self._below_reward = 1 if event == "call" else 0
            if event == "call" and place not in self.calls:
                self.calls.append(place)
        elif event == "call" and not self._below_reward and place not in self.calls:
            self.calls.append(place)


def test_the_documented_walk_is_the_one_the_code_takes(tiny_model, tmp_path, engine):
    trace = Trace()
    trainer = AStarPOTrainer(
        tiny_model,
        math_reward,
        AStarPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=2,
            num_value_samples=4,
            max_completion_length=8,
            save_strategy="no",
            report_to="none",
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        ),
        toy_rows(),
        peft_config=LoraConfig(**LORA),
        callbacks=[trace],
        engine=engine,
    )
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
        trainer.close()
    assert Path(astarpo.trainer.__file__).parent == ROOT / "trainer"
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walk = re.findall(r"`([\w/]+\.py): (\w+)`", text.split("## One update")[1].split("\n## ")[0])
    files = list(dict.fromkeys(file for file, _ in trace.calls))
    assert len(files) <= MOST_FILES, files
    assert {file for file, _ in walk} == set(files)
    places = [trace.calls.index(step) for step in walk]  # a step that is not taken is an error here
    assert places == sorted(places), [trace.calls[place] for place in places]
