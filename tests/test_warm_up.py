"""The warm-up of episodes' form: the model's own numbers, verdicts that compare them, and no truth in either."""

from collections import Counter

import pytest
import torch
from conftest import build_tokenizer
from helpers import move, taught_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from astarpo.rollout import Pag, Problem
from astarpo.rollout.episode import FollowUps
from astarpo.rollout.prompts import tokenize_prompts
from astarpo.trainer.quickstart import QuickstartOptions
from astarpo.trainer.warm_up import VERDICTS, verification_rows, warm_up

pytestmark = pytest.mark.pag

PAG = Pag("Right?", "Again.")
PROBLEMS = [Problem(({"role": "user", "content": f"Guess {number}"},), str(number % 2)) for number in range(20)]
ASKED = [str(number) for number in range(20)]
ANSWERS = [[str(number), str(number), "77"] if number % 4 else [] for number in range(20)]


def _said(row):
    return [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]


def test_rows_compare_the_models_own_numbers(tokenizer):
    rows = verification_rows(tokenizer, tokenize_prompts(PROBLEMS, tokenizer), ASKED, ANSWERS, PAG, 400, seed=0)
    verify = "<|im_end|>" + tokenizer.decode(FollowUps.render(tokenizer, PAG).by_role["verify"])
    verdicts = Counter()
    for row in rows:
        said = _said(row)
        assert row["input_ids"][-len(said) :] == said
        given, verification = tokenizer.decode(row["input_ids"][: -len(said)]), tokenizer.decode(said)
        assert given.endswith(verify)
        asked, first = given.removesuffix(verify).rsplit("\n", 1)[1].removesuffix(".").split(" = ")
        assert {first} <= {answer for answers in ANSWERS for answer in answers}
        sentence, verdict = verification.removesuffix("<|im_end|>").split(". ", 1)
        number, again = sentence.split(" = ")
        assert number == asked and again in ANSWERS[int(asked)]
        assert verdict == VERDICTS[again != first]
        verdicts[verdict] += 1
    assert min(verdicts[verdict] for verdict in VERDICTS) > 100


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    """A tiny model that says a number's digits after the number and `=`."""
    folder = tmp_path_factory.mktemp("counter")
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenize_prompts(PROBLEMS, tokenizer)
    rows = [
        [*prompt, *tokenizer(f"{asked} = {asked}.")["input_ids"]] for prompt, asked in zip(prompts, ASKED, strict=True)
    ]
    model = taught_qwen2(lambda step: rows, 100, below=0.4)
    model.save_pretrained(folder)
    return str(folder)


def test_the_model_says_verifications_afterwards(counter, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(counter)
    prompts = tokenize_prompts(PROBLEMS, tokenizer)
    held = verification_rows(tokenizer, prompts, ASKED, ANSWERS, PAG, 4, seed=9)

    def nll(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses = []
        for row in held:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.masked_fill(~torch.tensor([row["completion_mask"]]).bool(), -100)
            losses.append(model(input_ids=ids, labels=labels).loss.item())
        return sum(losses) / len(losses)

    folder = warm_up(counter, tokenizer, PROBLEMS, PAG, 12, 0, tmp_path)
    assert nll(folder) < nll(counter) - 0.5
    stamp = (tmp_path / folder / "config.json").stat().st_mtime_ns
    assert warm_up(counter, tokenizer, PROBLEMS, PAG, 12, 0, tmp_path) == folder  # taken, not made again
    assert (tmp_path / folder / "config.json").stat().st_mtime_ns == stamp
    changed = AutoModelForCausalLM.from_pretrained(counter)
    move(changed, scale=1e-3)
    changed.save_pretrained(tmp_path / "other")
    tokenizer.pad_token = None
    assert warm_up(str(tmp_path / "other"), tokenizer, PROBLEMS, PAG, 12, 0, tmp_path) != folder


def test_a_model_without_numbers_is_refused(guesser, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    few = PROBLEMS[:2]
    with pytest.raises(ValueError, match=r"says no number after `0 =`.*warm_up_steps 0"):
        warm_up(guesser, tokenizer, few, PAG, 1, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_warm_up_of_completions_is_refused():
    with pytest.raises(ValueError, match="set --recipe quickstart_pag"):
        QuickstartOptions(warm_up_steps=5)
    with pytest.raises(ValueError, match="0 or more"):
        QuickstartOptions(warm_up_steps=-1)
    with pytest.raises(ValueError, match="at least 1"):
        QuickstartOptions(max_steps=0)
    assert QuickstartOptions(recipe="quickstart_pag").output_dir == "runs/quickstart_pag"
