"""`AStarPOConfig`: defaults, what it refuses, and that no option is silently ignored."""

import functools
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments
from trl import GRPOConfig

import astarpo.rollout
import astarpo.trainer
from astarpo.rollout.options import EngineOptions
from astarpo.trainer import AStarPOConfig, AStarPOTrainer, TurnOptions, ValueOptions
from astarpo.trainer.config import BYPASSED, NEUTRAL, REFUSED

OWN = {field.name for field in fields(AStarPOConfig)}
INHERITED = {field.name for field in fields(TrainingArguments)}
GRPO = {field.name for field in fields(GRPOConfig)} - INHERITED

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"beta1": 0.0}, "`beta1` must be positive"),
    ({"beta2": -1.0}, "`beta2` must be positive"),
    ({"beta": 0.1}, "KL temperature is `beta2`"),
    ({"num_value_samples": 0}, "num_value_samples"),
    ({"probe_rows": -1}, "probe_rows"),
    ({"engine_timeout_s": -1.0}, "engine_timeout_s"),
    ({"save_by": "yesterday"}, "neither a duration"),
    ({"loss_type": "grpo"}, "no importance ratio"),
    ({"epsilon": 0.3}, "no importance ratio"),
    ({"entropy_coef": -0.01}, "`entropy_coef` must be 0"),
    ({"use_adaptive_entropy": True}, "one fixed weight"),
    ({"mismatch_correction": "token"}, "Choose off or sequence_mis"),
    ({"scale_rewards": "group"}, "no groups"),
    ({"vllm_importance_sampling_correction": True}, "no importance ratio"),
    ({"sync_ref_model": True}, "frozen reference"),
    ({"mask_truncated_completions": True}, "require_eos"),
    ({"vllm_tensor_parallel_size": 2}, "EngineOptions"),
    ({"temperature": 0.0}, "greedy completions teach nothing"),
    ({"top_p": 0.9}, "`top_p=0.9`.*the distribution that is scored"),
    ({"top_k": 50}, "`top_k=50`"),
    ({"min_p": 0.1}, "min_p"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"num_iterations": 2}, "from the present policy"),
    ({"steps_per_generation": 4}, "from the present policy"),
    ({"trust_remote_code": True}, "no code that comes with a model"),
    ({"disable_dropout": False}, "sampling knows no dropout"),
]


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"value": "table"}, "Choose posterior or critic"),
    ({"value_prior": "net"}, "Choose constant or network"),
    ({"value_estimate": "median"}, "Choose optimal or mean"),
    ({"value_kappa": -1.0}, "value_kappa must be a number of at least 0"),
    ({"value_network": "runs/x"}, "set value_prior=network too"),
    ({"value": "critic", "value_tracking": True}, "value_tracking has no effect with value=critic"),
    ({"solved_between": [3, 2]}, "the lower one first"),
    ({"solved_between": [1, 9]}, r"between 0 and num_value_samples \(8\)"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_values_that_make_no_sense_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ValueOptions(**settings).solved_range(AStarPOConfig(str(tmp_path), bf16=False))
    with pytest.raises(ValueError, match="set one of the two"):
        ValueOptions(solved_between=[1, 8]).solved_range(
            AStarPOConfig(str(tmp_path), bf16=False, filter_all_incorrect=True)
        )


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_options_that_would_be_ignored_or_wrong_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        AStarPOConfig(str(tmp_path), **settings)


def test_defaults_are_the_papers(tmp_path):
    config = AStarPOConfig(str(tmp_path))
    assert (config.beta1, config.beta2, config.num_value_samples, config.temperature) == (0.5, 1e-3, 8, 1.0)


def test_what_says_the_same_as_a_star_po_is_taken(tmp_path):
    """A GRPO script that sets its options to what happens anyway runs as it is."""
    for name, values in NEUTRAL.items():
        assert name in REFUSED
        for value in values:
            AStarPOConfig(str(tmp_path), **{name: value})


def test_at_most_fifteen_own_fields():
    assert len(OWN - INHERITED - GRPO) <= 15


def test_every_field_of_grpo_has_an_answer():
    """Each is a field here too, or is refused in a sentence: none ends with Python's `unexpected keyword argument`."""
    assert REFUSED.keys() >= GRPO - OWN
    assert not REFUSED.keys() & OWN, "a refused option must not be a field"
    assert REFUSED.keys() <= GRPO, "it is no option of the installed TRL any more: take it out"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_each_refused_option_is_refused_by_name(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"`{name}='another'` is not an option of AStarPOConfig")):
        AStarPOConfig(str(tmp_path), **dict[str, Any]({name: "another"}))


SOURCES = {
    path: path.read_text(encoding="utf-8")
    for package in (astarpo.rollout, astarpo.trainer)
    for path in Path(str(package.__file__)).parent.rglob("*.py")
}


def is_read(name: str, definition: str) -> bool:
    """Whether a field is read, as an attribute or by its name in a string, outside the line that defines it."""
    reads = re.compile(rf"(?:args|options|self)\.{name}\b(?!\s*=[^=])|[\"']{name}[\"']")
    for path, source in SOURCES.items():
        if path.name == definition:
            source = re.sub(rf"^    {name}: .*\n", "", source, flags=re.MULTILINE)
        if reads.search(source):
            return True
    return False


OPTIONS = [
    *((name, "config.py") for name in sorted((OWN - INHERITED) | {"bf16", "gradient_checkpointing"})),
    *((field.name, "config.py") for field in fields(TurnOptions)),
    *((field.name, "config.py") for field in fields(ValueOptions)),
    *((field.name, "options.py") for field in fields(EngineOptions)),
]


@pytest.mark.parametrize(("name", "definition"), OPTIONS)
def test_every_own_option_is_read_somewhere(name, definition):
    assert is_read(name, definition), f"`{name}` is read nowhere: it would be silently ignored"


def test_the_search_would_find_an_option_that_nobody_reads():
    assert not is_read("an_option_that_nobody_reads", "config.py")


OTHER: dict[str, Any] = {
    "neftune_noise_alpha": 5.0,
    "train_sampling_strategy": "sequential",
    "include_for_metrics": ["loss"],
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "data_seed": 1,
    "length_column_name": "tokens",
    "liger_kernel_config": {"rope": True},
    "parallelism_config": {"cp_size": 2},
}
"""Values of bypassed options other than the one allowed; the rest are switches."""


@pytest.mark.parametrize("name", sorted(BYPASSED))
def test_options_that_the_trainer_bypasses_are_refused(name, tmp_path):
    if name not in INHERITED:
        pytest.skip(f"the installed transformers has no {name}")
    allowed, reason = BYPASSED[name]
    AStarPOConfig(str(tmp_path), **{name: allowed})
    assert getattr(AStarPOConfig(str(tmp_path)), name) in (allowed, None), "the default must be what is allowed"
    other = OTHER.get(name, not allowed)
    with pytest.raises(ValueError, match=re.escape(f"would have no effect: {reason}")) as error:
        AStarPOConfig(str(tmp_path), **{name: other})
    assert f"`{name}=" in str(error.value)


@functools.cache
def methods() -> dict[str, str]:
    """The source of every method of transformers' trainer."""
    return {name: inspect.getsource(method) for name, method in inspect.getmembers(Trainer, inspect.isfunction)}


def readers(name: str) -> set[str]:
    """Methods of transformers' trainer that read an option."""
    return {method for method, source in methods().items() if re.search(rf"\bargs\.{name}\b", source)}


REPLACED = {"get_train_dataloader", "get_batch_samples", "compute_loss", "prediction_step"}
"""Methods of transformers that the trainer overrides without calling them."""
UNREACHED = {"_get_train_sampler", "_get_num_items_in_batch"}
"""Methods that are called by those only."""
LOADER = "_get_dataloader"
"""Called for evaluation still, but not for training."""
NO_DIFFERENCE = {"dataloader_pin_memory"}
"""Options of a loader that do nothing where rows are Python objects."""


def test_the_lists_of_replaced_methods_are_right():
    for name in REPLACED:
        assert name in vars(AStarPOTrainer)
        assert f"super().{name}(" not in inspect.getsource(getattr(AStarPOTrainer, name))
    overridden = {name for name in vars(AStarPOTrainer) if name in vars(Trainer) and not name.startswith("__")}
    without_super = {
        name for name in overridden if f"super().{name}(" not in inspect.getsource(getattr(AStarPOTrainer, name))
    }
    assert without_super - REPLACED <= {"create_model_card", "_track_num_input_tokens"}


@pytest.mark.parametrize("name", sorted(INHERITED))
def test_no_option_of_transformers_is_silently_ignored(name):
    """What transformers reads only in methods that are replaced here is read here too, or refused."""
    found = readers(name)
    if name in BYPASSED or name in NO_DIFFERENCE or not found:
        return
    if found <= REPLACED | UNREACHED or (LOADER in found and found <= REPLACED | UNREACHED | {LOADER}):
        assert is_read(name, "config.py"), f"`{name}` is read by {sorted(found)} only, which are replaced"


def test_batches_that_accelerate_would_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split_batches"):
        AStarPOConfig(str(tmp_path), accelerator_config={"split_batches": True})
