"""astarpo's grading in lm-evaluation-harness, for the task `math500_astarpo`.

    pip install astarpo "lm_eval[hf]"
    lm_eval --include_path examples/plugins/lm_eval --tasks math500_astarpo --apply_chat_template --model_args pretrained=MODEL

Models that think for long need more than 2048 tokens: `--gen_kwargs max_gen_toks=16384`. `accuracy` is the share of right answers among
those that could be judged, `unjudged` the share that could not (no time or no memory to judge it): these count neither as right nor as wrong.
"""

from typing import Any

from astarpo.verifier import grade
from astarpo.verifier.reward import reward_of


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The metrics of one completion of a problem of MATH-500."""
    reward = reward_of(grade(results[0], doc["answer"]).outcome)
    return {"unjudged": 1.0} if reward is None else {"accuracy": reward, "unjudged": 0.0}
