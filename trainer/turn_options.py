"""Options of episodes that only training has: rewards, values and weights of the turns."""

import math
from dataclasses import dataclass, field

from ..rollout.episodes.options import EpisodeOptions
from ..rollout.episodes.rewards import check_alpha

VALUES = ("table", "constant", "network")


@dataclass
class TurnOptions(EpisodeOptions):
    """What the trainer does with the turns of an episode; a plain completion is an episode of one turn.

    Args:
        alpha (`float`, *optional*, defaults to `1.0`):
            Weight of acc2 − acc1 in the revision's reward.
        turn_weights (`list[float]`, *optional*, defaults to `[1.0, 1.0, 1.0]`):
            λ of attempt, verification and revision.
        role_weighting (`bool`, *optional*, defaults to `False`):
            Divide the weights of the solver's turns, and of the verifier's, by the spread of their residuals in earlier updates.
            The target is not touched, so the residual keeps its zero.
        balance_labels (`bool`, *optional*, defaults to `False`):
            Weigh verifications by 1 / 2P(label), P being the share of right or of wrong attempts in earlier updates, so that both
            count alike: else a verifier that always says what is more frequent earns more than one that looks.
        centre_residuals (`bool`, *optional*, defaults to `False`):
            Add to V the mean residual of earlier updates for the same role and label: a V* of the reference lies far below
            what a trained verifier earns.
        value (`str`, *optional*):
            Where V comes from. `table`: from the reference samples of the prompt. `constant`: where there are none, from the
            reference's chance of success by role and label. `network`: there from a network on the reference's hidden states, for
            the roles in which it beats the constants on held-out prompts. `table` for completions and `constant` for
            episodes when not given (no verification or revision has reference samples of its own state).
        online_value (`bool`, *optional*, defaults to `False`):
            Go on training the network after each update, on the states that were visited, with truncated weights
            min(2, π_ref/π) and as many states of the reference.
        trajectory_value (`bool`, *optional*, defaults to `False`):
            One ℓ over all turns, the sum of their rewards, and V* of whole episodes: what PAG finds to make verifiers
            collapse. For ablations.
    """

    alpha: float = field(default=1.0, metadata={"help": "Weight of acc2 - acc1 in the revision's reward."})
    turn_weights: list[float] = field(
        default_factory=lambda: [1.0, 1.0, 1.0],
        metadata={"help": "Weights of attempt, verification and revision in the loss."},
    )
    role_weighting: bool = field(
        default=False, metadata={"help": "Divide weights by the spread of the role's residuals in earlier updates."}
    )
    balance_labels: bool = field(
        default=False, metadata={"help": "Let verifications of right and of wrong attempts count alike."}
    )
    centre_residuals: bool = field(
        default=False, metadata={"help": "Add to V the mean residual of earlier updates for the same role and label."}
    )
    value: str | None = field(
        default=None,
        metadata={
            "help": "Where V comes from if a state has no reference samples: `constant` by role and label, or a `network`; `table`: "
            "every prompt has some. `table` for completions and `constant` for episodes when not given.",
            "choices": list(VALUES),
        },
    )
    online_value: bool = field(default=False, metadata={"help": "Go on training the value network after each update."})
    trajectory_value: bool = field(
        default=False, metadata={"help": "One log-ratio, reward and V* for a whole episode; for ablations."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_alpha(self.alpha)
        weights = self.turn_weights
        if len(weights) != 3 or not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(
                f"turn_weights must be three numbers of at least 0, not all 0 (attempt, verification, revision), got {weights}."
            )
        if self.value not in (None, *VALUES):
            raise ValueError(f"There is no value `{self.value}`. Choose {', '.join(VALUES)}.")
        if self.online_value and self.value != "network":
            raise ValueError("online_value trains a value network: set --value network too.")
        if self.is_pag:
            self._check_episodes()
        else:
            self._refuse_for_completions()

    def _check_episodes(self) -> None:
        if self.value == "table":
            raise ValueError(
                "value=table needs reference samples of every state, and no verification or revision has any. Remove it: first "
                "attempts have their table anyway, the others constants or a network."
            )
        if self.trajectory_value and (self.value or self._lagged or set(self.turn_weights) != {1.0}):
            raise ValueError(
                "trajectory_value has one value for a whole episode: remove value, turn_weights, role_weighting, balance_labels and "
                "centre_residuals."
            )

    def _refuse_for_completions(self) -> None:
        found = [*self._lagged, *(name for name in ("trajectory_value", "online_value") if getattr(self, name))]
        found += [name for name in ("alpha", "turn_weights") if set(_as_list(getattr(self, name))) != {1.0}]
        if found:
            raise ValueError(f"{', '.join(found)} has no effect on completions. Set --episode pag, or remove it.")

    @property
    def _lagged(self) -> list[str]:
        """Which of the options are set that follow earlier updates."""
        return [name for name in ("role_weighting", "balance_labels", "centre_residuals") if getattr(self, name)]

    @property
    def value_source(self) -> str:
        """`value`, with its default."""
        return self.value or ("constant" if self.is_pag else "table")


def _as_list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
