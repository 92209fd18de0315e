"""The warm-up of verdicts' form: both equally often, no truth in them, and a model that says them afterwards."""

import pytest
import torch
from pag_model import problem
from pag_run import PAG
from transformers import AutoModelForCausalLM

from astarpo.rollout.prompts import tokenize_prompts
from astarpo.trainer.quickstart.__main__ import QuickstartOptions
from astarpo.trainer.quickstart.warm_up import VERDICTS, _rows, warm_up

pytestmark = pytest.mark.pag

PROBLEMS = [problem(number) for number in range(20)]


def test_rows_teach_form_and_no_truth(tokenizer):
    rows = _rows(tokenizer, PROBLEMS, tokenize_prompts(PROBLEMS, tokenizer), PAG, 400, seed=0)
    verify = "<|im_end|>" + tokenizer.decode(PAG.follow_ups(tokenizer).verify)
    agreeing = []
    for row in rows:
        said = [t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        verdict = tokenizer.decode(said).removesuffix("<|im_end|>")
        assert verdict in VERDICTS
        given = tokenizer.decode(row["input_ids"][: -len(said)])
        assert given.endswith(verify)
        number, answer = given.split("Guess ")[1].split("<")[0], given.removesuffix(verify)[-2]
        agreeing.append((verdict == VERDICTS[0]) == (int(number) % 2 == int(answer)))
    assert sum(row["completion_mask"].count(1) for row in rows) > 0
    assert 0.42 < sum(agreeing) / len(agreeing) < 0.58  # chance
    assert [tokenizer.decode(r["input_ids"]).count(VERDICTS[0]) for r in rows[:4]] == [1, 0, 1, 0]


def test_the_model_says_verdicts_afterwards(tiny_model, tokenizer, tmp_path):
    prompts = tokenize_prompts(PROBLEMS, tokenizer)
    held = _rows(tokenizer, PROBLEMS, prompts, PAG, 4, seed=9)

    def verdict_nll(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses = []
        for row in held:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.masked_fill(~torch.tensor([row["completion_mask"]]).bool(), -100)
            losses.append(model(input_ids=ids, labels=labels).loss.item())
        return sum(losses) / len(losses)

    folder = warm_up(tiny_model, tokenizer, PROBLEMS, prompts, PAG, 12, 0, tmp_path)
    assert verdict_nll(folder) < verdict_nll(tiny_model) - 0.5
    stamp = (tmp_path / folder / "config.json").stat().st_mtime_ns
    assert warm_up(tiny_model, tokenizer, PROBLEMS, prompts, PAG, 12, 0, tmp_path) == folder  # taken, not made again
    assert (tmp_path / folder / "config.json").stat().st_mtime_ns == stamp


def test_a_warm_up_of_completions_is_refused():
    with pytest.raises(ValueError, match="set --recipe quickstart_pag"):
        QuickstartOptions(warm_up_steps=5)
    with pytest.raises(ValueError, match="0 or more"):
        QuickstartOptions(warm_up_steps=-1)
