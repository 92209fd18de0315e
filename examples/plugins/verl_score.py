"""astarpo's grading in verl.

    pip install astarpo
    python -m verl.trainer.main_ppo reward.custom_reward_function.path=examples/plugins/verl_score.py ...

Older releases of verl want `custom_reward_function.path=... custom_reward_function.name=compute_score`, which newer ones read too.

verl wants one number for every completion and cannot leave one out: None drops the rewards of the whole batch, NaN spoils those of the group.
So a completion that could not be judged (no time, no memory, an answer in the data set that nothing can parse) gets 0 and a warning in the
log. To stop instead, add `+reward.custom_reward_function.reward_kwargs.strict=True` (the reward manager `rate_limited` catches that error, logs
it and gives 0).
"""

import logging
from typing import Any

from astarpo.verifier import grade
from astarpo.verifier.reward import reward_of

logger = logging.getLogger(__name__)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    strict: bool = False,
    **kwargs: Any,
) -> float:
    """1 for a completion whose final answer equals `ground_truth`, 0 for any other."""
    outcome = grade(solution_str, str(ground_truth)).outcome
    reward = reward_of(outcome)
    if reward is None:
        message = (
            f"astarpo could not judge an answer ({outcome}): {data_source}, gold answer {str(ground_truth)[:200]!r}"
        )
        if strict:
            raise RuntimeError(message)
        logger.warning("%s. It gets 0, since verl cannot leave it out.", message)
    return reward or 0.0
