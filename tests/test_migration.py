"""Scripts written for TRL's trainers, with the names changed."""

import os
import subprocess
import sys

import pytest

A2PO = """
import sys

from datasets import Dataset
from trl.experimental.a2po import A2POConfig, A2POTrainer


def short(completions, answer, **kwargs):
    return [float(len(text) % 2 == int(want)) for text, want in zip(completions, answer)]


rows = [{"prompt": f"Count to {i}: ", "answer": str(i % 2)} for i in range(6)]
args = A2POConfig(
    sys.argv[2],
    beta1=0.5,
    beta2=1e-3,
    num_value_samples=4,
    filter_all_incorrect=True,
    temperature=1.0,
    max_prompt_length=64,
    max_completion_length=8,
    learning_rate=1e-3,
    per_device_train_batch_size=2,
    max_steps=2,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    bf16=False,
)
trainer = A2POTrainer(model=sys.argv[1], reward_funcs=short, args=args, train_dataset=Dataset.from_list(rows))
trainer.train()
print("V*", "REWARD", [round(e["reward"], 3) for e in trainer.state.log_history if "reward" in e])
"""

GRPO = """
import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward


class Steps(TrainerCallback):
    seen = 0

    def on_step_end(self, args, state, control, **kwargs):
        Steps.seen += 1


async def thoughtful(completions, **kwargs):
    return [float(len(completion[0]["content"]) % 2) for completion in completions]


rows = [{"prompt": [{"role": "user", "content": f"{i}+1?"}], "solution": str(i + 1)} for i in range(6)]
args = GRPOConfig(
    sys.argv[2],
    learning_rate=1e-3,
    max_completion_length=12,
    per_device_train_batch_size=2,
    reward_weights=[1.0, 0.5, 0.1, 1.0],
    max_steps=2,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    use_cpu=True,
    bf16=False,
)
trainer = GRPOTrainer(
    model=sys.argv[1],
    reward_funcs=[accuracy_reward, think_format_reward, get_soft_overlong_punishment(12, 4), thoughtful],
    args=args,
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
    callbacks=[Steps()],
)
trainer.train()
logged = [entry for entry in trainer.state.log_history if "reward" in entry]
print("STEPS", Steps.seen, sorted(key for key in logged[0] if key.startswith("rewards/") and key.endswith("/mean")))
"""


def run(script, model, folder):
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py", model, "out"]
    env = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}
    finished = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True], ids=["theirs", "ours"])
def test_an_a2po_script_runs_with_two_names_changed(tiny_model, tmp_path, ours):
    script = A2PO
    if ours:
        script = script.replace("trl.experimental.a2po", "astarpo.trainer")
        script = script.replace("A2POConfig", "AStarPOConfig").replace("A2POTrainer", "AStarPOTrainer")
    assert "REWARD [" in run(script, tiny_model, tmp_path)
    assert (tmp_path / "out" / "reference_pool" / "manifest.json").exists() == ours


def test_a_grpo_script_runs_with_trls_rewards_and_callbacks(tiny_model, tmp_path):
    script = GRPO.replace(
        "from trl import GRPOConfig, GRPOTrainer", "from astarpo.trainer import AStarPOConfig, AStarPOTrainer"
    )
    script = script.replace("GRPOConfig", "AStarPOConfig").replace("GRPOTrainer", "AStarPOTrainer")
    printed = run(script, tiny_model, tmp_path)
    assert "STEPS 2" in printed
    for name in ("accuracy_reward", "think_format_reward", "soft_overlong_punishment_reward", "thoughtful"):
        assert f"rewards/{name}/mean" in printed
