"""Scripts as TRL's users write them: TRL's own GRPO script with nothing changed but the two class names, and shorter ones."""

import ast
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl_helpers import chat_rows, load_model, vowels

RENAMED = {"GRPOTrainer": "AStarPOTrainer", "GRPOConfig": "AStarPOConfig"}


class _OtherClasses(ast.NodeTransformer):
    """Puts our two classes where TRL's stand, and imports them from here."""

    def visit_Name(self, node: ast.Name) -> ast.Name:
        node.id = RENAMED.get(node.id, node.id)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        ours = [ast.alias(RENAMED[one.name]) for one in node.names if one.name in RENAMED]
        node.names = [one for one in node.names if one.name not in RENAMED]
        imports = [*([node] if node.names else []), *([ast.ImportFrom("astarpo.trainer", ours, 0)] if ours else [])]
        return imports


@pytest.fixture(scope="module")
def grpo_script(tmp_path_factory) -> str:
    """`trl/scripts/grpo.py` of the TRL that is installed, which `trl grpo` runs."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "scripts" / "grpo.py").read_text(encoding="utf-8")
    tree = ast.fix_missing_locations(_OtherClasses().visit(ast.parse(source)))
    changed = ast.unparse(tree)
    assert "AStarPOTrainer(" in changed and "AStarPOConfig," in changed
    assert "GRPOTrainer" not in changed and "GRPOConfig" not in changed
    path = tmp_path_factory.mktemp("scripts") / "grpo.py"
    path.write_text(changed, encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(tmp_path, monkeypatch) -> str:
    """A data set in a folder, as GRPO takes it: prompts and gold answers, and nothing of the reference."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 2)):
        table = chat_rows(count).remove_columns("reference_rewards")
        lines = [json.dumps(row) for row in table.to_list()]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script in this process, as `python SCRIPT ARGUMENTS` in a folder of its own; it gives the script's names."""

    def run_script(script: str, *arguments: object) -> dict[str, Any]:
        (tmp_path / "my_rewards.py").write_text(
            "def longer(completions, **kwargs):\n    return [len(c[0]['content']) / 8 for c in completions]\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(Path(script).parent), *sys.path])
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
        return runpy.run_path(script, run_name="__main__")

    return run_script


def small(model: str, rows: str, folder: Path) -> list[object]:
    """The command line that all runs of the script share."""
    shared: dict[str, object] = {
        "model_name_or_path": model,
        "dataset_name": rows,
        "output_dir": folder,
        "reward_funcs": "my_rewards.longer",
        "max_completion_length": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "num_value_samples": 2,
        "require_eos": "false",  # a random model hardly ever ends
        "report_to": "none",
        "bf16": "false",
        "logging_steps": 1,
    }
    return [part for name, value in shared.items() for part in (f"--{name}", value)]


def history(folder: Path) -> list[dict[str, Any]]:
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text(encoding="utf-8"))["log_history"]


def test_grpo_script_with_an_adapter(tiny_model, tmp_path, rows, run, grpo_script, engine, monkeypatch):
    """`get_peft_config` with its defaults, and what the examples of TRL's documentation set beside it; sampled by vLLM."""
    folder = tmp_path / "run"
    monkeypatch.setattr("astarpo.rollout.EngineOptions.__init__", _small_engine())
    script = ["--use_peft", "--use_vllm", "--vllm_mode", "colocate", "--vllm_gpu_memory_utilization", 0.3]
    script += ["--num_generations", 8, "--log_completions", "--eval_strategy", "steps", "--eval_steps", 2]
    with pytest.warns(UserWarning, match="num_generations"):
        run(grpo_script, *small(tiny_model, rows, folder), *script)
    adapter: Any = PeftModel.from_pretrained(load_model(tiny_model), folder)
    assert adapter.peft_config["default"].r == 16
    moved = [p for name, p in adapter.named_parameters() if "lora_B" in name and bool(p.any())]
    assert moved
    entries = history(folder)
    assert len([entry for entry in entries if "rewards/longer/mean" in entry]) == 2
    assert any("eval_reward" in entry for entry in entries)
    assert (folder / "completions" / "completions_00002.parquet").exists()


def _small_engine():
    """`EngineOptions()` with a cache of 50 MB: the script, as TRL's, says nothing of the engine's sizes."""
    from astarpo.rollout import EngineOptions

    init = EngineOptions.__init__

    def __init__(self, *args, **kwargs):
        init(self, *args, **{"kv_cache_gb": 0.05, "max_num_seqs": 16, **kwargs})

    return __init__


def test_grpo_script_without_an_adapter(tiny_model, tmp_path, rows, run, grpo_script):
    """All weights, a reward of TRL's beside the user's own, `generate` of transformers."""
    folder = tmp_path / "run"
    line = [*small(tiny_model, rows, folder), "--use_vllm", "false", "--reward_weights", "1.0", "0.5"]
    line.insert(line.index("my_rewards.longer"), "think_format_reward")
    run(grpo_script, *line)
    before, after = load_model(tiny_model), AutoModelForCausalLM.from_pretrained(folder)
    assert after.dtype == torch.float32
    assert any(not torch.equal(p, after.get_parameter(name)) for name, p in before.named_parameters())
    entry = next(entry for entry in history(folder) if "rewards/think_format_reward/mean" in entry)
    assert entry["reward"] == pytest.approx(0.5 * entry["rewards/longer/mean"], abs=1e-3)


def test_grpo_script_with_a_recipe(tiny_model, tmp_path, rows, run, grpo_script):
    """`--config recipe.yaml`, as TRL's command line is mostly used."""
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    settings = {
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.1,
        "use_vllm": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "num_generations": 8,
        "model_init_kwargs": {"dtype": "float32"},
    }
    recipe.write_text(yaml.safe_dump(settings))
    with pytest.warns(UserWarning, match="num_generations"):
        run(grpo_script, "--config", recipe, *small(tiny_model, rows, folder))
    adapter: Any = PeftModel.from_pretrained(load_model(tiny_model), folder)
    assert set(adapter.peft_config["default"].target_modules) == {"q_proj", "v_proj"}


def test_a_script_of_a_few_lines(tiny_model, tmp_path, rows, run):
    """TRL's quick start, with our class; `math_reward` stands where `accuracy_reward` does there."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from datasets import load_dataset\n"
        "from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config\n"
        "from astarpo.trainer import AStarPOConfig, AStarPOTrainer\n"
        "from astarpo.verifier import math_reward\n"
        "from my_rewards import longer\n\n"
        "if __name__ == '__main__':\n"
        "    parser = TrlParser((ScriptArguments, AStarPOConfig, ModelConfig))\n"
        "    script_args, training_args, model_args = parser.parse_args_and_config()\n"
        "    dataset = load_dataset(script_args.dataset_name)\n"
        "    trainer = AStarPOTrainer(\n"
        "        model=model_args.model_name_or_path,\n"
        "        reward_funcs=[math_reward, longer],\n"
        "        args=training_args,\n"
        "        train_dataset=dataset[script_args.dataset_train_split],\n"
        "        eval_dataset=dataset[script_args.dataset_test_split],\n"
        "        quantization_config=get_quantization_config(model_args),\n"
        "        peft_config=get_peft_config(model_args),\n"
        "    )\n"
        "    trainer.train()\n"
        "    metrics = trainer.evaluate()\n"
        "    trainer.save_model(training_args.output_dir)\n"
    )
    line = small(tiny_model, rows, tmp_path / "run")
    at = line.index("--reward_funcs")
    names = run(str(script), *line[:at], *line[at + 2 :], "--use_vllm", "false", "--use_peft")
    assert "eval_rewards/math_reward/mean" in names["metrics"]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_trl_rewards_are_rewards(tiny_model, tmp_path, make_rows=chat_rows):
    """TRL's own reward functions, as objects."""
    from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward
    from trl_helpers import logged, make

    overlong = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4)
    trainer = make(tiny_model, tmp_path, make_rows(), [accuracy_reward, think_format_reward, overlong, vowels])
    trainer.train()
    for name in ("accuracy_reward", "think_format_reward", "soft_overlong_punishment_reward", "vowels"):
        assert len(logged(trainer, f"rewards/{name}/mean")) == 1
