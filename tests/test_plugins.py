"""The plug-ins of `examples/plugins`, each loaded by the framework that it is for, as that framework loads it.

The peers are installed into folders of their own, which stand before everything else on the path of a new process.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import Dataset

pytestmark = pytest.mark.long

PLUGINS = Path(__file__).parents[1] / "examples" / "plugins"
CASES = [
    (r"So it is \boxed{\frac12}.", "0.5", 1.0),
    (r"So it is \boxed{\frac13}.", "0.5", 0.0),
    ("I do not know.", "0.5", 0.0),
    (r"So it is \boxed{2\sin x \cos x}.", r"\sin 2x", 1.0),
    (r"So it is \boxed{1}.", "???", None),
]
"""Completion, gold answer, reward: None where the gold answer is none that could be judged."""
ASKED = [(completion, gold) for completion, gold, _ in CASES]
REWARDS = [reward for _, _, reward in CASES]

Install = Callable[..., Path]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    """Installs a peer into a folder: `alone` without what it depends on, `whole` with it."""

    def install_into_folder(peer: str, alone: list[str], whole: list[str]) -> Path:
        pip = [sys.executable, "-m", "pip"]
        name, folder = peer.partition("==")[0], tmp_path_factory.mktemp("peer")
        asked = subprocess.run([*pip, "index", "versions", name], capture_output=True, text=True)
        if asked.returncode:
            pytest.skip(f"pip cannot download {name}: {asked.stderr.strip().splitlines()[-1]}")
        # What a peer's dependencies want comes first: where both calls bring a package, the second leaves it alone.
        for packages, options in ((whole, []), ([peer, *alone], ["--no-deps"])):
            if packages:
                command = [*pip, "install", "--quiet", "--no-compile", *options, "--target", str(folder), *packages]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
        return folder

    return install_into_folder


def run(folder: Path, script: str, *arguments: Any) -> Any:
    """What `script` prints last, as JSON; it runs in a new process that finds the peer of `folder`."""
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-c", script, *(json.dumps(argument) for argument in arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "log": done.stdout + done.stderr}


VERL = """
import asyncio, json, os, sys
import torch
import verl
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

plugin, model, cases, overrides = map(json.loads, sys.argv[1:])
tokenizer = AutoTokenizer.from_pretrained(model)
with initialize_config_dir(os.path.join(os.path.dirname(verl.__file__), "trainer", "config"), version_base=None):
    config = compose("ppo_trainer", [f"reward.custom_reward_function.path={plugin}", *overrides])

async def rewards():
    manager = load_reward_manager(config, tokenizer)
    results = []
    for completion, gold in cases:
        ids = tokenizer(completion, return_tensors="pt")["input_ids"]
        rows = {"data_source": ["sums"], "reward_model": [{"ground_truth": gold}], "extra_info": [{}]}
        tensors = {"responses": ids, "attention_mask": torch.ones_like(ids)}
        try:
            results.append((await manager.run_single(DataProto.from_dict(tensors, non_tensors=rows)))["reward_score"])
        except RuntimeError as error:
            results.append(str(error))
    return results

print(json.dumps({"version": verl.__version__, "rewards": asyncio.run(rewards())}))
"""


def test_verl(install: Install, tiny_model: str) -> None:
    """By verl's reward manager, from verl's configuration: what cannot be judged gets 0 and a warning, or stops the run."""
    folder = install("verl", ["tensordict<=0.10", "pyvers", "orjson", "codetiming"], ["hydra-core"])
    plugin = str(PLUGINS / "verl_score.py")
    lenient = run(folder, VERL, plugin, tiny_model, ASKED, [])
    assert lenient["rewards"] == [reward or 0.0 for reward in REWARDS]
    assert lenient["log"].count("could not judge an answer (unparseable_gold)") == 1
    strict = run(folder, VERL, plugin, tiny_model, ASKED, ["+reward.custom_reward_function.reward_kwargs.strict=True"])
    assert strict["rewards"][:-1] == REWARDS[:-1]
    assert "unparseable_gold" in strict["rewards"][-1]


VERIFIERS = """
import asyncio, json, sys
import verifiers
import verifiers.v1 as vf
from pydantic_config import cli
from verifiers.v1.configs.cli.eval import EvalConfig

plugin, cases = map(json.loads, sys.argv[1:])
flag = ["--env.taskset.task.rewards.correct.fn", f"{plugin}:correct"]
config = cli(EvalConfig, args=flag).env.taskset.task

class Data(vf.TaskData):
    answer: str

class Sum(vf.Task[Data]):
    pass

async def rewards():
    results = []
    for completion, gold in cases:
        task = Sum(Data(prompt="?", answer=gold), config)
        asked = vf.MessageNode(message=vf.UserMessage(content="?"))
        replied = vf.MessageNode(parent=0, sampled=True, message=vf.AssistantMessage(content=completion))
        agent = vf.AgentInfo(config=vf.AgentConfig())
        trace = vf.Trace[Data](task=vf.TraceTask[Data](type="Sum", data=task.data), agent=agent, nodes=[asked, replied])
        try:
            await task.score(trace)
        except vf.TaskError as error:
            assert "could not judge an answer (unparseable_gold)" in str(error), error
            trace.record_error(error)
        graded = trace.rewards["correct"]
        results.append(None if graded is None and trace.has_error else graded.value)
    return results

print(json.dumps({"version": verifiers.__version__, "rewards": asyncio.run(rewards())}))
"""

RUBRIC = """
import asyncio, json, sys
from importlib.util import module_from_spec, spec_from_file_location
import verifiers as vf

plugin, cases = map(json.loads, sys.argv[1:])
spec = spec_from_file_location("plugin", plugin)
module = module_from_spec(spec)
spec.loader.exec_module(module)

async def rewards():
    rubric = vf.Rubric(funcs=[module.right_answer])
    results = []
    for completion, gold in cases:
        as_dict = {"role": "assistant", "content": completion}
        for form in ([as_dict], [vf.AssistantMessage(content=completion)], completion):
            state = vf.State(prompt="?", completion=form, answer=gold)
            await rubric.score_rollout(state)
            results.append(state["reward"])
    return results

print(json.dumps({"version": vf.__version__, "rewards": asyncio.run(rewards())}))
"""
VERIFIERS_NEEDS = ["prime-pydantic-config", "prime-sandboxes", "tomli_w"]


def test_verifiers(install: Install) -> None:
    """As `vf-eval` names rewards: what cannot be judged has no reward, and its rollout is marked as failed."""
    folder = install("verifiers", ["renderers"], VERIFIERS_NEEDS)
    assert run(folder, VERIFIERS, str(PLUGINS / "verifiers_rubric.py"), ASKED)["rewards"] == REWARDS


def test_verifiers_with_rubrics(install: Install) -> None:
    """The last release that has rubrics, and every form of a completion that it knows."""
    folder = install("verifiers==0.2.1", ["renderers"], VERIFIERS_NEEDS)
    graded = run(folder, RUBRIC, str(PLUGINS / "verifiers_rubric.py"), ASKED)
    assert graded["rewards"] == [reward or 0.0 for reward in REWARDS for _ in range(3)]
    assert "could not judge an answer (unparseable_gold)" in graded["log"]


LM_EVAL = """
import json, sys
import datasets, lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

folder, cases = map(json.loads, sys.argv[1:])

def load_dataset(path, name=None, **kwargs):
    assert path == "HuggingFaceH4/MATH-500", path
    rows = [{"problem": f"Problem {number}.", "answer": gold} for number, (_, gold) in enumerate(cases)]
    return datasets.DatasetDict(test=datasets.Dataset.from_list(rows))

datasets.load_dataset = load_dataset
requests = []

class Model(LM):
    def generate_until(self, asked):
        requests.extend(request.args for request in asked)
        return [cases[request.doc_id][0] for request in asked]

    loglikelihood = loglikelihood_rolling = None

manager = TaskManager(include_path=folder, include_defaults=False)
results = lm_eval.simple_evaluate(Model(), tasks=["math500_astarpo"], task_manager=manager, bootstrap_iters=0)
samples = sorted(results["samples"]["math500_astarpo"], key=lambda sample: sample["doc_id"])
table = results["results"]["math500_astarpo"]
print(json.dumps({
    "version": lm_eval.__version__,
    "rewards": [sample.get("accuracy") for sample in samples],
    "accuracy": table["accuracy,none"],
    "unjudged": table["unjudged,none"],
    "requests": requests,
}))
"""


def test_lm_eval(install: Install) -> None:
    """By lm-evaluation-harness's evaluator: what cannot be judged is in neither the numerator nor the denominator."""
    folder = install("lm_eval", ["sacrebleu", "portalocker", "tabulate", "colorama", "lxml"], [])
    graded = run(folder, LM_EVAL, str(PLUGINS / "lm_eval"), ASKED)
    judged = [reward for reward in REWARDS if reward is not None]
    assert graded["rewards"] == REWARDS
    assert graded["accuracy"] == pytest.approx(sum(judged) / len(judged))
    assert graded["unjudged"] == pytest.approx(1 - len(judged) / len(REWARDS))
    prompt, settings = graded["requests"][0]
    assert prompt == "Problem 0.\n\n" + r"Please reason step by step, and put your final answer within \boxed{}."
    assert settings["until"] == [] and settings["do_sample"] is False


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PLUGINS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trl(tiny_model: str, tmp_path: Path) -> None:
    """By `GRPOTrainer`: its own path of rewards, where None is a reward that is missing, and one update."""
    from trl import GRPOConfig

    plugin = load("trl_reward")
    rows = Dataset.from_list([plugin.to_row({"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"})] * 2)
    assert rows[0]["prompt"][0]["content"].endswith(r"within \boxed{}.")
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = plugin.make_trainer(tiny_model, rows, args)
    inputs: list[dict[str, Any]] = [{"prompt": "?", "solution": gold} for _, gold in ASKED]
    completions = [[{"role": "assistant", "content": completion}] for completion, _ in ASKED]
    rewards = trainer._calculate_rewards(inputs, ["?"] * len(CASES), completions, [[1]] * len(CASES))
    given = [None if math.isnan(reward) else reward for (reward,) in rewards.tolist()]
    assert given == REWARDS
    trainer.train()
    assert any("rewards/math_reward/mean" in logged for logged in trainer.state.log_history)
