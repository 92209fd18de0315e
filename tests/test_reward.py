"""`math_reward` inside TRL's own trainer."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from astarpo.rollout.rewards import Answer, RewardFunctions
from astarpo.verifier import Outcome, math_reward

warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")


@pytest.mark.parametrize("chat", [True, False])
def test_math_reward_in_grpo_trainer(tiny_model, tmp_path, chat):
    from trl import GRPOConfig, GRPOTrainer

    prompts = [f"What is {a} + {a}?" for a in range(8)]
    rows = {
        "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts,
        "solution": [f"#### {2 * a}" if a else r"\frac{1}{" for a in range(8)],
    }
    rewards = []

    def watched(**kwargs):
        rewards.append(math_reward(**kwargs))
        return rewards[-1]

    watched.__name__ = "math_reward"
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        seed=1,
    )
    trainer = GRPOTrainer(
        model=tiny_model,
        reward_funcs=watched,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(rewards) == 2
    assert {reward for batch in rewards for reward in batch} <= {0.0, 1.0, None}
    logs = [entry for entry in trainer.state.log_history if "verifier/no_answer" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert sum(entry[f"verifier/{outcome}"] for outcome in Outcome) == pytest.approx(1)


def test_gold_answers_may_be_numbers():
    said = ["The answer is 5.", "The answer is 0."]
    assert math_reward(prompts=["a", "b"], completions=said, solution=[5, 0]) == [1.0, 1.0]


def test_of_data_sets_with_unlike_columns_a_reward_gets_what_all_rows_have():
    def level_or_nothing(completions, **kwargs):
        given.append(sorted(set(kwargs) & {"level", "topic"}))
        return [1.0 for _ in completions]

    def needs_level(completions, level, **kwargs):
        return [1.0 for _ in completions]

    given: list[list[str]] = []
    rows = [{"prompt": "a", "topic": "t", "level": 1}, {"prompt": "b", "topic": "t"}]
    answers = [Answer(row, "5", [1], False) for row in rows]
    functions = RewardFunctions([level_or_nothing], None, None, None, None, torch.device("cpu"))
    functions(answers, True, None)
    functions(answers[:1], True, None)
    assert given == [["topic"], ["level", "topic"]]
    with pytest.raises(ValueError, match="level"):
        RewardFunctions([needs_level], None, None, None, None, torch.device("cpu"))(answers, True, None)
