"""A kind of episode of a user's own: an attempt, then another one. `--episode second_try:KIND` finds it in this folder."""

from astarpo.rollout import EpisodeKind


class SecondTry(EpisodeKind):
    name = "second_try"
    roles = ("attempt", "second")
    follow_ups = {"second": "Check your answer."}  # noqa: RUF012

    def reward(self, role, success, label):
        """The second attempt earns what it gains over the first one, and half a point for being right."""
        return success if role == "attempt" else success - 0.5 * label


KIND = SecondTry()
