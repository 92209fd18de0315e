"""Wrong uses of every command: each ends non-zero with one paragraph that names what is wrong, and without a traceback."""

import argparse
import json
from dataclasses import fields

import pytest
from commands import run
from journeys import astarpo, write_files
from transformers import TrainingArguments

import astarpo.cli as cli
from astarpo.cli import OptionGroup
from astarpo.rollout.memory.command import PlanOptions
from astarpo.rollout.options import (
    DataOptions,
    EngineOptions,
    EpisodeOptions,
    EvaluateOptions,
    ModelOptions,
    SampleOptions,
)
from astarpo.trainer.__main__ import options as train_options
from astarpo.trainer.calibrate import CalibrateOptions
from astarpo.trainer.config import REFUSED
from astarpo.trainer.export import ExportOptions
from astarpo.trainer.quickstart import QuickstartOptions

SAMPLING = [ModelOptions, DataOptions, EngineOptions]
COMMANDS = {
    "rollout": [*SAMPLING, SampleOptions, EpisodeOptions],
    "eval": [*SAMPLING, EvaluateOptions, EpisodeOptions],
    "train": train_options(),
    "export": [ExportOptions],
    "quickstart": [QuickstartOptions],
    "calibrate": [*SAMPLING, CalibrateOptions],
    "plan": [PlanOptions],
}
SHORT = ["--max_completion_length", "12", "--kv_cache_gb", "0.05", "--max_num_seqs", "16"]
NEEDED = {
    "rollout": [*SHORT, "--model_name_or_path", "m", "--dataset_name", "own.csv", "--output_dir", "o"],
    "eval": [*SHORT, "--model_name_or_path", "m", "--dataset_name", "own.csv", "--output", "o.json"],
    "train": [*SHORT, "--model_name_or_path", "m", "--dataset_name", "own.csv", "--output_dir", "o"],
    "export": ["--adapter", "a", "--output_dir", "merged"],
    "quickstart": [],
    "calibrate": ["--model_name_or_path", "m", "--dataset_name", "own.csv"],
    "plan": ["--model_name_or_path", "m"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's files, and some that are empty, broken, huge or no files at all."""
    folder = tmp_path_factory.mktemp("wrong")
    write_files(folder)
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.csv").write_text("")
    (folder / "broken.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n{oops\n')
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (folder / "binary.csv").write_bytes(bytes(range(256)))
    (folder / "lists.jsonl").write_text("[1, 2]\n")
    with (folder / "huge.jsonl").open("w") as file:  # one line of 30 MB, cut off
        file.write('{"question": "' + "x" * 30_000_000)
    (folder / "folder.jsonl").mkdir()
    (folder / "empty.yaml").write_text("")
    (folder / "broken.yaml").write_text("a: [1\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "empty.json").write_text("")
    (folder / "other.json").write_text(json.dumps({"samples": 3}))
    (folder / "pool").mkdir()
    (folder / "pool" / "manifest.json").write_text("{")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


def is_one_paragraph(ended) -> bool:
    """The error is one message: no traceback, and no more lines than a list of what differs needs."""
    said = ended.err[ended.err.find("error:") :]
    return ended.code not in (0, None) and "Traceback" not in ended.err and "error:" in ended.err and len(said) < 3000


def actions_of(command: str) -> list[argparse.Action]:
    types = [group.options if isinstance(group, OptionGroup) else group for group in COMMANDS[command]]
    return [action for action in cli._parser(types)._actions if action.option_strings and action.nargs != 0]


def wrong_word(action: argparse.Action) -> str | None:
    """A word that an option cannot take by its type; None where any text is one."""
    if action.choices:
        return "zzz"
    name = getattr(action.type, "__name__", "str")
    return {"int": "many", "float": "much", "string_to_bool": "maybe"}.get(name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_refuses_a_value_of_another_type(command, folder):
    bad, tried = [], 0
    for action in actions_of(command):
        word = wrong_word(action)
        if word is None or action.dest in REFUSED or action.dest.startswith("no_"):
            continue
        tried += 1
        ended = astarpo(command, *NEEDED[command], f"--{action.dest}", word, cwd=folder)
        if not (is_one_paragraph(ended) and action.dest in ended.err):
            bad.append((action.dest, ended.code, ended.err[-300:]))
    assert not bad
    assert tried >= {"train": 100, "rollout": 15, "eval": 15, "plan": 10, "calibrate": 10}.get(command, 1)


TEXTS = {
    # For each option of the project's own that takes any text: a wrong value, and what the message says.
    "model_name_or_path": ("nobody/nothing", "could not be found"),
    "adapter": ("nowhere", "Adapter `nowhere`"),
    "start_from_adapter": ("nowhere", "Adapter `nowhere`"),
    "dataset_name": ("nowhere.csv", "does not exist"),
    "datasets": ("own.csv=heavy", "is not a number"),
    "eval_dataset_name": ("nowhere.jsonl", "does not exist"),
    "exclude_dataset_name": ("nowhere.jsonl", "does not exist"),
    "dataset_config": None,  # of a hub id alone
    "dataset_split": None,
    "model_revision": None,
    "prompt_column": ("nothing", "no column `nothing`"),
    "gold_column": ("nothing", "no column `nothing`"),
    "prompt_template": ("no place", "has no {question}"),
    "chat_template_kwargs": ("{oops", "JSON"),
    "reward_funcs": ("nowhere.function", "no module `nowhere`"),
    "reward_weights": None,  # numbers
    "episode": ("PAG", "There is no kind of episode"),
    "pool": ("nowhere", "pool"),
    "save_by": ("yesterday", "save_by"),
    "server_url": None,
    "ray_address": None,
    "adapter_dir": None,
    "dtype": ("int3", "dtype"),
    "system_prompt": None,  # any text is one
    "verify_prompt": None,
    "revise_prompt": None,
    "value_network": ("nowhere", "value_network"),
    "output_dir": None,
    "output": None,
    "hub_model_id": None,
    "recipe": ("nowhere", "invalid choice"),
    "speeds": ("nowhere.json", "nowhere.json"),
    "gpu": ("a calculator", "a calculator"),
    "lora_target_modules": None,
    "target_modules": None,
    "model_init_kwargs": None,
    "vllm_mode": None,
}
SPECIAL = {
    ("plan", "model_name_or_path"): ("nobody/nothing", "could not be read"),
    ("plan", "dataset_name"): ("nowhere.csv", ""),  # only how many problems it has is looked up
    ("plan", "dtype"): ("int3", "int3"),
    ("eval", "datasets"): ("own.csv=1", "Evaluate one data set at a time"),
}
RUNS_WITHOUT_MODEL = ("rollout", "eval", "train", "plan", "quickstart")


def own_texts(command: str) -> list[str]:
    """The command's options that take any text and are not transformers' own."""
    inherited = {field.name for field in fields(TrainingArguments)}
    found = [a.dest for a in actions_of(command) if wrong_word(a) is None]
    hidden = {name for group in COMMANDS[command] if isinstance(group, OptionGroup) for name in group.hidden}
    return [name for name in found if name not in inherited and name not in REFUSED and name not in hidden]


def test_every_text_of_our_own_is_in_the_table():
    assert not [(c, name) for c in COMMANDS for name in own_texts(c) if name not in TEXTS]


@pytest.mark.parametrize("command", RUNS_WITHOUT_MODEL)
def test_every_text_that_can_be_wrong_is_refused_before_anything_is_written(command, folder, tiny_model):
    bad = []

    def there() -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.name not in ("o", "runs", "__pycache__"))

    before = there()
    for name in own_texts(command):
        if TEXTS[name] is None:
            continue
        value, said = SPECIAL.get((command, name)) or TEXTS[name]
        if not said:
            continue
        words = [tiny_model if word == "m" else word for word in NEEDED[command]]
        if f"--{name}" in words:
            place = words.index(f"--{name}")
            words[place : place + 2] = []
        if name == "datasets" and "--dataset_name" in words:
            place = words.index("--dataset_name")
            words[place : place + 2] = []
        ended = astarpo(command, *words, f"--{name}", value, cwd=folder)
        if not (is_one_paragraph(ended) and said in ended.err):
            bad.append((name, ended.code, ended.err[-400:]))
    assert not bad
    assert there() == before


NUMBERS = [
    ("rollout", "num_samples", "0"),
    ("rollout", "temperature", "-1"),
    ("rollout", "max_completion_length", "0"),
    ("rollout", "limit", "0"),
    ("rollout", "max_prompt_length", "0"),
    ("rollout", "kv_cache_gb", "0"),
    ("rollout", "max_num_seqs", "0"),
    ("rollout", "shard_rows", "0"),
    ("rollout", "verifier_workers", "0"),
    ("eval", "temperature", "-1"),
    ("eval", "top_p", "0"),
    ("eval", "top_p", "1.5"),
    ("eval", "num_samples", "0"),
    ("eval", "show", "-1"),
    ("train", "beta1", "0"),
    ("train", "beta2", "-1"),
    ("train", "temperature", "0"),
    ("train", "num_value_samples", "0"),
    ("train", "eval_limit", "0"),
    ("train", "entropy_coef", "-1"),
    ("train", "value_kappa", "-1"),
    ("quickstart", "max_steps", "0"),
    ("quickstart", "warm_up_steps", "-1"),
    ("calibrate", "lora_r", "0"),
    ("plan", "budget_gb", "0"),
    ("plan", "max_completion_length", "0"),
]


@pytest.mark.parametrize(("command", "name", "value"), NUMBERS)
def test_a_number_out_of_range_is_refused(command, name, value, folder, tiny_model):
    words = [tiny_model if word == "m" else word for word in NEEDED[command]]
    ended = astarpo(command, *words, f"--{name}", value, cwd=folder)
    assert is_one_paragraph(ended) and name in ended.err, ended.err[-500:]


EXCLUDING = [
    ("rollout", ["--datasets", "own.csv=1"], "both --dataset_name and --datasets"),
    ("eval", ["--num_samples", "3"], "Greedy decoding gives the same sample"),
    ("eval", ["--datasets", "own.csv=1"], "both --dataset_name and --datasets"),
    ("rollout", ["--datasets", "own.csv=1", "more.jsonl"], "both"),
    ("train", ["--eval_steps", "2", "--eval_strategy", "steps"], "--eval_dataset_name"),
    ("train", ["--eval_limit", "2"], "--eval_dataset_name"),
    ("train", ["--value", "critic", "--value_tracking"], "value_tracking has no effect"),
    ("train", ["--value_network", "somewhere"], "value_prior=network"),
    ("train", ["--solved_between", "1", "3", "--filter_all_incorrect"], "set one of the two"),
    ("train", ["--turn_weights", "1", "2"], "turn_weights must be"),
    ("train", ["--balance_labels"], "has no effect on completions"),
    ("train", ["--reward_weights", "1", "2"], "must match number of reward functions"),
    ("train", ["--fp16", "--bf16", "true"], "fp16"),
    ("train", ["--top_p", "0.9"], "--top_p` is refused"),
    ("train", ["--num_iterations", "2"], "for training in rounds"),
    ("train", ["--loss_type", "dapo"], "is refused"),
    ("train", ["--engine", "ray"], "Ray makes reference samples"),
    ("rollout", ["--prompt_template", "Q", "--system_prompt", "S"], "has no {question}"),
    ("quickstart", ["--warm_up_steps", "3"], "set --recipe quickstart_pag"),
]


@pytest.mark.parametrize(("command", "words", "said"), EXCLUDING, ids=[" ".join([c, *w]) for c, w, _ in EXCLUDING])
def test_options_that_exclude_each_other_are_refused(command, words, said, folder, tiny_model):
    needed = [tiny_model if word == "m" else word for word in NEEDED[command]]
    ended = astarpo(command, *needed, *words, cwd=folder)
    assert is_one_paragraph(ended) and said in ended.err, ended.err[-800:]


FILES = [
    ("rollout", "--dataset_name", "nowhere.jsonl", "does not exist"),
    ("rollout", "--dataset_name", "empty.jsonl", "is empty"),
    ("rollout", "--dataset_name", "empty.csv", "is empty"),
    ("rollout", "--dataset_name", "broken.jsonl", "line 2 is not valid JSON"),
    ("rollout", "--dataset_name", "broken.parquet", "broken.parquet"),
    ("rollout", "--dataset_name", "binary.csv", "binary.csv"),
    ("rollout", "--dataset_name", "lists.jsonl", "is not a JSON object"),
    ("rollout", "--dataset_name", "huge.jsonl", "line 1 is not valid JSON"),
    ("rollout", "--dataset_name", "folder.jsonl", "does not exist"),
    ("eval", "--dataset_name", "empty.jsonl", "is empty"),
    ("train", "--eval_dataset_name", "empty.jsonl", "is empty"),
    ("train", "--pool", "nowhere", "is not a reference pool"),
    ("train", "--pool", "pool", "cannot be read"),
    ("train", "--config", "nowhere", "neither a file nor"),
    ("train", "--config", "empty.yaml", "must hold `key: value` lines"),
    ("train", "--config", "broken.yaml", "is not valid YAML"),
    ("train", "--config", "list.yaml", "must hold `key: value` lines"),
    ("eval", "--adapter", "adapter", "holds no LoRA adapter"),
    ("export", "--adapter", "pool", "is not an adapter"),
    ("export", "--adapter", "adapter", "adapter"),
]


@pytest.mark.parametrize(("command", "option", "file", "said"), FILES, ids=[" ".join(one[:3]) for one in FILES])
def test_a_file_that_is_missing_empty_broken_or_huge_is_named(command, option, file, said, folder, tiny_model):
    words = [tiny_model if word == "m" else word for word in NEEDED[command]]
    if option in words:
        place = words.index(option)
        words[place : place + 2] = []
    ended = astarpo(command, *words, option, file, cwd=folder)
    assert is_one_paragraph(ended) and said in ended.err, ended.err[-800:]


POOL = [
    (["pool", "check", "nowhere"], "is not a reference pool"),
    (["pool", "check", "pool"], "cannot be read"),
    (["pool", "regrade", "nowhere"], "is not a reference pool"),
    (["pool", "summary", "nowhere"], "is not a reference pool"),
    (["pool", "publish", "nowhere", "me/x"], "HF_HUB_OFFLINE"),
    (["pool", "import", "nowhere.jsonl", "--columns", "e*", "--output_dir", "o"], "does not exist"),
    (["eval", "compare", "empty.json", "empty.json"], "is not a report"),
    (["eval", "compare", "other.json", "other.json"], "is not a report"),
    (["verify", "--input", "nowhere.jsonl", "--output", "o.jsonl"], "does not exist"),
    (["recipe", "nowhere"], "There is no recipe"),
    (["completions", "pool"], "holds no completions"),
]


@pytest.mark.parametrize(("words", "said"), POOL, ids=[" ".join(words) for words, _ in POOL])
def test_commands_on_pools_and_reports_name_what_is_wrong(words, said, folder):
    ended = astarpo(*words, cwd=folder)
    assert is_one_paragraph(ended) and said in ended.err, ended.err[-800:]


@pytest.mark.slow
def test_ten_of_them_as_processes(folder, tiny_model):
    tried = [(c, [o, f], s) for c, o, f, s in FILES if (c, o) != ("export", "--adapter")][:6] + EXCLUDING[:4]
    for command, words, said in tried:
        needed = [tiny_model if word == "m" else word for word in NEEDED[command]]
        if words[0] in needed:
            place = needed.index(words[0])
            needed[place : place + 2] = []
        ended = run("__main__", command, *needed, *words, cwd=folder, check=False)
        assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr, ended.stderr[-800:]
