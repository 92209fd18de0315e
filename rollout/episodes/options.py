"""Options of episodes, for every command that samples them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .templates import REVISE, VERIFY, FollowUps
from .verdict import PARSERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..engines.interface import Engine, PolicyLink, SamplingSettings
    from .episode import EpisodeSampler

EPISODES = ("single", "pag")


@dataclass
class EpisodeOptions:
    """What the model is asked to do.

    Args:
        episode (`str`, *optional*, defaults to `"single"`):
            `single`: a completion. `pag`: an attempt, its verification by the same model, and a revision where that said "wrong"
            (arXiv 2506.10406).
        verify_prompt (`str`, *optional*):
            Asks to check the attempt; PAG's own when not given.
        revise_prompt (`str`, *optional*):
            Asks for another solution; PAG's own when not given.
        verdict_parser (`str`, *optional*, defaults to `"strict"`):
            `strict`: the verification must end with "The answer is correct." or "The answer is wrong.", period included, as in
            PAG's code, and say so once. `lenient`: the words will do, in any case and anywhere. Figures of the two cannot be compared.
    """

    episode: str = field(
        default="single",
        metadata={
            "help": "single: a completion; pag: an attempt, its verification, and a revision where that said wrong.",
            "choices": list(EPISODES),
        },
    )
    verify_prompt: str = field(default=VERIFY, metadata={"help": "Asks to check the attempt."})
    revise_prompt: str = field(default=REVISE, metadata={"help": "Asks for another solution."})
    verdict_parser: str = field(
        default="strict",
        metadata={
            "help": 'strict: ends with "The answer is correct." or "... wrong."; lenient: the words, anywhere.',
            "choices": list(PARSERS),
        },
    )

    def __post_init__(self):
        for name, choices in (("episode", EPISODES), ("verdict_parser", PARSERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"There is no {name} `{getattr(self, name)}`. Choose {' or '.join(choices)}.")

    @property
    def is_pag(self) -> bool:
        """Whether there are episodes, and not only completions."""
        return self.episode == "pag"

    @property
    def turns(self) -> int:
        """Most turns of an episode, K."""
        return 3 if self.is_pag else 1

    def check_engine(self, engine: str) -> None:
        """Raise a `ValueError` for an engine that cannot sample turn by turn."""
        if self.is_pag and engine == "ray":
            raise ValueError(
                "Ray's workers would load the model anew for every turn of every batch of episodes. Set --engine vllm, server or "
                "transformers."
            )

    def follow_ups(self, tokenizer: "PreTrainedTokenizerBase") -> FollowUps:
        """What is put between the turns."""
        return FollowUps.render(tokenizer, self.verify_prompt, self.revise_prompt)

    def longest(self, tokenizer: "PreTrainedTokenizerBase", max_completion_length: int) -> int:
        """Most tokens after the prompt."""
        if not self.is_pag:
            return max_completion_length
        return self.follow_ups(tokenizer).longest_after_prompt(max_completion_length)

    def sampler(
        self,
        engine: "Engine",
        tokenizer: "PreTrainedTokenizerBase",
        settings: "SamplingSettings",
        policy: "PolicyLink | None" = None,
    ) -> "EpisodeSampler":
        """A sampler of such episodes."""
        from .episode import EpisodeSampler

        return EpisodeSampler(
            engine,
            settings,
            self.follow_ups(tokenizer),
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            self.verdict_parser,
            policy,
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides episodes besides what decides completions; nothing for completions."""
        if not self.is_pag:
            return {}
        return {
            "episode": self.episode,
            "verify_prompt": self.verify_prompt,
            "revise_prompt": self.revise_prompt,
            "verdict_parser": self.verdict_parser,
        }
