"""Which text is the answer, and the workers: real math-verify, real processes."""

import asyncio
import os
import signal
import threading

import pytest

from astarpo.verifier import Outcome, Verifier, extract_answer, extract_gold, grade, math_reward


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout_s=4) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"So \boxed{5}.", "5"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{2} and \boxed{3", None),
        (r"\boxed{}", None),
        (r"<think>maybe \boxed{7}</think> \boxed{42}", "42"),
        (r"<think>\boxed{7}</think> Done.", None),
        (r"<think>I believe \boxed{7}", None),
        ("The answer is 5.", "5"),
        ("The answer is 3.14.", "3.14"),
        ("Final answer: $\\frac{1}{2}$", "$\\frac{1}{2}$"),
        ("**Answer:** 42", "42"),
        ("work\n#### 1,234", "1,234"),
        ("Q\nA: 5", "5"),
        ("11 times 7 is 77.", "77"),
        ("The answer is 5. Check: 2 + 4 = 6.", "5"),
        ("7 × 8", None),
        ("Is it 5?", None),
        ("", None),
    ],
)
def test_which_text_is_the_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "gold"), [("42", "42"), ("2 + 2\n#### 4", "4"), (r"thus $x = \boxed{7}$", "7"), (r"\boxed{7", "")]
)
def test_gold_of_a_worked_solution(text, gold):
    assert extract_gold(text) == gold


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", Outcome.CORRECT),
        (r"\boxed{1,234}", "1234", Outcome.CORRECT),
        (r"\boxed{(1,2)}", "(1, 2)", Outcome.CORRECT),
        (r"\boxed{8}", "7", Outcome.WRONG),
        ("I do not know", "7", Outcome.NO_ANSWER),
        (r"\boxed{8}", "", Outcome.UNPARSEABLE_GOLD),
        (r"\boxed{" + "1" * 5000 + "}", "7", Outcome.WRONG),
    ],
)
def test_outcomes(verifier, completion, gold, outcome):
    assert verifier.grade_batch([completion], [gold])[0].outcome is outcome


def test_order_is_kept_and_repeats_agree(verifier):
    completions = [rf"\boxed{{{i % 3}}}" for i in range(50)]
    grades = verifier.grade_batch(completions, ["1"] * 50)
    assert [g.correct for g in grades] == [i % 3 == 1 for i in range(50)]


def test_a_hanging_item_costs_itself_only():
    hang = r"\boxed{9^{9^{9^{9}}}}"
    with Verifier(workers=1, timeout_s=1) as verifier:
        grades = verifier.grade_batch([r"\boxed{1}", hang, r"\boxed{2}"], ["1", "7", "2"])
    assert [g.outcome for g in grades] == [Outcome.CORRECT, Outcome.TIMED_OUT, Outcome.CORRECT]


def test_a_killed_worker_costs_its_item_only():
    with Verifier(workers=1, timeout_s=5) as verifier:
        assert verifier.grade_batch([r"\boxed{1}"], ["1"])[0].correct
        process = verifier._workers[0].process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
        killer.start()
        assert verifier.grade_batch([r"\boxed{2}"], ["2"])[0].outcome is Outcome.CRASHED
        assert verifier.grade_batch([r"\boxed{2}"], ["2"])[0].correct


def test_memory_limit_stops_a_huge_matrix():
    with Verifier(workers=1, timeout_s=20, memory_mb=1024) as verifier:
        grades = verifier.grade_batch([r"\boxed{\operatorname{zeros}(30000,30000)}", r"\boxed{3}"], ["7", "3"])
    assert not grades[0].correct
    assert grades[1].correct


def test_works_in_threads_and_in_asyncio(verifier):
    results = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(verifier.grade_batch([rf"\boxed{{{i}}}"], [str(i)])[0]))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(g.correct for g in results)
    assert asyncio.run(verifier.grade_batch_async([r"\boxed{1}"], ["1"]))[0].correct


def test_grade_and_reward_share_one_judgement():
    assert grade(r"\boxed{\frac{2}{4}}", "0.5").correct
    logged = {}
    chat = [[{"role": "assistant", "content": text}] for text in (r"\boxed{4}", r"\boxed{5}", "well")]
    rewards = math_reward(["q"] * 3, chat, ["#### 4"] * 3, log_metric=logged.__setitem__, extra=[1, 2, 3])
    assert rewards == [1.0, 0.0, 0.0]
    assert logged["verifier/correct"] == pytest.approx(1 / 3)
    assert math_reward(["q"], [r"\boxed{4}"], [r"\boxed{"]) == [None]


def test_a_closed_verifier_says_so():
    verifier = Verifier()
    verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        verifier.grade_batch([], [])
