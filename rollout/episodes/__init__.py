"""PAG episodes (arXiv 2506.10406): attempt, verification, revision."""

from .episode import ROLES, Episode, EpisodeSampler, Role, Turn
from .rewards import binary_value, check_alpha, revision_value, turn_rewards
from .templates import FollowUps
from .verdict import Verdict, parse_verdict

__all__ = [
    "ROLES",
    "Episode",
    "EpisodeSampler",
    "FollowUps",
    "Role",
    "Turn",
    "Verdict",
    "binary_value",
    "check_alpha",
    "parse_verdict",
    "revision_value",
    "turn_rewards",
]
