"""astarpo's grading in Prime Intellect's `verifiers`.

From release 0.3 on, rewards are named on the command line, whatever the taskset. The tasks' data must have a field `answer`:

    pip install astarpo verifiers
    vf-eval TASKSET --env.taskset.task.rewards.correct.fn examples/plugins/verifiers_rubric.py:correct

The taskset's own rewards stay and are added; `--env.taskset.task.rewards.NAME.weight 0` takes one of them out.

Releases before 0.3 grade by rubrics: in your environment write `vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[right_answer]))`.

A completion that could not be judged raises an error. From 0.3 on the rollout is then marked as failed and has no reward; before, `verifiers`
logs the error and counts 0, since it has nothing else.
"""

import asyncio
from typing import Any

from astarpo.verifier import grade
from astarpo.verifier.reward import completion_text, reward_of


async def _reward(completion: str, answer: Any) -> float:
    outcome = (await asyncio.to_thread(grade, completion, str(answer))).outcome
    reward = reward_of(outcome)
    if reward is None:
        raise RuntimeError(f"astarpo could not judge an answer ({outcome}), gold answer {str(answer)[:200]!r}")
    return reward


async def correct(task: Any, trace: Any) -> float:
    """From 0.3 on: 1 where the last reply of `trace` ends in the answer of `task`, 0 for any other."""
    return await _reward(trace.last_reply, task.answer)


async def right_answer(completion: Any, answer: Any) -> float:
    """For rubrics, before 0.3: 1 where `completion` ends in `answer`, 0 for any other."""
    return await _reward(completion_text(completion), answer)
