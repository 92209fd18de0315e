"""`AStarPOConfig`: defaults, and what it refuses."""

import pytest

from astarpo.trainer import AStarPOConfig

REFUSED = [
    ({"beta1": 0.0}, "`beta1` must be positive"),
    ({"beta2": -1.0}, "`beta2` must be positive"),
    ({"beta": 0.1}, "Set beta2"),
    ({"num_generations": 8}, "one completion per prompt"),
    ({"num_value_samples": 0}, "num_value_samples"),
    ({"probe_rows": -1}, "probe_rows"),
    ({"loss_type": "grpo"}, "no importance ratio"),
    ({"epsilon": 0.3}, "no importance ratio"),
    ({"entropy_coef": 0.01}, "no entropy term"),
    ({"scale_rewards": "group"}, "scale_rewards"),
    ({"vllm_importance_sampling_correction": True}, "must stay"),
    ({"sync_ref_model": True}, "frozen reference"),
    ({"mask_truncated_completions": True}, "require_eos"),
    ({"vllm_gpu_memory_utilization": 0.5}, "EngineOptions"),
    ({"temperature": 0.0}, "greedy completions teach nothing"),
    ({"top_p": 0.9}, "top_p=0.9 would sample from another distribution"),
    ({"top_k": 50}, "top_k=50"),
    ({"min_p": 0.1}, "min_p"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"num_iterations": 2}, "older policy"),
    ({"steps_per_generation": 4}, "older policy"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_options_that_would_be_ignored_or_wrong_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        AStarPOConfig(str(tmp_path), **settings)


def test_defaults_are_the_papers(tmp_path):
    config = AStarPOConfig(str(tmp_path))
    assert (config.beta1, config.beta2, config.num_value_samples, config.temperature) == (0.5, 1e-3, 8, 1.0)
    assert (config.num_generations, config.scale_rewards) == (1, "none")
    assert config.beta == config.beta2, "TRL computes reference log-probs only when beta is not 0"
    assert type(config.num_generations) is int


def test_at_most_fifteen_own_fields():
    from dataclasses import fields

    from trl import GRPOConfig

    inherited = {field.name for field in fields(GRPOConfig)}
    assert len([field for field in fields(AStarPOConfig) if field.name not in inherited]) <= 15
