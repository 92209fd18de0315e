"""The warm-up of episodes' form: the model's own numbers, checks whose verdicts alternate, and no truth in either."""

from collections import Counter

import pytest
from conftest import build_tokenizer, make_engine
from helpers import move, taught_qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from astarpo.rollout import EpisodeSampler, Pag, Problem, SamplingSettings
from astarpo.rollout.bank import area_under_curve, judge_bank, make_bank
from astarpo.rollout.episode import FollowUps
from astarpo.rollout.prompts import tokenize_prompts
from astarpo.trainer.division import agrees, answer, asked, checked, divisions, messages, question, write_problems
from astarpo.trainer.quickstart import QuickstartOptions
from astarpo.trainer.warm_up import episode_rows, warm_up
from astarpo.verifier import Verifier

pytestmark = pytest.mark.pag

PAG = Pag("Right?", "Again.", "lenient")
PROBLEMS = [
    Problem(({"role": "user", "content": question(a * b, b)},), str(a)) for a in range(2, 6) for b in range(2, 6)
]


@pytest.fixture(scope="module")
def divider(tmp_path_factory):
    """A tiny model that says the right quotient, or half of the time another, and any product after `times`."""
    folder = tmp_path_factory.mktemp("divider")
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tokenize_prompts(PROBLEMS, tokenizer)
    verify = list(FollowUps.render(tokenizer, PAG).by_role["verify"])

    def rows(step):
        out = []
        for place, problem in enumerate(PROBLEMS):
            a, b = asked(problem.question)
            quotient = a // b if (place + step) % 2 else a // b + 1
            attempt = tokenizer(f"{answer(a, b, quotient)}<|im_end|>")["input_ids"]
            check = tokenizer(f"{checked(a, b, quotient, quotient * b, quotient * b == a)}<|im_end|>")["input_ids"]
            out.append([*prompts[place], *attempt, *verify, *check])
        return out

    model = taught_qwen2(rows, 150, below=0.35)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(divider):
    return make_engine(divider)


def test_problems_are_exact_and_the_split_is_fixed(tmp_path):
    pairs = divisions(12)
    assert len(pairs) == len(set(pairs)) == 118 and all(a % b == 0 for a, b in pairs)
    assert len(divisions(20)) == 358
    assert messages(12, 3)[-1]["content"] == question(12, 3) and asked(question(12, 3)) == (12, 3)
    one, two = (write_problems(tmp_path / name, 12, 58) for name in "ab")
    assert [path.read_text() for path in one] == [path.read_text() for path in two]
    train, held = (set(path.read_text().splitlines()) for path in one)
    assert (len(train), len(held)) == (60, 58) and not train & held


def test_a_check_agrees_where_its_product_is_the_dividend():
    assert agrees(question(12, 3), checked(12, 3, 4, 12, True)) is True
    assert agrees(question(12, 3), checked(12, 3, 5, 15, True)) is False
    assert agrees(question(12, 3), "The answer is correct.") is None


def test_rows_are_episodes_of_the_models_own_numbers(divider, engine):
    tokenizer = AutoTokenizer.from_pretrained(divider)
    prompts = tokenize_prompts(PROBLEMS, tokenizer)
    rows = episode_rows(engine, tokenizer, PROBLEMS, prompts, FollowUps.render(tokenizer, PAG), 32, seed=0)
    verdicts: Counter[tuple[bool, bool]] = Counter()
    for row in rows:
        said = "".join(
            tokenizer.decode([token]) for token, own in zip(row["after"], row["is_said"], strict=True) if own
        )
        attempt, check, *revision = said.split("<|im_end|>")[:-1]
        dividend, divisor = asked(question(*asked(attempt.rsplit(" is ", 1)[0])))
        is_right = check.endswith("The answer is correct.")
        assert check.startswith(f"{attempt.removesuffix('.').rsplit(' ', 1)[1]} times {divisor} is ")
        assert len(revision) == (not is_right)
        verdicts[is_right, bool(agrees(question(dividend, divisor), check))] += 1
    assert sum(count for (is_right, _), count in verdicts.items() if is_right) == 16
    assert verdicts[True, False] > 0 and verdicts[False, True] > 0  # the verdict says nothing of the product


def test_the_warm_up_lowers_the_loss_of_the_form_and_is_made_once(divider, engine, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(divider)
    with caplog.at_level("INFO"):
        folder = warm_up(divider, engine, tokenizer, PROBLEMS, PAG, 6, 0, tmp_path)
    losses = [record.args[2] for record in caplog.records if record.message.startswith("Warm-up")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    stamp = (tmp_path / folder / "config.json").stat().st_mtime_ns
    assert warm_up(divider, engine, tokenizer, PROBLEMS, PAG, 6, 0, tmp_path) == folder  # taken, not made again
    assert (tmp_path / folder / "config.json").stat().st_mtime_ns == stamp
    changed = AutoModelForCausalLM.from_pretrained(divider)
    move(changed, scale=1e-3)
    changed.save_pretrained(tmp_path / "other")
    assert warm_up(str(tmp_path / "other"), engine, tokenizer, PROBLEMS, PAG, 6, 0, tmp_path) != folder


def test_a_bank_has_right_and_wrong_attempts_and_a_verifier_that_looks_is_told_from_one_that_does_not(divider, engine):
    tokenizer = AutoTokenizer.from_pretrained(divider)
    prompts = tokenize_prompts(PROBLEMS, tokenizer)
    sampler = EpisodeSampler(engine, tokenizer, PAG, SamplingSettings(96, 1.0))
    with Verifier() as verifier:
        bank = make_bank(sampler, PROBLEMS, prompts, verifier, size=20)
        assert [attempt.is_right for attempt in bank] == [True] * (len(bank) // 2) + [False] * (len(bank) // 2)
        assert len({attempt.problem.prompt_id for attempt in bank[: len(bank) // 2]}) > 5
        again = make_bank(sampler, PROBLEMS, prompts, verifier, size=20)
        assert again == bank
        for attempt in bank:
            # Without special tokens, as the text of a turn: now and then the tiny model says one.
            said = tokenizer.decode(list(attempt.context), skip_special_tokens=True)
            assert attempt.text in said and said.rstrip().endswith("assistant")
        with pytest.raises(ValueError, match="needs right and wrong attempts"):
            make_bank(sampler, PROBLEMS[:1], prompts[:1], lambda answers: verifier_of(answers), num_samples=2)
    found = judge_bank(sampler, bank, lambda attempt, said: agrees(attempt.problem.question, said))
    assert found["attempts"] == len(bank) == sum(found["table"].values())
    assert found["youden_j"] == pytest.approx(found["correct_recall"] + found["wrong_recall"] - 1)
    right = sum(count for name, count in found["table"].items() if name.endswith("correct/right"))
    assert found["correct_recall"] == pytest.approx(right / (len(bank) / 2))
    cut = judge_bank(EpisodeSampler(engine, tokenizer, PAG, SamplingSettings(1, 1.0)), bank)
    assert cut["no_verdict"] == 1 and cut["auc"] is None  # as JSON has it


def verifier_of(answers):
    from astarpo.rollout.episode import TurnGrade

    return [TurnGrade("wrong", 0.0) for _ in answers]


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    assert area_under_curve([0.9, 0.8], [0.1, 0.2]) == 1.0
    assert area_under_curve([0.5], [0.5]) == 0.5
    assert area_under_curve([0.9, 0.1], [0.5, 0.5]) == 0.5


def test_a_model_without_numbers_is_refused(guesser, guessing_engine, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(guesser)
    with pytest.raises(ValueError, match=r"are numbers, too few for a warm-up.*warm_up_steps 0"):
        warm_up(guesser, guessing_engine, tokenizer, PROBLEMS, PAG, 1, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_warm_up_of_completions_is_refused():
    with pytest.raises(ValueError, match="set --recipe quickstart_pag"):
        QuickstartOptions(warm_up_steps=5)
    with pytest.raises(ValueError, match="0 or more"):
        QuickstartOptions(warm_up_steps=-1)
    with pytest.raises(ValueError, match="at least 1"):
        QuickstartOptions(max_steps=0)
    assert QuickstartOptions(recipe="quickstart_pag").output_dir == "runs/quickstart_pag"
