"""The user turns of a PAG episode, and their token ids."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERIFY = (
    "Check the math solution step-by-step. If you find a mistake: state the wrong step, explain why it's wrong, and end your "
    "response with 'The answer is wrong'. If all steps are correct, end your response with 'The answer is correct'."
)
REVISE = "You indicated that your previous answer was wrong. Please provide the correct solution to the math problem."
SEPARATOR = "\n\n"
_MARK = "\u241f"
"""Stands for an assistant's turn while the chat template is asked what comes after one; in no vocabulary's template."""


@dataclass(frozen=True, slots=True)
class FollowUps:
    """Token ids between the turns: what closes the model's turn is not among them, it wrote that itself.

    Attributes:
        verify (`tuple[int, ...]`):
            The user asks to check the attempt; the assistant's header.
        revise (`tuple[int, ...]`):
            The user asks for another solution; the assistant's header.
        end_of_turn (`int`):
            What closes a turn of the model in this template.
    """

    verify: tuple[int, ...]
    revise: tuple[int, ...]
    end_of_turn: int

    @classmethod
    def render(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        verify: str = VERIFY,
        revise: str = REVISE,
        separator: str = SEPARATOR,
    ) -> "FollowUps":
        """Render both through the tokenizer's chat template, without a system block.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                A tokenizer with a chat template.
            verify (`str`, *optional*):
                Asks to check the attempt.
            revise (`str`, *optional*):
                Asks for another solution.
            separator (`str`, *optional*):
                Between the end of the model's turn and the user's.

        Raises:
            ValueError: If the template leaves assistants' turns out, or a text is empty.
        """
        if not verify.strip() or not revise.strip():
            raise ValueError(
                "The verify and revise prompts must say something. Set verify_prompt and revise_prompt, or leave them out."
            )
        (end, asks), (_, asks_again) = (_after_a_turn(tokenizer, text, separator) for text in (verify, revise))
        ids: list[list[int]] = tokenizer([asks, asks_again], add_special_tokens=False)["input_ids"]
        end_of_turn: Any = tokenizer.convert_tokens_to_ids(end)
        return cls(tuple(ids[0]), tuple(ids[1]), end_of_turn)

    def longest_after_prompt(self, max_completion_length: int) -> int:
        """Most tokens of an episode without its prompt: three turns, what is between, and an end for turns that were cut."""
        return len(self.verify) + len(self.revise) + 2 + 3 * max_completion_length


def _after_a_turn(tokenizer: Any, text: str, separator: str) -> tuple[str, str]:
    """What closes a turn of the model, and what stands between that and its next turn."""
    chat = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": _MARK},
        {"role": "user", "content": text},
    ]
    rendered: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    _, found, rest = rendered.rpartition(_MARK)
    if not found:
        raise ValueError(
            f"The chat template of `{tokenizer.name_or_path}` leaves earlier turns out, so an episode of several turns cannot be "
            "rendered. Use a model whose template keeps them."
        )
    rest = rest.lstrip()
    # Not always the tokenizer's end-of-sequence token: base models with a chat template have another one.
    specials = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    end = next((token for token in specials if rest.startswith(token)), "")
    return end or str(tokenizer.eos_token), separator + rest.removeprefix(end).lstrip()
