"""Options of episodes, for every command that samples them."""

from dataclasses import dataclass, field

from .templates import REVISE, VERIFY
from .verdict import PARSERS


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
            "choices": ["single", "pag"],
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
