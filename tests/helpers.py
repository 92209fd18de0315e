"""What several test modules need: tiny policies, completions' log-probs, toy data sets."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}


def tiny_policy(model: str, *, lora: bool = True, seed: int = 0):
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if not lora:
        return base
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**LORA))


def move(model, scale: float = 0.05, seed: int = 1) -> None:
    """Change every trainable parameter, as an update does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@torch.no_grad()
def completion_logps(model, prompt: list[int], completion) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def toy_rows(count: int = 8, rewards=(1.0, 0.0, 0.0, 1.0)) -> Dataset:
    """Chat prompts with gold answers and reference rewards."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {i} plus 1?"}],
                "solution": str(i + 1),
                "reference_rewards": list(rewards),
            }
            for i in range(count)
        ]
    )
