"""What the loss reads of a batch: rewards, values and weights of its turns, and which tokens are whose.

A plain completion is one turn. A PAG episode has three (attempt, verification, revision), sampled here in the place of TRL's
completions; turns that were not reached have weight 0.

Suffixes name the dimensions: B completions or episodes of this process, K turns, T completion tokens, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..rollout.episodes.episode import ROLES, Episode, Role
from ..rollout.episodes.rewards import turn_rewards
from ..rollout.pool import ReferencePool, rewards_tensor
from ..rollout.prompts import sample_seed
from ..rollout.values import optimal_values
from .dataset import VALUE, problem_of
from .hidden_states import reference_hidden
from .metrics import add_residuals, add_turns
from .pool_states import episode_returns, pool_states
from .residuals import LaggedResiduals, residual_moments
from .state_values import FILE, StateValues, values_of

if TYPE_CHECKING:
    from .trainer import AStarPOTrainer
    from .turn_options import TurnOptions

MOMENTS = "residuals.safetensors"
ROLE_K = torch.arange(len(ROLES))
VERIFIED, REVISED = ROLES.index(Role.VERIFY), ROLES.index(Role.REVISE)

Batch = dict[str, torch.Tensor]


class EndUpdate(TrainerCallback):
    """Lets the turns learn from an update once it is done, and before a checkpoint of it is written."""

    def __init__(self, turns: "Turns"):
        self._turns = turns

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in what the update's residuals were."""
        self._turns.end_update(state.global_step)


class Turns:
    """Rewards, values and weights of the turns of a batch.

    Args:
        trainer ([`AStarPOTrainer`]):
            The trainer.
        options ([`TurnOptions`]):
            Kind of episode, rewards, values.
    """

    def __init__(self, trainer: "AStarPOTrainer", options: "TurnOptions"):
        self.options = options
        self.residuals = LaggedResiduals()
        self.episodes: list[Episode] = []
        """Those of the generation being scored."""
        self._trainer = trainer
        self._values: StateValues | None = None
        self._returns: dict[str, float] | None = None
        self._observed: dict[int, list[Batch]] = {}

    # --- sampling and rewards

    def rollout(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: one episode per prompt, as one completion of which the model did not write every token."""
        backend, prompt_ids = trainer.vllm_generation, trainer._tokenize_prompts(prompts)[0]
        self.episodes = backend.episodes(prompt_ids, self.options, trainer._tokenizer)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(episode.token_ids) for episode in self.episodes],
            "logprobs": [list(episode.logprobs) for episode in self.episodes],
            "env_mask": [[int(turn > 0) for turn in episode.turn_ids] for episode in self.episodes],
        }

    def answers(self, last: bool) -> tuple[list[str], list[list[int]], list[bool]]:
        """Texts, token ids and whether they were cut, of the first attempts or of the answers that stand in the end."""
        turns = [(episode.turn(Role.REVISE) if last else None) or episode.turns[0] for episode in self.episodes]
        return (
            [turn.text for turn in turns],
            [list(turn.completion.token_ids) for turn in turns],
            [turn.is_cut for turn in turns],
        )

    # --- what the loss reads

    def of_completions(
        self, inputs: Sequence[dict[str, Any]], output: dict[str, Any], rewards_B: torch.Tensor
    ) -> Batch:
        """A batch of plain completions, K = 1."""
        values_B = self._table(inputs)
        if values_B.isnan().any() and self.options.value_source != "table":
            chances_B = self._attempt_chances(values_B.isnan(), output)
            zeros_B = torch.zeros_like(ROLE_K[:1]).expand(len(values_B))
            filled_B = values_of(chances_B, zeros_B, zeros_B, self.options.alpha, self._trainer.args.beta1)
            values_B = torch.where(values_B.isnan(), filled_B, values_B)
        values_B = values_B.to(rewards_B.device)
        has_signal_B = ~(rewards_B.isnan() | values_B.isnan())
        return {
            "rewards": rewards_B.nan_to_num(0.0)[:, None],
            "values": values_B.nan_to_num(0.0)[:, None],
            "weights": has_signal_B.float()[:, None],
            "present": has_signal_B[:, None],
            "turn_ids": output["completion_mask"] * output.get("tool_mask", 1),
            "v_star": values_B,
        }

    def of_episodes(
        self, inputs: Sequence[dict[str, Any]], output: dict[str, Any], first_B: torch.Tensor, final_B: torch.Tensor
    ) -> Batch:
        """A batch of the episodes just sampled; rewards of their first and of their last answers, NaN for no signal."""
        first_B, final_B = first_B.cpu(), final_B.cpu()
        rewards_BK, present_BK = self._rewards(first_B.tolist(), final_B.tolist())
        turn_ids_BT = _padded([episode.turn_ids for episode in self.episodes], output["completion_mask"])
        if self.options.trajectory_value:
            return self._whole(inputs, rewards_BK, present_BK, turn_ids_BT)
        labels_BK = torch.stack([torch.zeros_like(first_B), first_B == 1, first_B == 1], dim=1).long()
        hidden_BKD = self._hidden(output) if self._needs_hidden(inputs) else None
        values_BK = self._turn_values(inputs, labels_BK, hidden_BKD)
        centres_BK = self.residuals.centre(labels_BK) * float(self.options.centre_residuals)
        weights_K = torch.tensor(self.options.turn_weights)
        if self.options.role_weighting:
            weights_K = weights_K * self.residuals.weights(self.options.centre_residuals)
        weights_BK = present_BK * weights_K
        if self.options.balance_labels:
            weights_BK = weights_BK * self.residuals.balance(labels_BK)
        batch = {
            "rewards": rewards_BK,
            "values": values_BK + centres_BK,
            "weights": weights_BK,
            "present": present_BK > 0,
            "centres": centres_BK,
            "labels": labels_BK,
            "success": self._success(rewards_BK, final_B),
            "v_star": values_BK[:, 0],
        }
        if hidden_BKD is not None and self.options.online_value:
            batch["hidden"] = hidden_BKD
        self._log(batch, present_BK)
        return {**{name: tensor.to(turn_ids_BT.device) for name, tensor in batch.items()}, "turn_ids": turn_ids_BT}

    def _table(self, inputs: Sequence[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([row.get(VALUE, torch.nan) for row in inputs], dtype=torch.float32)

    def _rewards(self, first: list[float], final: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards, and which turns are there and have signal, both of shape (B, K)."""
        rewards_BK = torch.zeros(len(first), len(ROLES))
        present_BK = torch.zeros(len(first), len(ROLES))
        for row, (episode, one, two) in enumerate(zip(self.episodes, first, final, strict=True)):
            if one != one:
                continue
            second = None if episode.turn(Role.REVISE) is None or two != two else two > 0
            for turn, reward in enumerate(turn_rewards(one > 0, episode.verdict, second, self.options.alpha)):
                if reward is not None:
                    rewards_BK[row, turn], present_BK[row, turn] = reward, 1.0
        return rewards_BK, present_BK

    def _success(self, rewards_BK: torch.Tensor, final_B: torch.Tensor) -> torch.Tensor:
        success_BK = rewards_BK.clone()
        success_BK[:, REVISED] = final_B.cpu().nan_to_num(0.0)
        return success_BK

    def _whole(
        self,
        inputs: Sequence[dict[str, Any]],
        rewards_BK: torch.Tensor,
        present_BK: torch.Tensor,
        turn_ids_BT: torch.Tensor,
    ) -> Batch:
        """A batch in which an episode is one turn (algorithms.md 3.1, not recommended)."""
        if self._returns is None:
            returns = episode_returns(self._pool(), self.options.alpha, self._trainer.args.num_value_samples)
            values = optimal_values(rewards_tensor(list(returns.values())), self._trainer.args.beta1).tolist()
            self._returns = dict(zip(returns, values, strict=True))
        values_B = torch.tensor([self._returns.get(problem_of(row).prompt_id, torch.nan) for row in inputs])
        revised = [episode.turn(Role.REVISE) is not None for episode in self.episodes]
        is_whole_B = (present_BK[:, REVISED] > 0) | ~torch.tensor(revised)
        has_signal_B = (present_BK[:, 0] > 0) & is_whole_B & ~values_B.isnan()
        self._log({"rewards": rewards_BK, "labels": rewards_BK[:, :1].long().expand(-1, len(ROLES))}, present_BK)
        batch = {
            "rewards": (rewards_BK * present_BK).sum(1, keepdim=True),
            "values": values_B.float().nan_to_num(0.0)[:, None],
            "weights": has_signal_B.float()[:, None],
            "present": has_signal_B[:, None],
            "v_star": values_B,
        }
        whole_BT = (turn_ids_BT > 0).to(turn_ids_BT)
        return {**{name: tensor.to(whole_BT.device) for name, tensor in batch.items()}, "turn_ids": whole_BT}

    # --- values

    @property
    def values(self) -> StateValues:
        """Chances of success of states without reference samples; made of the pool at first use."""
        if self._values is None:
            trainer, with_network = self._trainer, self.options.value_source == "network"
            states = self._states(with_hidden=with_network)
            folder = Path(str(trainer.args.output_dir)) if trainer.accelerator.is_main_process else None
            self._values = StateValues.fit(states, with_network, trainer.args.seed, folder)
        return self._values

    def _pool(self) -> ReferencePool:
        return ReferencePool.open(self._trainer.pool_folder)

    def _states(self, with_hidden: bool) -> Any:
        trainer = self._trainer
        follow_ups = self.options.follow_ups(trainer._tokenizer) if self.options.is_pag else None
        return pool_states(
            self._pool(),
            lambda messages: trainer._tokenize_prompts(messages)[0],
            follow_ups,
            (lambda sequences, positions: reference_hidden(trainer, sequences, positions)) if with_hidden else None,
        )

    def _needs_hidden(self, inputs: Sequence[dict[str, Any]]) -> bool:
        roles = [VERIFIED, REVISED]
        if self._table(inputs).isnan().any():
            roles.append(0)
        return any(self.values.needs_hidden(role) for role in roles) or self.options.online_value

    def _attempt_chances(self, wanted_B: torch.Tensor, output: dict[str, Any]) -> torch.Tensor:
        """Chances of the prompts without reference samples; those of the others are of no use."""
        zeros_B = torch.zeros(len(wanted_B), dtype=torch.long)
        if not self.values.needs_hidden(0):
            return self.values.chances(None, zeros_B, zeros_B)
        rows = wanted_B.nonzero()[:, 0].tolist()
        prompts = [output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist() for row in rows]
        hidden = reference_hidden(self._trainer, prompts, [[len(prompt) - 1] for prompt in prompts])
        hidden_BD = torch.zeros(len(wanted_B), hidden[0].shape[1])
        for row, states in zip(rows, hidden, strict=True):
            hidden_BD[row] = states[0]
        return self.values.chances(hidden_BD, zeros_B, zeros_B)

    def _turn_values(
        self, inputs: Sequence[dict[str, Any]], labels_BK: torch.Tensor, hidden_BKD: torch.Tensor | None
    ) -> torch.Tensor:
        role_BK = ROLE_K.expand(len(labels_BK), -1)
        flat = None if hidden_BKD is None else hidden_BKD.flatten(0, 1)
        chances_S = self.values.chances(flat, role_BK.flatten(), labels_BK.flatten())
        values_S = values_of(
            chances_S, role_BK.flatten(), labels_BK.flatten(), self.options.alpha, self._trainer.args.beta1
        )
        values_BK, table_B = values_S.view(labels_BK.shape).clone(), self._table(inputs)
        values_BK[:, 0] = torch.where(table_B.isnan(), values_BK[:, 0], table_B)
        return values_BK

    def _hidden(self, output: dict[str, Any]) -> torch.Tensor:
        """The reference's hidden state at the last token before each turn, shape (B, K, D); 0 where there is no turn."""
        sequences, positions = [], []
        for row, episode in enumerate(self.episodes):
            prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
            sequences.append([*prompt, *episode.token_ids])
            ends, length = [], len(prompt)
            for turn in episode.turns:
                ends.append(length + len(turn.given) - 1)
                length += len(turn.given) + len(turn.completion.token_ids)
            positions.append(ends)
        hidden = reference_hidden(self._trainer, sequences, positions)
        hidden_BKD = torch.zeros(len(hidden), len(ROLES), hidden[0].shape[1])
        for row, states in enumerate(hidden):
            hidden_BKD[row, : len(states)] = states
        return hidden_BKD

    # --- after the update

    def observe(self, inputs: dict[str, Any], log_ratio_BK: torch.Tensor, micro_batch: int) -> None:
        """Remember the residuals of a part of a micro-batch, and what a value network learns from."""
        if "centres" not in inputs:
            return
        names = ("labels", "success", "hidden")
        seen = {name: inputs[name].detach().cpu() for name in names if name in inputs}
        # An update whose numbers are broken is left out; what it would leave behind here would stay.
        seen["present"] = (inputs["present"] & log_ratio_BK.isfinite()).cpu()
        before_BK = inputs["values"] - inputs["centres"]
        seen["residual"] = (inputs["rewards"] - self._trainer.args.beta2 * log_ratio_BK - before_BK).cpu()
        seen["log_ratio"] = log_ratio_BK.cpu()
        self._observed.setdefault(micro_batch, []).append(seen)

    def forget(self, micro_batch: int) -> None:
        """Forget a micro-batch that is done again in smaller parts."""
        self._observed.pop(micro_batch, None)

    def forget_all(self) -> None:
        """Forget an update that was broken off."""
        self._observed.clear()

    def end_update(self, step: int) -> None:
        """Let the lagged residuals and the value network take in the update."""
        parts = [part for pieces in self._observed.values() for part in pieces]
        self._observed.clear()
        if not self.options.is_pag or self.options.trajectory_value:
            return
        parts = gather_object(parts) if self._trainer.accelerator.num_processes > 1 else parts
        moments = sum(residual_moments(p["residual"], p["labels"], p["present"]) for p in parts)
        assert isinstance(moments, torch.Tensor)
        self.residuals.add(moments)
        metrics = self._trainer._metrics["train"]
        add_residuals(metrics, moments)
        if self.options.online_value:
            self._learn(parts, step, metrics)

    def _learn(self, parts: Sequence[Batch], step: int, metrics: dict[str, list[float]]) -> None:
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        present_BK = joined["present"]
        if not present_BK.any():
            return
        role_BK = ROLE_K.expand(len(present_BK), -1)
        mean, effective = self.values.update(
            joined["hidden"][present_BK],
            role_BK[present_BK],
            joined["labels"][present_BK],
            joined["success"][present_BK],
            joined["log_ratio"][present_BK],
            sample_seed("online value", self._trainer.args.seed, step),
        )
        metrics["value/mean_weight"].append(mean)
        metrics["value/effective_samples"].append(effective)

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what later updates depend on."""
        if self.options.is_pag:
            save_file({"moments": self.residuals.moments}, folder / MOMENTS)
        if self._values is not None:
            self._values.save(folder)

    def load(self, folder: Path) -> None:
        """Read it back."""
        if (folder / MOMENTS).is_file():
            self.residuals = LaggedResiduals(load_file(folder / MOMENTS)["moments"])
        if (folder / FILE).is_file():
            offline = self._states(with_hidden=True) if self.options.online_value else None
            self._values = StateValues.load(folder, offline)

    def _log(self, batch: Batch, present_BK: torch.Tensor) -> None:
        trainer = self._trainer
        mode = "train" if trainer.model.training else "eval"
        local = [t.float().to(trainer.accelerator.device) for t in (batch["rewards"], present_BK, batch["labels"])]
        gathered: Any = trainer.accelerator.gather(local)
        rewards_GK, present_GK, labels_GK = (tensor.cpu() for tensor in gathered)
        verdicts = [str(episode.verdict) for episode in self.episodes]
        if trainer.accelerator.num_processes > 1:
            verdicts = gather_object(verdicts)
        add_turns(trainer._metrics[mode], rewards_GK, present_GK, labels_GK, verdicts)


def _padded(rows: Sequence[Sequence[int]], like_BT: torch.Tensor) -> torch.Tensor:
    padded_BT = torch.zeros_like(like_BT)
    for row, ids in enumerate(rows):
        padded_BT[row, : len(ids)] = torch.tensor(ids, device=like_BT.device)
    return padded_BT
