"""A kind of episode that astarpo does not have, as a user would write it, and a pool of such episodes."""

from transformers import AutoTokenizer

from astarpo.rollout import EngineOptions, EpisodeKind, ModelOptions, SampleOptions, pool_fingerprint, sample_pool
from astarpo.verifier import Verifier


class SecondTry(EpisodeKind):
    """An attempt, and a second one. Spoiling an attempt that was right costs a quarter."""

    name = "second_try"
    roles = ("attempt", "second")
    follow_ups = {"second": "Check your answer."}  # noqa: RUF012

    def reward(self, role, success, label):
        return success - 0.25 * label * (1 - success) if role == "second" else success


KIND = SecondTry()


def make_pool(folder, model, engine, problems):
    """Four reference episodes of each problem."""
    tokenizer, options = AutoTokenizer.from_pretrained(model), SampleOptions(str(folder), 4, 32)
    fingerprint = pool_fingerprint(ModelOptions(model), EngineOptions(), tokenizer, problems, options)
    with Verifier() as verifier:
        return sample_pool(engine, tokenizer, problems, options, fingerprint, verifier, kind=KIND)
