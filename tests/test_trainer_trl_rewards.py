"""Reward functions as `GRPOTrainer` calls them: several, weighted, async, models, None for no signal, and what they are told."""

import asyncio
import functools

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl_helpers import (
    REFERENCE_REWARDS,
    build_reward_model,
    chat_rows,
    completions_table,
    every_trained_parameter_changes,
    logged,
    make,
    parameters,
    plain_rows,
    text_of,
    vowels,
)

ROWS = {"chat": chat_rows(), "plain": plain_rows()}


def one(completions, **kwargs):
    return [1.0] * len(completions)


def length(completions, **kwargs):
    return [len(text_of(text)) / 8 for text in completions]


async def judged(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


class Judge:
    """A callable object."""

    def __call__(self, completions, **kwargs):
        return vowels(completions)


class AsyncJudge:
    """A callable object whose call is a coroutine."""

    async def __call__(self, completions, **kwargs):
        return vowels(completions)


def _trains(trainer) -> None:
    with every_trained_parameter_changes(trainer):
        trainer.train()


@pytest.fixture(scope="module")
def reward_model(tiny_model, tmp_path_factory) -> str:
    return build_reward_model(tmp_path_factory.mktemp("reward") / "tiny-judge", tiny_model)


@pytest.mark.parametrize("prompts", ROWS)
@pytest.mark.parametrize(
    "rewards",
    [[vowels, length], [vowels, judged], [judged, vowels, one], [judged], [AsyncJudge()], [Judge()]],
    ids=lambda rewards: "+".join(getattr(function, "__name__", type(function).__name__) for function in rewards),
)
def test_kinds_of_functions(tiny_model, tmp_path, prompts, rewards):
    trainer = make(tiny_model, tmp_path, ROWS[prompts], rewards)
    _trains(trainer)
    total = 0.0
    for function in rewards:
        name = getattr(function, "__name__", type(function).__name__)
        total += float(logged(trainer, f"rewards/{name}/mean")[0])
    assert float(logged(trainer, "reward")[0]) == pytest.approx(total, abs=1e-3)


def test_a_partial_function(tiny_model, tmp_path):
    def scaled(completions, factor, **kwargs):
        return [factor * reward for reward in vowels(completions)]

    trainer = make(tiny_model, tmp_path, plain_rows(), functools.partial(scaled, factor=0.5))
    _trains(trainer)
    assert 0 <= float(logged(trainer, "rewards/scaled/mean")[0]) <= 0.5


def test_math_reward_where_none_is_given(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, rewards=None)
    _trains(trainer)
    assert float(logged(trainer, "rewards/math_reward/mean")[0]) == float(logged(trainer, "reward")[0])


def test_weights(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, plain_rows(), [one, judged], reward_weights=[0.7, 0.3])
    _trains(trainer)
    assert float(logged(trainer, "reward")[0]) == pytest.approx(0.7 * 1 + 0.3 * 0.5)
    assert float(logged(trainer, "rewards/one/mean")[0]) == 1
    assert float(logged(trainer, "rewards/judged/mean")[0]) == 0.5
    assert float(logged(trainer, "rewards/judged/std")[0]) == 0


def test_a_weight_for_each(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="weights"):
        make(tiny_model, tmp_path, rewards=[vowels, length], reward_weights=[1.0])


def test_a_function_that_does_not_apply(tiny_model, tmp_path):
    """None of one function leaves the rewards of the others."""

    def elsewhere(completions, **kwargs):
        return [None] * len(completions)

    trainer = make(tiny_model, tmp_path, plain_rows(), [one, elsewhere])
    _trains(trainer)
    assert float(logged(trainer, "reward")[0]) == 1


def test_functions_for_different_rows(tiny_model, tmp_path):
    """As for a mixture of mathematics and code: each function answers for its own rows."""

    def mathematics(completions, task, **kwargs):
        return [1.0 if name == "math" else None for name in task]

    async def code(completions, task, **kwargs):
        return [0.5 if name == "code" else None for name in task]

    rows = plain_rows(4).add_column("task", ["math", "code"] * 2)  # pyright: ignore[reportCallIssue]
    trainer = make(tiny_model, tmp_path, rows, [mathematics, code])
    _trains(trainer)
    assert float(logged(trainer, "reward")[0]) == pytest.approx(0.75)
    assert float(logged(trainer, "rewards/mathematics/mean")[0]) == 1
    assert float(logged(trainer, "rewards/code/mean")[0]) == 0.5
    assert float(logged(trainer, "no_signal")[0]) == 0


@pytest.mark.parametrize("silent", [2, 4])
def test_rows_without_any_signal(tiny_model, tmp_path, silent):
    """Where no function says anything a row changes nothing; where that is so of all rows, the update changes nothing."""

    def reward(completions, solution, **kwargs):
        return [None if int(number) <= silent else 1.0 for number in solution]

    trainer = make(tiny_model, tmp_path, plain_rows(4), reward)
    before = parameters(trainer.model)
    trainer.train()
    after = parameters(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before) == (silent == 4)
    assert float(logged(trainer, "no_signal")[0]) == silent / 4


@pytest.mark.parametrize(
    "kind",
    [bool, int, np.float32, np.bool_, torch.tensor],
    ids=lambda kind: kind.__name__,
)
def test_types_of_rewards(tiny_model, tmp_path, kind):
    def reward(completions, **kwargs):
        return [kind(number % 2) for number, _ in enumerate(completions)]

    trainer = make(tiny_model, tmp_path, plain_rows(), reward)
    _trains(trainer)
    assert float(logged(trainer, "reward")[0]) == 0.5


@pytest.mark.parametrize("form", [np.array, torch.tensor, tuple], ids=lambda form: form.__name__)
def test_rewards_need_not_be_a_list(tiny_model, tmp_path, form):
    def reward(completions, **kwargs):
        return form([float(number % 2) for number, _ in enumerate(completions)])

    trainer = make(tiny_model, tmp_path, plain_rows(), reward)
    _trains(trainer)
    assert float(logged(trainer, "reward")[0]) == 0.5


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [(lambda count: [1.0] * (count - 1), "3 rewards.*4"), (lambda count: [float("inf")] * count, "inf")],
    ids=["too-few", "inf"],
)
def test_wrong_rewards_are_refused_by_name(tiny_model, tmp_path, wrong, message, is_async):
    def careless(completions, **kwargs):
        return wrong(len(completions))

    async def careless_async(completions, **kwargs):
        return wrong(len(completions))

    function = careless_async if is_async else careless
    with pytest.raises(ValueError, match=message) as refusal:
        make(tiny_model, tmp_path, plain_rows(), [one, function]).train()
    assert function.__name__ in str(refusal.value)
    assert "one" not in str(refusal.value).split("'")


def test_an_error_of_a_function_is_the_users_own(tiny_model, tmp_path):
    def broken(completions, **kwargs):
        raise ZeroDivisionError("in the user's code")

    with pytest.raises(ZeroDivisionError, match="in the user's code"):
        make(tiny_model, tmp_path, plain_rows(), broken).train()


def test_coroutines_run_at_the_same_time(tiny_model, tmp_path):
    """Each waits for the other; one after the other would wait for ever."""
    arrived: dict[str, asyncio.Event] = {}

    async def meet(me, other, count):
        arrived.setdefault(me, asyncio.Event()).set()
        await asyncio.wait_for(arrived.setdefault(other, asyncio.Event()).wait(), timeout=20)
        return [1.0] * count

    async def first(completions, **kwargs):
        return await meet("first", "second", len(completions))

    async def second(completions, **kwargs):
        return await meet("second", "first", len(completions))

    trainer = make(tiny_model, tmp_path, plain_rows(), [first, second])
    _trains(trainer)
    assert float(logged(trainer, "reward")[0]) == 2


@pytest.mark.parametrize("prompts", ROWS)
def test_what_functions_are_told(tiny_model, tmp_path, prompts):
    calls = []

    def reward(prompts, completions, completion_ids, solution, level, tags, trainer_state, **kwargs):
        assert len(prompts) == len(completions) == len(completion_ids) == len(solution) == len(level) == len(tags)
        calls.append((trainer_state.global_step, list(solution), list(level), list(tags)))
        for ids, completion in zip(completion_ids, completions, strict=True):
            assert 1 <= len(ids) <= 8
            assert tokenizer.decode(ids, skip_special_tokens=True) == text_of(completion)
        for prompt, number in zip(prompts, solution, strict=True):
            assert str(int(number) - 1) in str(prompt)
        return vowels(completions)

    rows = ROWS[prompts].to_list()
    rows = Dataset.from_list([row | {"level": i, "tags": ["toy", str(i)]} for i, row in enumerate(rows)])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    make(tiny_model, tmp_path, rows, reward, max_steps=2).train()
    assert [step for step, *_ in calls] == [0, 1]
    for _, solution, level, tags in calls:
        assert [int(number) - 1 for number in solution] == level
        assert tags == [["toy", str(number)] for number in level]


def test_what_functions_log(tiny_model, tmp_path):
    """One number a call and a column of the table of completions, from a plain and an async function."""

    def noted(completions, log_metric, log_extra, **kwargs):
        log_metric("longest", max(len(text) for text in completions))
        log_extra("first letter", [text[:1] for text in completions])
        return vowels(completions)

    async def noted_later(completions, log_metric, log_extra, **kwargs):
        log_metric("share/late", 0.25)
        log_extra("late", [None] * len(completions))
        return vowels(completions)

    trainer = make(tiny_model, tmp_path, plain_rows(), [noted, noted_later], log_completions=True, max_steps=2)
    trainer.train()
    for step in (1, 2):
        table = completions_table(tmp_path, step)
        assert list(table["first letter"]) == [text[:1] for text in table["completion"]]
        assert "late" in table.columns
        entry = next(e for e in trainer.state.log_history if e["step"] == step and "longest" in e)
        assert float(entry["longest"]) == max(map(len, table["completion"]))
        assert float(entry["share/late"]) == 0.25


def test_metrics_of_an_evaluation_are_its_own(tiny_model, tmp_path):
    def noted(completions, log_metric, **kwargs):
        log_metric("calls", 1.0)
        return vowels(completions)

    trainer = make(tiny_model, tmp_path, plain_rows(), noted, trainer={"eval_dataset": plain_rows(2)})
    metrics = trainer.evaluate()
    assert float(metrics["eval_calls"]) == 1
    assert not logged(trainer, "calls")


def test_functions_are_not_run_twice_on_a_completion(tiny_model, tmp_path):
    """Calls may cost money."""
    counts = []

    def paid(completions, **kwargs):
        counts.append(len(completions))
        return vowels(completions)

    rows = plain_rows(8)
    make(tiny_model, tmp_path, rows, paid, trainer={"eval_dataset": plain_rows(3)}, eval_strategy="epoch").train()
    assert sum(counts) == 4 + 3 * (sum(counts) > 4)


def test_truncated_completions_earn_nothing_with_require_eos(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, plain_rows(), one, require_eos=True, max_completion_length=2)
    trainer.train()
    clipped = float(logged(trainer, "completions/clipped_ratio")[0])
    assert float(logged(trainer, "reward")[0]) == pytest.approx(1 - clipped)


# Reward models


@pytest.mark.parametrize("prompts", ROWS)
@pytest.mark.parametrize("given", ["path", "instance", "with-tokenizer"])
def test_a_reward_model(tiny_model, tmp_path, reward_model, prompts, given):
    further = {}
    rewards = reward_model
    if given != "path":
        rewards = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1, dtype=torch.float32)
    if given == "with-tokenizer":
        further = {"reward_processing_classes": AutoTokenizer.from_pretrained(reward_model)}
    trainer = make(tiny_model, tmp_path, ROWS[prompts], rewards, trainer=further)
    _trains(trainer)
    table = completions_table(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    scores = []
    for prompt, completion in zip(table["prompt"], table["completion"], strict=True):
        if prompts == "chat":
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        else:
            text = prompt + completion
        with torch.no_grad():
            scores.append(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item())
    assert list(table["tiny-judge"]) == pytest.approx(scores, abs=1e-4)
    assert float(logged(trainer, "rewards/tiny-judge/mean")[0]) == pytest.approx(np.mean(scores), abs=1e-3)


def test_a_reward_model_without_a_padding_token(tiny_model, tmp_path):
    folder = build_reward_model(tmp_path / "judge", tiny_model, has_pad_token=False)
    _trains(make(tiny_model, tmp_path / "run", rewards=folder))


def test_a_reward_model_beside_functions(tiny_model, tmp_path, reward_model):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    trainer = make(
        tiny_model,
        tmp_path,
        plain_rows(),
        [vowels, reward_model, judged],
        trainer={"reward_processing_classes": [None, tokenizer, None]},
        reward_weights=[1.0, 0.1, 1.0],
    )
    _trains(trainer)
    parts = [float(logged(trainer, f"rewards/{name}/mean")[0]) for name in ("vowels", "tiny-judge", "judged")]
    assert float(logged(trainer, "reward")[0]) == pytest.approx(parts[0] + 0.1 * parts[1] + parts[2], abs=1e-3)


def test_a_tokenizer_for_each_reward_model(tiny_model, tmp_path, reward_model):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    with pytest.raises(ValueError, match="reward processing classes"):
        make(
            tiny_model,
            tmp_path,
            rewards=[vowels, reward_model],
            trainer={"reward_processing_classes": [tokenizer]},
        )


# V*


def test_v_star_is_that_of_the_reference_rewards(tiny_model, tmp_path):
    trainer = make(tiny_model, tmp_path, plain_rows(), one, beta1=0.5)
    trainer.train()
    mean = np.mean(np.exp(np.array(REFERENCE_REWARDS) / 0.5))
    assert float(logged(trainer, "v_star")[0]) == pytest.approx(0.5 * np.log(mean), abs=1e-4)


def test_the_same_functions_grade_the_reference(tiny_model, tmp_path):
    """Stage 1 of the trainer takes the weighted rewards of all functions."""
    rows = plain_rows(4).remove_columns("reference_rewards")
    trainer = make(tiny_model, tmp_path, rows, [one, judged], reward_weights=[1.0, 0.5], num_value_samples=2)
    trainer.train()
    assert float(logged(trainer, "v_star")[0]) == pytest.approx(1.25, abs=1e-4)
    assert set(completions_table(tmp_path)["advantage"].round(4)) == {0.0}
