r"""astarpo's grading in TRL's `GRPOTrainer`.

    pip install astarpo trl
    accelerate launch examples/plugins/trl_reward.py

`math_reward` is a TRL reward function. The data set needs a column `solution`: the answers, or worked solutions that end in one (GSM8K's
"#### 5", MATH's "\boxed{5}"). A completion that could not be judged gets no reward instead of 0; TRL leaves it out of the update.
"""

from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer

from astarpo.verifier import math_reward

ASK = r"{question} Please reason step by step, and put your final answer within \boxed{{}}."


def make_trainer(model: str, rows: Dataset, args: GRPOConfig) -> GRPOTrainer:
    """A trainer that grades by astarpo. `rows` has the columns `prompt` and `solution`."""
    return GRPOTrainer(model, reward_funcs=math_reward, args=args, train_dataset=rows)


def to_row(row: dict[str, str]) -> dict[str, object]:
    """The row of a problem of GSM8K."""
    prompt = [{"role": "user", "content": ASK.format(question=row["question"])}]
    return {"prompt": prompt, "solution": row["answer"]}


if __name__ == "__main__":
    gsm8k = load_dataset("openai/gsm8k", "main", split="train").map(to_row)
    make_trainer("Qwen/Qwen2.5-1.5B-Instruct", gsm8k, GRPOConfig(output_dir="runs/trl_grpo", bf16=True)).train()
