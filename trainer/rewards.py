"""Rewards of completions, or of an episode's answers, by TRL's reward functions.

Suffixes name the dimensions: G completions of all processes, B of this one, F reward functions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather

from ..rollout.episodes.rewards import refuse_partial
from .durable import DurableTrainer
from .episodes import Turns


class GradedTrainer(DurableTrainer):
    """A trainer that knows, besides TRL's rewards for each function, their weighted sums, and None for "no signal"."""

    turns: Turns

    def score_completions(
        self, inputs: list[dict[str, Any]], texts: list[str], token_ids: list[list[int]]
    ) -> torch.Tensor:
        """Weighted rewards of completions by the reward functions.

        Args:
            inputs (`list[dict[str, Any]]`):
                Rows of the training set, one per completion.
            texts (`list[str]`):
                The completions.
            token_ids (`list[list[int]]`):
                Their tokens.

        Returns:
            `torch.Tensor` of shape (B,): NaN where no function gives a signal.
        """
        return self._weighted(self._rewards_per_func(inputs, texts, token_ids)).cpu()

    def _rewards_per_func(
        self, inputs: list[dict[str, Any]], texts: list[str], token_ids: list[list[int]]
    ) -> torch.Tensor:
        prompts = [row["prompt"] for row in inputs]
        is_chat = isinstance(prompts[0], list)
        completions: list[Any] = [[{"role": "assistant", "content": text}] for text in texts] if is_chat else texts
        rewards_per_func_GF = super()._calculate_rewards(inputs, prompts, completions, token_ids)
        self._refuse_infinite(rewards_per_func_GF)
        return rewards_per_func_GF

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """TRL's hook, which it calls once for a generation; keeps the weighted rewards for the loss."""
        if self.turns.options.is_pag:
            first_GF = self._rewards_of_answers(inputs, last=False)
            # What reward functions log belongs to the answers that stand in the end.
            self._pending_extra_logs.clear()
            self._pending_metrics.clear()
            final_GF = self._rewards_of_answers(inputs, last=True)
            self._first_rewards_G, self._rewards_G = self._weighted(first_GF), self._weighted(final_GF)
            refuse_partial([*self._first_rewards_G.tolist(), *self._rewards_G.tolist()])
            return final_GF
        rewards_per_func_GF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._refuse_infinite(rewards_per_func_GF)
        self._take_from_cut(rewards_per_func_GF, [ids[-1] not in self.eos_token_ids for ids in completion_ids_list])
        self._rewards_G = self._weighted(rewards_per_func_GF)
        return rewards_per_func_GF

    def _rewards_of_answers(self, inputs: list[dict[str, Any]], last: bool) -> torch.Tensor:
        texts, token_ids, is_cut = self.turns.answers(last)
        rewards_per_func_GF = self._rewards_per_func(inputs, texts, token_ids)
        self._take_from_cut(rewards_per_func_GF, is_cut)
        return rewards_per_func_GF

    def _take_from_cut(self, rewards_per_func_GF: torch.Tensor, is_cut: Sequence[bool]) -> None:
        """Completions that were cut earn nothing, where `require_eos` says so."""
        if self.args.require_eos:
            cut_G = gather(torch.tensor(is_cut).to(rewards_per_func_GF.device))
            has_signal_GF = ~rewards_per_func_GF.isnan()
            rewards_per_func_GF[cut_G[:, None] & has_signal_GF] = 0.0

    def _local(self, tensor_G: torch.Tensor, count: int) -> torch.Tensor:
        """This process's rows of what was gathered."""
        start = self.accelerator.process_index * count
        return tensor_G[start : start + count].to(self.accelerator.device)

    def _refuse_infinite(self, rewards_per_func_GF: torch.Tensor) -> None:
        infinite_F = rewards_per_func_GF.isinf().any(0).tolist()
        names = [name for name, found in zip(self.reward_func_names, infinite_F, strict=True) if found]
        if names:
            raise ValueError(
                f"Reward function {', '.join(names)} returned inf. Rewards must be finite, or None for no signal."
            )

    def _weighted(self, rewards_per_func_GF: torch.Tensor) -> torch.Tensor:
        weights_F = self.reward_weights.to(rewards_per_func_GF.device)
        rewards_G = (rewards_per_func_GF * weights_F).nansum(1)
        return rewards_G.masked_fill(rewards_per_func_GF.isnan().all(1), torch.nan)
