"""The commands as a user runs them, on the tiny model."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from commands import SMALL, run, wait_for
from helpers import solved_shards
from transformers import TrainingArguments

from astarpo.cli import OptionGroup, config_names, parse_command
from astarpo.rollout.options import (
    DataOptions,
    EngineOptions,
    EpisodeOptions,
    EvaluateOptions,
    ModelOptions,
    SampleOptions,
)
from astarpo.rollout.pag import episode_kind
from astarpo.trainer.__main__ import options as train_options
from astarpo.trainer.__main__ import refused_options

PROBLEMS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return folder


@pytest.fixture(scope="module")
def pool(folder, tiny_model):
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--num_samples", 4, *SMALL]
    finished = run("rollout", *words, "--output_dir", "pool", cwd=folder)
    assert "24/24" in finished.stdout
    assert "never solved" in finished.stdout
    again = run("rollout", *words, "--output_dir", "pool", cwd=folder)
    assert "complete already" in again.stdout
    changed = run("rollout", *words, "--output_dir", "pool", "--seed", 5, cwd=folder, check=False)
    assert changed.returncode == 2
    assert "seed: 0 in the pool, 5 asked for" in changed.stderr
    return folder / "pool"


@pytest.fixture(scope="module")
def solved_pool(pool):
    """A copy with rewards: the random model solves nothing, and stage 2 needs something to do."""
    solved = pool.parent / "solved"
    shutil.copytree(pool, solved)
    solved_shards(solved)
    return solved


@pytest.mark.parametrize("name", ["report.html", "folder"])
def test_an_evaluation_whose_report_cannot_be_written_does_not_begin(folder, tiny_model, name):
    (folder / "folder").mkdir(exist_ok=True)
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--output", name]
    refused = run("rollout.evaluate_cli", *words, *SMALL, cwd=folder, check=False)
    assert refused.returncode == 2 and "must be a file for the JSON report" in refused.stderr


@pytest.mark.slow
def test_training_and_evaluation_end_with_a_summary(folder, tiny_model, solved_pool):
    words = ["--model_name_or_path", tiny_model, "--pool", solved_pool, "--num_value_samples", 4, "--max_steps", 2]
    words += ["--per_device_train_batch_size", 2, "--report_to", "none", "--output_dir", "out", "--logging_steps", 1]
    words += ["--bf16", "false", "--gradient_checkpointing", "false"]
    trained = run("trainer", *words, *SMALL, cwd=folder)
    assert "2 logged updates" in trained.stdout
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert (folder / "out" / "reward.png").read_bytes()[:4] == b"\x89PNG"

    words = ["--model_name_or_path", tiny_model, "--adapter", "out", "--dataset_name", "d.jsonl", "--temperature", 1]
    words += ["--num_samples", 3, "--output", "deep/eval.json", "--show", 1]
    evaluated = run("rollout.evaluate_cli", *words, *SMALL, cwd=folder)
    assert "pass@3" in evaluated.stdout
    report = json.loads((folder / "deep" / "eval.json").read_text())
    assert {"accuracy", "avg_at_k", "pass_at_k", "ci95", "num_problems", "outcomes"} <= report.keys()
    assert report["num_problems"] == 6
    assert len(report["samples"]) == sum(report["outcomes"].values()) == 18


@pytest.mark.slow
def test_an_unsolved_pool_is_refused_before_the_engine_loads(folder, tiny_model, tmp_path):
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--limit", 2, "--num_samples", 1]
    run("rollout", *words, *SMALL, "--output_dir", tmp_path / "p", cwd=folder)
    words = ["--model_name_or_path", tiny_model, "--pool", tmp_path / "p", "--num_value_samples", 1]
    finished = run("trainer", *words, *SMALL, "--output_dir", tmp_path / "o", cwd=folder, check=False)
    assert finished.returncode == 2
    assert "never solved any of the 2 prompts" in finished.stderr
    assert "Loading safetensors checkpoint" not in finished.stderr


BAD_INPUT = [
    (["--model_name_or_path", "nobody/no-model", "--dataset_name", "d.jsonl"], "Model `nobody/no-model`"),
    (["--model_name_or_path", "TINY", "--dataset_name", "none.jsonl"], "does not exist"),
    (["--model_name_or_path", "TINY", "--dataset_name", "d.jsonl", "--gold_column", "x"], "no column `x`"),
    (["--model_name_or_path", "TINY", "--dataset_name", "d.jsonl", "--max_model_len", "20"], "--max_model_len"),
    (["--model_name_or_path", "TINY", "--dataset_name", "d.jsonl", "--max_prompt_length", "9"], "longer than 9"),
    (["--config", "bad.yaml", "--model_name_or_path", "TINY", "--dataset_name", "d.jsonl"], "does not know: `oops`"),
    (["--config", "nowhere", "--model_name_or_path", "TINY", "--dataset_name", "d.jsonl"], "neither a file nor"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_is_one_paragraph_before_the_engine_loads(folder, tiny_model, tmp_path, words, message):
    (folder / "bad.yaml").write_text("num_samples: 2\nrollout:\n  oops: 1\n")
    words = [tiny_model if word == "TINY" else word for word in words]
    finished = run("rollout", *words, "--output_dir", tmp_path / "p", cwd=folder, check=False)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "Loading safetensors checkpoint" not in finished.stderr


@pytest.mark.slow
def test_interrupting_a_rollout_leaves_a_pool_to_continue(folder, tiny_model, tmp_path):
    words = ["--model_name_or_path", tiny_model, "--dataset_name", "d.jsonl", "--num_samples", 300, *SMALL]
    words += ["--output_dir", str(tmp_path / "p")]
    command = [sys.executable, "-m", "astarpo.rollout", *map(str, words)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: list((tmp_path / "p").glob("samples-*.parquet")))
    process.terminate()  # SIGINT is ignored by whatever a shell starts in the background, pytest included
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr[-2000:]
    assert "again to continue" in stderr
    finished = run("rollout", *words, cwd=folder)
    assert "samples are there already" in finished.stdout
    manifest = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert sum(shard["rows"] for shard in manifest["shards"]) == 1800


@pytest.mark.slow
def test_interrupting_training_leaves_a_checkpoint_to_resume(folder, tiny_model, solved_pool, tmp_path):
    words = ["--model_name_or_path", tiny_model, "--pool", solved_pool, "--num_value_samples", 4]
    words += ["--per_device_train_batch_size", 2, "--report_to", "none", "--logging_steps", 1, "--bf16", "false"]
    words += ["--lr_scheduler_type", "constant", "--output_dir", tmp_path]
    command = [sys.executable, "-m", "astarpo.trainer", *map(str, [*words, *SMALL]), "--max_steps", "5000"]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        wait_for(process, lambda: "reward" in log.read_text())
        process.send_signal(2)
        assert process.wait(timeout=120) == 130, log.read_text()[-2000:]
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert f"interrupted after update {step}" in log.read_text()
    resumed = run("trainer", *words, *SMALL, "--max_steps", step + 1, cwd=folder)
    assert f"{step + 1} logged updates" in resumed.stdout


def test_a_value_without_effect_is_refused(folder, tiny_model, solved_pool, tmp_path):
    words = ["--model_name_or_path", tiny_model, "--pool", solved_pool, "--output_dir", tmp_path]
    finished = run("trainer", *words, "--value", "critic", "--value_tracking", "true", cwd=folder, check=False)
    assert finished.returncode == 2 and "value_tracking has no effect with value=critic" in finished.stderr


def test_verify_streams_skips_bad_lines_and_says_so(tmp_path):
    lines = [json.dumps({"id": i, "completion": rf"\boxed{{{i}}}", "gold": "1"}) for i in range(3)]
    bad = [
        "{oops",
        '{"id": 9}',
        "[1]",
        '{"id": 9, "completion": 5, "gold": "1"}',
        "[" * 50_000,
        "1" * 5_000,
        "\x00",
        '"\xff',
    ]
    last = json.dumps({"id": "last", "completion": "\ud800 \\boxed{1}", "gold": 1})
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, *bad, "", last]) + "\n", encoding="latin-1")
    finished = run("verifier", "--input", "in.jsonl", "--output", "out.jsonl", cwd=tmp_path, check=False)
    assert finished.returncode == 1
    assert "line 4 skipped" in finished.stderr
    assert f"{len(bad)} lines skipped, the first is line 4" in finished.stderr
    assert "correct" in finished.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, "last"]
    assert [row["outcome"] for row in rows] == ["wrong", "correct", "wrong", "correct"]
    assert set(rows[0]) == {"id", "outcome", "correct", "answer", "seconds"}


def test_verify_refuses_to_overwrite_its_input(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "completion": "5", "gold": "5"}\n')
    for words, message in [
        (["--output", "in.jsonl"], "would overwrite"),
        (["--output", "nowhere/out.jsonl"], "does not exist"),
        (["--output", "out.jsonl", "--workers", "0"], "workers >= 1"),
    ]:
        finished = run("verifier", "--input", "in.jsonl", *words, cwd=tmp_path, check=False)
        assert finished.returncode == 2
        assert message in finished.stderr
    assert (tmp_path / "in.jsonl").read_text()


@pytest.mark.parametrize("recipe", config_names())
def test_every_recipe_parses_for_every_command(recipe, tmp_path):
    given = ["--model_name_or_path", "m", "--config", recipe]
    data, out = ["--dataset_name", "d"], ["--output_dir", str(tmp_path)]
    types = [ModelOptions, DataOptions, SampleOptions, EngineOptions, EpisodeOptions]
    _, _, sample, _, episodes = parse_command(
        types, section="rollout", prog="", description="", argv=[*given, *data, *out]
    )
    types[2] = EvaluateOptions
    words = [*given, *data, "--output", "x"]
    _, _, evaluation, _, judged = parse_command(types, section="eval", prog="", description="", argv=words)
    _, args, _, _, _, turns, _, _ = parse_command(
        train_options(), section="train", prog="", description="", argv=[*given, *out], refused=refused_options()
    )
    assert sample.max_completion_length == args.max_completion_length == evaluation.max_completion_length
    assert (sample.temperature, sample.require_eos) == (args.temperature, args.require_eos)
    assert episode_kind(episodes) == episode_kind(judged) == episode_kind(turns)
    assert (episodes.episode == "pag") == recipe.endswith("_pag")


@pytest.mark.parametrize(
    "line", ["engine: vlm", "overlong_prompts: eror", "policy_link: inlin", "verdict_parser: Lenient"]
)
def test_a_misspelt_choice_in_a_recipe_is_refused(line, tmp_path):
    (tmp_path / "own.yaml").write_text(f"model_name_or_path: m\n{line}\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--dataset_name", "d", "--output_dir", str(tmp_path)]
    types = [ModelOptions, DataOptions, SampleOptions, EngineOptions, EpisodeOptions]
    name, value = line.split(": ")
    with pytest.raises(ValueError, match=f"{name} `{value}`. Choose one of"):
        parse_command(types, section="rollout", prog="", description="", argv=words)


def test_a_misspelt_kind_of_episode_is_refused():
    """It has no list of choices, because a kind may come from a module of the user's."""
    with pytest.raises(ValueError, match="There is no kind of episode `PAG`"):
        episode_kind(EpisodeOptions("PAG"))


FRONT = {
    "rollout": ("rollout", "--config"),
    "train": ("trainer", "--config"),
    "eval": ("rollout.evaluate_cli", "--config"),
    "plan": ("rollout.memory.command", "--config"),
    "quickstart": ("trainer.quickstart", "--config"),
    "verify": ("verifier", "--input"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FRONT)
def test_help_is_there(name, tmp_path):
    module, option = FRONT[name]
    alone, front = (run(*words, "--help", cwd=tmp_path, COLUMNS="80") for words in ((module,), ("__main__", name)))
    assert option in alone.stdout
    assert "usage: astarpo-" in alone.stdout or name == "quickstart"
    assert f"usage: astarpo {name}" in front.stdout
    assert front.stdout.splitlines()[2:] == alone.stdout.splitlines()[2:]
    assert name != "train" or len(alone.stdout.splitlines()) < 150


def test_help_that_nobody_reads_to_its_end():
    ended = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m astarpo train --help_all | head -n 1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.startswith("usage: astarpo train") and "Traceback" not in ended.stderr
    assert ended.stderr == "" or "broken pipe" in ended.stderr


def test_the_front_command_lists_its_subcommands(pool, tmp_path):
    shown = run("__main__", cwd=tmp_path).stdout
    assert [line.split()[0] for line in shown.splitlines()[2:]] == [
        "quickstart", "rollout", "train", "eval", "export", "completions", "verify", "recipe", "env", "plan", "calibrate", "pool"
    ]  # fmt: skip
    for words, message in [
        (["trian"], "`trian` is not a command of `astarpo`. Did you mean `train`? Commands: quickstart, rollout"),
        (["pool", "chek"], "Did you mean `check`? Commands: check, regrade, summary, publish, import."),
    ]:
        finished = run("__main__", *words, cwd=tmp_path, check=False)
        assert finished.returncode == 2
        assert message in finished.stderr and "Traceback" not in finished.stderr
    checked, older = run("__main__", "pool", "check", pool, cwd=tmp_path), run("rollout", "verify", pool, cwd=tmp_path)
    assert "24 of 24 samples" in checked.stdout
    assert checked.stdout == older.stdout


def test_recipes_and_files_for_accelerate_are_found(tmp_path):
    listed = run("__main__", "recipe", cwd=tmp_path).stdout.split()
    assert {"t4_math", "t4_small", "accelerate/ddp", "accelerate/fsdp2"} <= set(listed)
    path = Path(run("__main__", "recipe", "accelerate/ddp", cwd=tmp_path).stdout.strip())
    assert "distributed_type" in path.read_text()
    wrong = run("__main__", "recipe", "t4_maths", cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and "Did you mean `t4_math`?" in wrong.stderr


@dataclass
class Settings(TrainingArguments):
    """Like a trainer's configuration: fields of its own, and transformers'."""

    beta1: float = field(default=0.5, metadata={"help": "A temperature, 50%% of it."})
    rare: str | None = field(default=None, metadata={"help": "Hardly ever used."})
    epsilon: float = 0.2


GROUPS = [
    OptionGroup(ModelOptions, "model and LoRA"),
    OptionGroup(Settings, "A*-PO", hidden=["rare"]),
    OptionGroup(EngineOptions, "engine"),
]
REFUSED_OPTIONS = {"epsilon": "A*-PO has no clipping.", "loss_type": "there is one loss"}


def parse(*words, refused=REFUSED_OPTIONS):
    return parse_command(
        GROUPS, section="train", prog="astarpo-train", description="Train.", argv=words, refused=refused
    )


def test_help_has_groups_and_hides_what_is_rare_or_refused(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def text(word):
        with pytest.raises(SystemExit) as end:
            parse(word)
        assert end.value.code == 0
        return capsys.readouterr().out

    shown, whole = text("--help"), text("--help_all")
    headings = ["model and LoRA:", "A*-PO:", "engine:", "training:", "logging and hub:"]
    assert [line for line in shown.splitlines() if line in headings] == headings
    assert shown.index("engine:") < shown.index("--learning_rate") < shown.index("--report_to")
    assert "--beta1 X" in shown and "50% of it. (default: 0.5)" in shown
    assert "(required)" in shown and "default: None" not in whole
    for hidden in ("--rare", "--adam_beta2"):
        assert hidden not in shown and hidden in whole
    assert "--epsilon" not in whole and "--no_" not in whole and "--max-steps" not in whole
    assert shown.count("\n") < 150 < 400 < whole.count("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "5"], "`--max_step` is not an option of `astarpo-train`. Did you mean `--max_steps`?"),
        (["--max-step=5"], "Did you mean `--max_steps`?"),
        (["--epsilom", "5"], "`--epsilom` is not an option of `astarpo-train`. Did you mean `--epsilon`?"),
        (["--zzz"], "`--zzz` is not an option of `astarpo-train`. `astarpo-train --help` lists the options."),
        (["--hlp"], "Did you mean `--help`?"),
        (["--epsilon", "0.3"], "`--epsilon` is refused: A*-PO has no clipping. Remove it."),
        (["--loss-type=dapo"], "`--loss_type` is refused: there is one loss. Remove it."),
        (["--max_steps", "many"], "argument --max_steps: invalid int value: 'many'. `astarpo-train --help` lists"),
        (["--engine", "vlm"], "argument --engine: invalid choice: 'vlm'"),
        (["--beta1", "1"], "the following arguments are required: --model_name_or_path. `astarpo-train --help` lists"),
        (["--model_name_or_path", "m", "pool"], "`pool` belongs to no option"),
        (["--config"], "needs a file or a name"),
        (["--config", "own.yaml"], "`epsilon` in config `own.yaml` is refused: A*-PO has no clipping. Remove it."),
        (["--config", "bad.yaml"], "key that `astarpo-train` does not know: `max_step`. Did you mean `max_steps`?"),
    ],
)
def test_a_wrong_option_ends_with_one_sentence(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("epsilon: 0.3\n")
    Path("bad.yaml").write_text("max_step: 3\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*words)


def test_the_command_line_wins_over_the_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text("model_name_or_path: m\nbeta1: 2\ntrain:\n  max_steps: 7\nrollout:\n  x: 1\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path)]
    model, settings, _ = parse(*words, "--beta1", "3")
    assert (model.model_name_or_path, settings.beta1, settings.max_steps) == ("m", 3.0, 7)
