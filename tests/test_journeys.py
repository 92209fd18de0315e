"""What users do, from their file to a model that others can use: each journey ends in the file or the message that the docs promise."""

import json
import signal
import subprocess
import sys
from typing import Any

import pyarrow.parquet as pq
import pytest
from commands import run, wait_for
from huggingface_hub import DatasetCard, ModelCard
from journeys import SMALL, TRAIN, astarpo, done, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from astarpo.rollout import PoolManifest, ReferencePool
from astarpo.rollout.pool.publishing import pool_card

pytestmark = pytest.mark.slow


def without_length() -> list[str]:
    place = TRAIN.index("--max_steps")
    return TRAIN[:place] + TRAIN[place + 2 :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("journeys")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def words(tiny_model):
    """A training on one's own file, by one's own reward."""
    given = ["--model_name_or_path", tiny_model, "--dataset_name", "own.csv", "--eval_dataset_name", "test.jsonl"]
    return ["train", *given, "--eval_steps", "2", "--reward_funcs", "my_rewards.odd", *TRAIN]


@pytest.fixture(scope="module")
def trained(folder, words):
    """1. From a csv file and a reward of one's own to an adapter."""
    ended = done(*words, "--save_steps", 2, "--output_dir", "out", cwd=folder)
    return folder / "out", ended


def test_1_from_a_csv_file_and_a_reward_to_an_adapter(trained, tiny_model):
    out, ended = trained
    assert "Removed 2 training problems that also appear in `test.jsonl`" in ended.err
    assert "10 problems to train on" in ended.out and "6 problems to evaluate on" in ended.out
    assert "update   3/3  reward" in ended.out and "V*" in ended.out and "KL" in ended.out and "left)" in ended.out
    for line in ("evaluation after update 0", "evaluation after update 2", "3 logged updates", "trained"):
        assert line in ended.out
    lines = ended.out.splitlines()
    after = lines[lines.index("next:") + 1 :]
    assert [line.split()[:2] for line in after] == [["astarpo", "eval"], ["astarpo", "export"], ["vllm", "serve"]]
    for name in (
        "adapter_model.safetensors",
        "tokenizer.json",
        "reward.png",
        "run.json",
        "reference_pool/manifest.json",
    ):
        assert (out / name).is_file(), name
    record = json.loads((out / "run.json").read_text())
    assert record["is_finished"] and record["updates"] == 3
    assert {"eval_reward"} <= record["before"].keys() & record["after"].keys()
    card = ModelCard.load(str(out / "README.md"))
    results: Any = card.data.to_dict()["model-index"][0]["results"]
    (result,) = results[0]["metrics"]
    assert result["value"] == pytest.approx(record["after"]["eval_reward"], abs=1e-4)
    assert "## How to use it" in card.text[:600] and "trained on own.csv" in card.text
    # A checkpoint is an adapter folder too, and has our card.
    assert "A*-PO" in ModelCard.load(str(out / "checkpoint-2" / "README.md")).text


def test_2_a_run_that_is_interrupted_goes_on_when_it_is_repeated(folder, words, tmp_path):
    given = [*words, "--output_dir", tmp_path / "run"]
    command = [sys.executable, "-m", "astarpo", *map(str, given), "--max_steps", "5000"]
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
        wait_for(process, lambda: "update   2/5000" in log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 130, log.read_text()[-2000:]
    assert "run the same command again to go on from there" in log.read_text()
    step = json.loads((tmp_path / "run" / "run.json").read_text())["updates"]
    assert step >= 2
    again = done(*given, "--max_steps", step + 1, cwd=folder)
    assert f"continuing the run in {tmp_path / 'run'} after update {step}" in again.out
    assert f"{step + 1} logged updates" in again.out
    assert "stage 1" not in again.out  # the samples are there


def test_3_a_finished_run_says_so_and_is_never_overwritten_by_accident(folder, words, trained, tmp_path):
    out, first = trained
    weights = (out / "adapter_model.safetensors").read_bytes()
    again = done(*words, "--save_steps", 2, "--output_dir", "out", cwd=folder)
    assert "has finished; nothing is left to do" in again.out
    assert again.out.split("next:")[1] == first.out.split("next:")[1]
    other = astarpo(*words, "--output_dir", "out", "--beta2", "0.5", "--seed", "7", cwd=folder)
    assert other.code == 2
    assert "--beta2: 0.001 there, 0.5 now" in other.err and "--seed: 42 there, 7 now" in other.err
    anew = astarpo(*words, "--output_dir", "out", "--max_steps", "9", "--resume_from_checkpoint", "false", cwd=folder)
    assert anew.code == 2 and "--overwrite_output_dir true" in anew.err
    assert (out / "adapter_model.safetensors").read_bytes() == weights

    done(*words, "--output_dir", tmp_path / "run", "--max_steps", 1, cwd=folder)
    pool = (tmp_path / "run" / "reference_pool" / "manifest.json").read_text()
    replaced = done(*words, "--output_dir", tmp_path / "run", "--beta2", "0.5", "--overwrite_output_dir", cwd=folder)
    assert "3 logged updates" in replaced.out
    assert (tmp_path / "run" / "reference_pool" / "manifest.json").read_text() == pool


def test_4_time_is_up_is_75_and_the_same_command_finishes(folder, words, tmp_path):
    given = [*words, "--output_dir", tmp_path / "run"]
    endless = ["--max_steps", 100_000]
    cut = astarpo(*given, *endless, "--save_by", "1s", cwd=folder)  # before the engine is up, or soon after
    assert cut.code == 75 and "time was up" in cut.err and "run the same command again" in cut.err
    longer = astarpo(*given, *endless, "--save_by", "20s", cwd=folder)
    assert longer.code == 75, longer.err[-2000:]
    assert list((tmp_path / "run").glob("checkpoint-*"))
    updates = json.loads((tmp_path / "run" / "run.json").read_text())["updates"]
    assert f"{updates + 1} logged updates" in done(*given, "--max_steps", updates + 1, cwd=folder).out


def test_5_export_gives_a_model_that_any_program_loads(folder, trained, tiny_model):
    ended = done("export", "--adapter", "out", "--output_dir", "merged", "--dtype", "float32", cwd=folder)
    assert "greedy completions are the same" in ended.out and "vllm serve merged" in ended.out
    again = astarpo("export", "--adapter", "out", "--output_dir", "merged", cwd=folder)
    assert again.code == 2 and "is not empty" in again.err
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "merged")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    card = ModelCard.load(str(folder / "merged" / "README.md"))
    assert card.data.to_dict()["library_name"] == "transformers" and "vllm serve merged" in card.text
    data = ["--dataset_name", "test.jsonl", "--output", "merged.json", *SMALL]
    evaluated = done("eval", "--model_name_or_path", "merged", *data, cwd=folder)  # vLLM loads it
    assert "6 problems" in evaluated.out


@pytest.fixture(scope="module")
def evaluations(folder, trained, tiny_model):
    data = ["--dataset_name", "test.jsonl", *SMALL, "--temperature", 1, "--top_p", 0.9, "--num_samples", 3]
    model = ["eval", "--model_name_or_path", tiny_model]
    done(*model, *data, "--output", "before.json", cwd=folder)
    ended = done(*model, "--adapter", "out", *data, "--output", "after.json", cwd=folder)
    return json.loads((folder / "after.json").read_text()), ended


def test_6_two_evaluations_are_compared_and_say_what_they_are_of(folder, evaluations, tiny_model):
    report, ended = evaluations
    assert "maj@3" in ended.out and "pass@1" in ended.out and "pass@3" in ended.out
    made = report["evaluated"]
    assert made["model"]["name"] == tiny_model and made["adapter"]["name"] == "out"
    assert made["data"]["sources"][0]["file"] == "test.jsonl" and made["data"]["num_problems"] == 6
    assert made["sampling"]["top_p"] == 0.9 and made["sampling"]["seed"] == 0
    assert set(report["pass_at"]) == {"1", "2", "3"} and report["pass_at"]["3"]["value"] == report["pass_at_k"]
    page = (folder / "after.html").read_text()
    assert all(f'value="{name}"' in page for name in ("wrong", "changed", "truncated"))
    compared = done("eval", "compare", "before.json", "after.json", "--json", "compared.json", cwd=folder)
    assert "paired 95 % interval" in compared.out
    found = json.loads((folder / "compared.json").read_text())
    assert found["num_problems"] == 6 and found["ci95"][0] <= found["difference"] <= found["ci95"][1]
    assert found["differs"] == {}
    other = astarpo("eval", "compare", "before.json", "own.csv", cwd=folder)
    assert other.code == 2 and "is not a report of `astarpo eval`" in other.err


def test_7_what_is_misspelt_is_named(folder):
    for words, said in [
        (["trian"], "Did you mean `train`?"),
        (["train", "--datset_name", "own.csv"], "Did you mean `--dataset_name`?"),
        (
            ["train", "--model_name_or_path", "m", "--dataset_name", "own.csv", "--reward_funcs", "my_rewards.od"],
            "has no `od`",
        ),
        (
            ["train", "--model_name_or_path", "m", "--reward_funcs", "my_reward.odd", "--pool", "p"],
            "no module `my_reward`",
        ),
        (["eval", "compare", "none.json", "none.json"], "There is no file `none.json`"),
    ]:
        ended = astarpo(*words, *(["--output_dir", "o"] if words[0] == "train" else []), cwd=folder)
        assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, ended.err


def test_8_offline_a_name_on_the_hub_is_one_sentence(folder):
    words = ["--model_name_or_path", "Qwen/Qwen2.5-1.5B-Instruct", "--dataset_name", "own.csv", "--output_dir", "o"]
    ended = run("__main__", "train", *words, cwd=folder, check=False, HF_HUB_OFFLINE="1")
    assert ended.returncode == 2
    assert "could not be found" in ended.stderr and "Traceback" not in ended.stderr


def test_9_training_goes_on_from_an_adapter_with_a_pool_of_its_own(folder, trained, tiny_model, tmp_path):
    out, _ = trained
    words = [
        "train",
        "--start_from_adapter",
        out,
        "--dataset_name",
        "own.csv",
        "--reward_funcs",
        "my_rewards.odd",
        *TRAIN,
    ]
    refused = astarpo(*words, "--pool", out / "reference_pool", "--output_dir", tmp_path / "a", cwd=folder)
    assert refused.code == 2 and "was sampled with model=" in refused.err
    done(*words, "--output_dir", tmp_path / "b", cwd=folder)
    assert (tmp_path / "b" / "reference" / "config.json").is_file()
    made = PoolManifest.load(tmp_path / "b" / "reference_pool").fingerprint
    assert made["model"] != PoolManifest.load(out / "reference_pool").fingerprint["model"]
    assert "has finished" in done(*words, "--output_dir", tmp_path / "b", cwd=folder).out


def test_10_a_mixture_keeps_its_weights(folder, tiny_model, tmp_path):
    (tmp_path / "mix.yaml").write_text(
        "datasets:\n- {path: own.csv, weight: 1}\n- {path: more.jsonl, weight: 2}\nrollout:\n  num_samples: 1\n"
    )
    words = ["rollout", "--model_name_or_path", tiny_model, "--config", tmp_path / "mix.yaml", *SMALL]
    ended = done(*words, "--output_dir", tmp_path / "pool", cwd=folder)
    assert "9 problems, 1 samples each" in ended.out  # all six of one, half as many of the other
    sources = PoolManifest.load(tmp_path / "pool").fingerprint["sources"]
    assert [(one["file"], one["weight"]) for one in sources] == [("own.csv", 1), ("more.jsonl", 2)]
    given = [
        "rollout",
        "--model_name_or_path",
        tiny_model,
        "--datasets",
        "own.csv=1",
        "more.jsonl=2",
        "--num_samples",
        1,
    ]
    again = done(*given, *SMALL, "--output_dir", tmp_path / "pool", cwd=folder)
    assert "complete already" in again.out


def test_11_a_limited_number_is_spread_and_recorded(folder, tiny_model, tmp_path):
    words = ["rollout", "--model_name_or_path", tiny_model, "--dataset_name", "own.csv", "--num_samples", 1, *SMALL]
    done(*words, "--limit", 6, "--output_dir", tmp_path / "pool", cwd=folder)
    pool = ReferencePool.open(tmp_path / "pool")
    levels = [int(row["solution"]) % 3 for row in pool.prompts.to_pylist()]
    assert sorted(levels) == [0, 0, 1, 1, 2, 2]
    assert (pool.manifest.fingerprint["limit"], pool.manifest.fingerprint["limit_seed"]) == (6, 0)
    other = astarpo(*words, "--limit", 6, "--limit_seed", 1, "--output_dir", tmp_path / "pool", cwd=folder)
    assert other.code == 2 and "limit_seed: 0 in the pool, 1 asked for" in other.err


def test_12_a_pool_made_apart_is_graded_by_ones_own_reward_and_graded_again(folder, tiny_model, tmp_path):
    words = ["rollout", "--model_name_or_path", tiny_model, "--dataset_name", "own.csv", "--num_samples", 4, *SMALL]
    pool = tmp_path / "pool"
    done(*words, "--require_eos", "false", "--reward_funcs", "my_rewards.odd", "--output_dir", pool, cwd=folder)
    train = ["train", "--model_name_or_path", tiny_model, "--pool", pool, "--eval_dataset_name", "test.jsonl", *TRAIN]
    refused = astarpo(*train, "--reward_funcs", "my_rewards.even", "--output_dir", tmp_path / "no", cwd=folder)
    assert refused.code == 2 and "was graded by reward_functions=my_rewards.odd" in refused.err
    before = ReferencePool.open(pool).rewards()
    done("pool", "regrade", pool, "--reward_funcs", "my_rewards.even", cwd=folder)
    after = ReferencePool.open(pool).rewards()
    assert all(
        one is not None and other is not None and one == 1 - other
        for key in before
        for one, other in zip(before[key], after[key], strict=True)
    )
    ended = done(*train, "--reward_funcs", "my_rewards.even", "--output_dir", tmp_path / "out", cwd=folder)
    assert "2 problems of the pool are in `test.jsonl` too, and are left out" in ended.out
    verifier = astarpo("pool", "regrade", pool, cwd=folder)
    assert verifier.code == 2 and "--reward_funcs" in verifier.err


def test_13_all_weights_can_be_trained(folder, words, tmp_path):
    ended = done(*words, "--use_peft", "false", "--max_steps", 2, "--output_dir", tmp_path / "full", cwd=folder)
    assert f"transformers chat {tmp_path / 'full'}" in ended.out
    assert (tmp_path / "full" / "model.safetensors").is_file()
    assert ModelCard.load(str(tmp_path / "full" / "README.md")).data.to_dict()["library_name"] == "transformers"


def test_14_a_base_model_gets_its_prompt_as_text(folder, tiny_model, tmp_path):
    words = [
        "train",
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "own.csv",
        "--eval_dataset_name",
        "test.jsonl",
    ]
    template = ["--prompt_template", "Q: {question}\nA:", "--reward_funcs", "my_rewards.even"]
    done(*words, *template, *TRAIN, "--output_dir", tmp_path / "out", cwd=folder)
    table = pq.read_table(next((tmp_path / "out" / "completions").glob("*.parquet")))
    assert table["prompt"][0].as_py().startswith("Q: ")
    shown = done("completions", tmp_path / "out", "--num", 1, cwd=folder)
    assert "1 of 4 completions" in shown.out


def test_15_pag_episodes_from_a_file(guesser, tmp_path):
    from pag_model import REVISE, VERIFY
    from pag_run import PROBLEMS

    rows = [json.dumps({"question": problem.question, "answer": problem.gold}) for problem in PROBLEMS]
    (tmp_path / "own.jsonl").write_text("\n".join(rows) + "\n")
    words = ["train", "--model_name_or_path", guesser, "--dataset_name", "own.jsonl", "--system_prompt", "", *TRAIN]
    words += ["--episode", "pag", "--max_completion_length", 32, "--verify_prompt", VERIFY, "--revise_prompt", REVISE]
    words += ["--output_dir", tmp_path / "out"]
    ended = done(*words, cwd=tmp_path)
    assert "verify" in ended.out
    assert PoolManifest.load(tmp_path / "out" / "reference_pool").turns == 3


def test_the_card_of_a_pool_reloads(folder, trained):
    pool = ReferencePool.open(folder / "out" / "reference_pool")
    (folder / "card.md").write_text(str(pool_card(pool, "me/pool")))
    card = DatasetCard.load(str(folder / "card.md"))
    assert "astarpo" in card.data.to_dict()["tags"] and "me/pool" in card.text


def test_stderr_is_quiet_unless_asked(folder, tiny_model, tmp_path):
    words = ["rollout", "--model_name_or_path", tiny_model, "--dataset_name", "own.csv", "--num_samples", 1, *SMALL]
    quiet = run("__main__", *words, "--output_dir", tmp_path / "a", cwd=folder)
    assert [line for line in quiet.stderr.splitlines() if line.strip()] == []
    loud = run("__main__", *words, "--output_dir", tmp_path / "b", "--verbose", cwd=folder, VLLM_LOGGING_LEVEL="INFO")
    assert "vLLM" in loud.stderr + loud.stdout


def test_18_rounds_in_one_command_and_the_same_again(folder, tiny_model):
    words = [
        "train",
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "own.csv",
        "--eval_dataset_name",
        "test.jsonl",
    ]
    words += ["--reward_funcs", "my_rewards.odd", *without_length()]
    rounds = ["--rounds", 2, "--updates_per_round", 2, "--output_dir", "in_rounds"]
    ended = done(*words, *rounds, cwd=folder)
    assert "round 0: " in ended.out and "round 1: " in ended.out
    assert (folder / "in_rounds" / "rounds" / "round-0001" / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "in_rounds" / "adapter_model.safetensors").is_file() and not (
        folder / "in_rounds" / "reference_pool"
    ).exists()
    again = done(*words, *rounds, cwd=folder)
    assert "has finished; nothing is left to do" in again.out
    refused = astarpo(*words, *rounds, "--updates_per_round", 3, cwd=folder)
    assert refused.code == 2 and "--updates_per_round" in refused.err
    longer = done(*words, *rounds, "--rounds", 3, cwd=folder)
    assert "continuing the run" in longer.out and "round 2: " in longer.out


def test_19_sampler_and_trainer_apart(folder, tiny_model):
    """The same command twice, each with its part; they meet in a folder."""
    words = [
        "train",
        "--model_name_or_path",
        tiny_model,
        "--dataset_name",
        "own.csv",
        "--reward_funcs",
        "my_rewards.odd",
    ]
    words += [*without_length(), "--rounds", "3", "--updates_per_round", "2"]
    command = [sys.executable, "-m", "astarpo", *words, "--rounds_dir", "shared", "--engine", "transformers"]
    parts = [
        subprocess.Popen(
            [*command, "--part", part, "--output_dir", part],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in ("sampler", "trainer")
    ]
    said = [process.communicate(timeout=300) for process in parts]
    assert [process.returncode for process in parts] == [0, 0], said
    assert "all 3 rounds are sampled in shared" in said[0][0]
    assert (folder / "trainer" / "adapter_model.safetensors").is_file()
    assert ReferencePool.open(folder / "shared" / "round-0002" / "pool").manifest.fingerprint["adapter_round"] == 1


def test_rounds_begin_anew_without_what_the_old_run_sampled(folder, tiny_model, tmp_path):
    given = ["train", "--model_name_or_path", tiny_model, "--dataset_name", "own.csv", *without_length()]
    given += ["--reward_funcs", "my_rewards.odd", "--output_dir", tmp_path]
    given += ["--rounds", "2", "--updates_per_round", "4", "--beta2", "0.3"]
    done(*given, cwd=folder)
    rounds = tmp_path / "rounds"
    adapter = rounds / "round-0001/adapter/adapter_model.safetensors"
    before = adapter.read_bytes()
    ended = done(*given, "--num_samples", "2", "--seed", "7", "--overwrite_output_dir", cwd=folder)
    assert adapter.read_bytes() != before and "another policy" not in ended.err
    assert [ReferencePool.open(rounds / f"round-000{number}/pool").manifest.num_samples for number in (0, 1)] == [2, 2]
    own = astarpo(*given, "--pool", rounds / "round-0000/pool", "--overwrite_output_dir", cwd=folder)
    assert own.code == 2 and "is one of the rounds that --overwrite_output_dir would delete" in own.err
    apart = astarpo(*given, "--overwrite_output_dir", "--part", "trainer", cwd=folder)
    assert apart.code == 2 and "holds the rounds of an earlier run, and a sampler may be at work" in apart.err
    assert adapter.is_file()
