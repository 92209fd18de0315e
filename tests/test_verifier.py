"""The pool of workers and its faces: `grade`, `Verifier`, `math_reward`. Real math-verify, real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from astarpo.verifier import Grade, Outcome, Verifier, grade, math_reward

HANGS = r"\boxed{\sum_{k=1}^{1000000000} \sin(k)}"


def symbolic(number: int) -> str:
    r"""A completion that only a worker can judge: \sqrt{number^2}."""
    return rf"\boxed{{\sqrt{{{number * number}}}}}"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(workers=2, timeout_s=4) as verifier:
        yield verifier


def judge_process(verifier: Verifier) -> psutil.Process:
    """The process that judges; its parent is the keeper."""
    keeper = verifier._workers[0].process
    assert keeper is not None
    return psutil.Process(keeper.pid).children()[0]


@pytest.mark.parametrize(
    ("completion", "gold", "outcome"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", Outcome.CORRECT),
        (r"\boxed{8}", "7", Outcome.WRONG),
        (r"\boxed{\sqrt{50}}", r"5\sqrt{2}", Outcome.CORRECT),
        ("I do not know", "7", Outcome.NO_ANSWER),
        ("I do not know", r"\sqrt{7}", Outcome.NO_ANSWER),
        ("I do not know", r"\sqrt{", Outcome.UNPARSEABLE_GOLD),
        (r"\boxed{8}", "", Outcome.UNPARSEABLE_GOLD),
        (r"\boxed{8}", "7+", Outcome.UNPARSEABLE_GOLD),
        (r"\boxed{" + "1" * 5000 + "}", "7", Outcome.WRONG),
        (r"\boxed{4}", "2 + 2 makes four\n#### 4", Outcome.CORRECT),
    ],
)
def test_outcomes(verifier, completion, gold, outcome):
    assert verifier.grade_batch([completion], [gold])[0].outcome is outcome


def test_a_grade_is_frozen_and_its_outcome_is_a_metric_name():
    judged = grade(r"So \boxed{8}.", "7")
    assert (judged.outcome, judged.correct, judged.answer) == ("wrong", False, "8")
    assert 0 <= judged.seconds < 5
    with pytest.raises(AttributeError):
        judged.answer = "7"  # pyright: ignore[reportAttributeAccessIssue]
    assert Grade(Outcome.CORRECT).correct


def test_order_is_kept_and_repeats_agree(verifier):
    completions = [symbolic(i % 3) for i in range(50)] + [rf"\boxed{{{i % 3}}}" for i in range(50)]
    grades = verifier.grade_batch(completions, ["1"] * 100)
    assert [g.correct for g in grades] == [i % 3 == 1 for i in range(50)] * 2


def test_lengths_must_match(verifier):
    with pytest.raises(ValueError):
        verifier.grade_batch(["1"], [])


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_s": 0}, {"memory_mb": 10}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="needs workers"):
        Verifier(**options)


def test_a_hanging_item_costs_itself_only():
    with Verifier(workers=1, timeout_s=1) as verifier:
        verifier.grade_batch([symbolic(3)], ["3"])
        began = time.monotonic()
        grades = verifier.grade_batch([symbolic(4), HANGS, symbolic(5)], ["4", "7", "5"])
        assert time.monotonic() - began < 2
        assert verifier._workers[0]._judge == "1"
    assert [g.outcome for g in grades] == [Outcome.CORRECT, Outcome.TIMED_OUT, Outcome.CORRECT]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("victim", ["judge", "keeper"])
def test_a_killed_worker_costs_its_item_only(number, victim):
    with Verifier(workers=1, timeout_s=5) as verifier:
        assert verifier.grade_batch([symbolic(3)], ["3"])[0].correct
        judge = judge_process(verifier)
        process = judge if victim == "judge" else judge.parent()
        assert process is not None
        threading.Timer(0.3, os.kill, (process.pid, number)).start()
        grades = verifier.grade_batch([HANGS, symbolic(5), symbolic(6)], ["4", "5", "6"])
        assert [g.outcome for g in grades] == [Outcome.CRASHED, Outcome.CORRECT, Outcome.CORRECT]


def test_a_failure_is_not_remembered():
    with Verifier(workers=1, timeout_s=1) as verifier:
        verifier.grade_batch([symbolic(3)], ["3"])
        judge_process(verifier).suspend()
        assert verifier.grade_batch([symbolic(4)], ["4"])[0].outcome is Outcome.TIMED_OUT
        assert verifier.grade_batch([symbolic(4)], ["4"])[0].correct


@pytest.mark.parametrize("victim", ["judge", "keeper"])
def test_an_idle_worker_that_dies_costs_nothing(victim):
    with Verifier(workers=1, timeout_s=5) as verifier:
        verifier.grade_batch([symbolic(3)], ["3"])
        judge = judge_process(verifier)
        process = judge if victim == "judge" else judge.parent()
        assert process is not None
        process.kill()
        process.wait(5)
        time.sleep(0.5)  # the keeper notices
        assert verifier.grade_batch([symbolic(4)], ["4"])[0].correct


def test_running_out_of_memory_is_a_crash_and_not_wrong():
    greedy = r"\boxed{\gcd((10^{9})!, 2)}"  # evaluated while it is parsed
    with Verifier(workers=1, timeout_s=60, memory_mb=300) as verifier:
        verifier.grade_batch([symbolic(3)], ["3"])
        grades = verifier.grade_batch([greedy, symbolic(4)], ["7", "4"])
    assert [g.outcome for g in grades] == [Outcome.CRASHED, Outcome.CORRECT]


def test_nobody_outlives_the_verifier_or_its_process():
    with Verifier(workers=1) as verifier:
        verifier.grade_batch([symbolic(3)], ["3"])
        judge = judge_process(verifier)
        keeper = judge.parent()
    assert keeper is not None
    assert not psutil.wait_procs([judge, keeper], timeout=5)[1]
    script = f"""
        import os, signal, threading, psutil
        from astarpo.verifier import Verifier
        verifier = Verifier(timeout_s=100)
        verifier.grade_batch([r"\\boxed{{\\sqrt{{9}}}}"], ["3"])
        print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        verifier.grade_batch([r"{HANGS}"], ["7"])
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100)
    children = [int(pid) for pid in run.stdout.split()]
    assert len(children) == 2, run.stderr
    left = [psutil.Process(pid) for pid in children if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(left, timeout=5)[1]


def test_a_worker_whose_pipes_close_ends_and_says_nothing(capfd):
    with Verifier(workers=1) as verifier:
        verifier.grade_batch([symbolic(3)], ["3"])
        keeper = judge_process(verifier).parent()
        process = verifier._workers[0].process
        assert keeper is not None and process is not None and process.stdin is not None and process.stdout is not None
        process.stdout.close()
        process.stdin.close()  # as when an interpreter ends, which may be a while before `control` closes
        assert not psutil.wait_procs([keeper], timeout=5)[1]
    assert "Traceback" not in capfd.readouterr().err


def test_works_in_threads_and_in_asyncio(verifier):
    results = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(verifier.grade_batch([symbolic(i)], [str(i)])[0]))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(g.correct for g in results)

    async def many():
        return await asyncio.gather(*(verifier.grade_batch_async([symbolic(i)], [str(i)]) for i in range(20, 40)))

    assert all(grades[0].correct for grades in asyncio.run(many()))


def test_a_forked_child_has_its_own_workers(verifier):
    assert grade(symbolic(11), "11").correct
    child = os.fork()
    if child == 0:
        with pytest.raises(RuntimeError, match="forked"):
            verifier.grade_batch(["1"], ["1"])
        os._exit(0 if grade(symbolic(12), "12").correct else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert grade(symbolic(13), "13").correct


def test_workers_ignore_gmpy2_and_the_current_folder(tmp_path):
    (tmp_path / "sympy.py").write_text("raise SystemExit('the user\\'s own sympy.py was imported')")
    script = r"""
        from astarpo.verifier import Verifier
        with Verifier() as verifier:
            print(verifier.grade_batch([r"\boxed{\sqrt{9}}"], ["3"])[0].outcome)
            keeper = verifier._workers[0].process.pid
            print("gmpy2" in open(f"/proc/{keeper}/maps").read())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert run.stdout.split() == ["correct", "False"], run.stderr


def test_the_reward_function():
    logged = {}
    chat = [[{"role": "assistant", "content": text}] for text in (r"\boxed{4}", r"\boxed{5}", "well")]
    rewards = math_reward(["q"] * 3, chat, ["#### 4"] * 3, log_metric=logged.__setitem__, extra=[1, 2, 3])
    assert rewards == [1.0, 0.0, 0.0]
    assert logged["verifier/correct"] == pytest.approx(1 / 3)
    assert {f"verifier/{outcome}" for outcome in Outcome} == set(logged)
    assert math_reward(["q"] * 2, [r"\boxed{4}", "well"], [r"\boxed{"] * 2) == [None, None]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{4}"}]}]
    silent = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert math_reward(["q"] * 3, [parts, silent, parts], ["4", "4", None]) == [1.0, 0.0, None]


def test_a_closed_verifier_says_so():
    verifier = Verifier()
    verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        verifier.grade_batch([], [])
