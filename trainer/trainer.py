"""`AStarPOTrainer`: A*-PO on `transformers.Trainer`, with the arguments that TRL users know from `GRPOTrainer`.

An update reads from top to bottom in two methods. `make_batch` turns rows of the training set into what the loss reads: it
samples and grades an episode per row, scores the reference, and puts rewards, values and weights together.
`compute_loss` scores the policy and returns the loss. Around them, `get_batch_samples` hands `make_batch` all rows of an update
and divides the result into micro-batches, and `training_step` divides those further where memory is short.

Suffixes name the dimensions: B episodes of this process, T tokens after the prompt, K turns, N answers, F reward functions,
G rows of all processes, D hidden size.
"""

import copy
import itertools
import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed

from ..rollout.cards import license_of
from ..rollout.engines.interface import Engine, SamplingSettings
from ..rollout.engines.policy_link import link_policy
from ..rollout.engines.start import start_training_engine
from ..rollout.episode import (
    Episode,
    EpisodeKind,
    EpisodeSampler,
    FollowUps,
    TurnGrade,
    grade_turns,
    sample_seed,
)
from ..rollout.options import EngineOptions, ModelOptions
from ..rollout.pag import episode_kind
from ..rollout.pool import ReferencePool
from ..rollout.prompts import require_chat_template
from ..rollout.rewards import Answer, RewardFunc, RewardFunctions
from ..rollout.rounds import RoundFolder, adapter_round, agree, wait_for
from ..verifier import math_reward
from .callbacks import (
    DeadlineGuard,
    FinishCheckpoints,
    NumericGuard,
    ReferenceWatch,
    StopOnInterrupt,
    hang_watch,
    until,
)
from .card import CardFacts, Evaluated, model_card, recipe_of
from .checkpoint import data_identity, last_complete, mark_complete, refuse_changes, rotate, run_fingerprint
from .completions import record_completions
from .config import (
    ROUND_PLACES,
    AStarPOConfig,
    RoundOptions,
    TurnOptions,
    ValueOptions,
    check_turns,
    completion_length,
)
from .critic import NETWORK as CRITIC
from .critic import Critic
from .dataset import (
    REWARDS,
    VALUE,
    PromptOrder,
    are_successes,
    kept_rows,
    longest_prompt,
    pool_fingerprints,
    problem_of,
    problem_set,
    prompt_ids,
    prompt_seeds,
    success_counts,
    training_set,
    with_eval_values,
    with_values,
)
from .logprobs import CALL_COST, Scorer, can_share, reference_of, use_scoring_head
from .loss import astarpo_loss, mismatch_weights, turn_log_ratios
from .metrics import (
    Metrics,
    PassTotals,
    add_batch,
    add_peak_memory,
    add_residuals,
    add_sampling,
    add_totals,
    add_tracking,
    add_training_time,
    finish_metrics,
    gather_objects,
    over_reference_of,
    sum_over_processes,
)
from .policy import load_policy, load_reference, load_tokenizer_of, model_revision, options_of
from .pool_rules import refuse_other_rules, training_rules
from .probe import PolicyProbe
from .residuals import LaggedResiduals, balanced, label_counts, residual_moments
from .round_job import RoundJob, folder_of_rounds, sample_round
from .rounds import (
    STORED,
    EndOfRound,
    Progress,
    Round,
    effective_share,
    lagged_policy,
    load_round,
    save_adapter,
    stored_rewards,
    with_rounds,
    without_stored,
)
from .sizes import engine_of_training, plan_training
from .stage1 import POOL, sample_reference
from .states import States, all_states, first_states, later_states
from .targets import GradedEpisodes, collate, present_turns, split_rows, successes, targets
from .value_network import ValueNetwork
from .values import FILE, NETWORK, StateValues, hidden_states, prompt_key, turn_values

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LORA_RATE, ALL_WEIGHTS_RATE = 1e-5, 1e-6
"""Default learning rates: an adapter that starts from zero takes about ten times the paper's."""
MOMENTS, PROBE, PROGRESS = "residuals.safetensors", "probe.safetensors", "unlogged.json"


class AStarPOTrainer(Trainer):
    r"""
    Trainer for A*-PO: policy optimisation by regression on the optimal advantage.

    One completion y per prompt x is sampled from the policy, and β2·ln π(y|x)/π_ref(y|x) is regressed on r − V*(x).
    The algorithm is that of [Accelerating RL for LLM Reasoning with Optimal Advantage
    Regression](https://huggingface.co/papers/2505.20686); docs/algorithm.md derives it.

    Example:

    ```python
    from astarpo import AStarPOConfig, AStarPOTrainer, ReferencePool
    from astarpo.verifier import math_reward
    from peft import LoraConfig

    trainer = AStarPOTrainer(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        reward_funcs=math_reward,
        args=AStarPOConfig(output_dir="runs/math"),
        train_dataset=ReferencePool.open("runs/pool").to_dataset(),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The reference, from which the policy starts.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            As in [`~trl.GRPOTrainer`]; [`~astarpo.verifier.math_reward`] when not given.
        args ([`AStarPOConfig`], *optional*):
            Configuration of this trainer.
        train_dataset ([`~datasets.Dataset`], *optional*):
            `prompt`, the reward functions' columns (`solution`), and `reference_rewards` from stage 1; without those, the
            rewards that the pool named in `args.pool` has for its problems; without a pool, stage 1 is done at the start of
            `train`, into `output_dir/reference_pool`. When not given, the pool's own problems.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            The same; without `reference_rewards` only rewards are reported.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer; the model's own when not given.
        reward_processing_classes (*optional*):
            As in [`~trl.GRPOTrainer`].
        callbacks (`list[TrainerCallback]`, *optional*):
            As in [`~transformers.Trainer`].
        optimizers (`tuple`, *optional*):
            As in [`~transformers.Trainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            As in [`~trl.GRPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            LoRA configuration; the reference is then the model with the adapter off. Without it all weights are trained.
        engine ([`~astarpo.rollout.VLLMEngine`] or `ServerEngine`, *optional*):
            An engine to sample with, already holding the reference; started here when not given.
        engine_options ([`~astarpo.rollout.EngineOptions`], *optional*):
            Which engine is started here, and its sizes.
        episode (`EpisodeKind` or `str`, *optional*):
            What the model is asked to do: `"single"` (a completion), `"pag"`, `"module:KIND"`, or a kind itself.
        episode_options ([`TurnOptions`], *optional*):
            Weights of the turns, and the prompts of PAG episodes.
        value_options ([`ValueOptions`], *optional*):
            Where V comes from.
        round_options ([`RoundOptions`], *optional*):
            Training in rounds, on completions that were sampled beforehand.

    Raises:
        ValueError: If the arguments contradict each other or do not fit the GPU; the message names the fix.
    """

    args: AStarPOConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: AStarPOConfig | None = None,
        train_dataset: "Dataset | None" = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        engine: Engine | None = None,
        engine_options: EngineOptions | None = None,
        episode: EpisodeKind | str | None = None,
        episode_options: TurnOptions | None = None,
        value_options: ValueOptions | None = None,
        round_options: RoundOptions | None = None,
    ):
        for name, given in (
            ("tools", tools),
            ("rollout_func", rollout_func),
            ("environment_factory", environment_factory),
        ):
            if given is not None:
                raise ValueError(
                    f"`{name}` is not supported: what the model is asked to do is an EpisodeKind (`episode=`)."
                )
        self.turn_options, self.value_options = episode_options or TurnOptions(), value_options or ValueOptions()
        if isinstance(episode, str):
            self.turn_options = replace(self.turn_options, episode=episode)
        if isinstance(episode, EpisodeKind):
            self.kind = episode
        else:
            self.kind = episode_kind(self.turn_options, self.turn_options.alpha)
        check_turns(self.turn_options, self.kind)
        engine_options = engine_options or EngineOptions()
        args = _checked_args(model, args)
        self.round_options = round_options or RoundOptions()
        self.in_rounds = self.round_options.rounds is not None
        if self.in_rounds:
            args = with_rounds(args, self.round_options, self.value_options, peft_config)
        if engine is None:
            engine_options = engine_of_training(args, engine_options, model, quantization_config)

        # Sizes are chosen, and a run that does not fit is refused, before anything is loaded.
        sizes = plan_training(
            *(model, args, engine_options, peft_config, quantization_config, engine, self.kind, processing_class),
            closes_engine=self.in_rounds and self.round_options.close_engine != "off",
        )
        args, self.engine_options = copy.copy(args), sizes.engine_options
        if args.learning_rate is None:
            args.learning_rate = ALL_WEIGHTS_RATE if peft_config is None else LORA_RATE
        args.gradient_checkpointing = sizes.gradient_checkpointing
        # Transformers would delete older checkpoints before this one can be relied on; `rotate` does it after.
        self._save_total_limit, args.save_total_limit = args.save_total_limit, None

        set_seed(args.seed)  # PEFT draws the adapter's first weights
        policy = load_policy(model, args, peft_config, quantization_config)
        tokenizer = load_tokenizer_of(policy, args, processing_class)
        reference = load_reference(policy, args)
        for scored in (policy, reference):
            if scored is not None:
                base = scored.get_base_model() if isinstance(scored, PeftModel) else scored
                use_scoring_head(base, args.temperature, args.cast_lm_head_to_fp32)
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs or math_reward]
        made = pool_fingerprints(train_dataset, args)
        if made:
            name, weights = str(policy.config._name_or_path), args.reward_weights or [1.0] * len(functions)
            rules = training_rules(name, model_revision(args), tokenizer, self.kind, functions, weights, args)
            for where, fingerprint in made.items():
                refuse_other_rules(fingerprint, rules, where, args.accept_undeclared)
        if hasattr(policy, "warnings_issued"):
            policy.warnings_issued["estimate_tokens"] = True  # Trainer would look for `input_ids` in every batch

        # With the rows that are not trained on: the prior is that of all prompts that were sampled.
        if self.in_rounds:
            self.reference_set = kept = problem_set(train_dataset, args)  # V comes from the rounds
        else:
            self.reference_set = training_set(train_dataset, args, self.value_options)
            kept = kept_rows(self.reference_set, args, self.value_options)
        super().__init__(
            model=policy,
            args=args,
            data_collator=list,  # pyright: ignore[reportArgumentType] -- rows reach `get_batch_samples` as they are
            train_dataset=kept,
            eval_dataset=with_eval_values(eval_dataset, args, self.value_options),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.n_gpu > 1:
            raise ValueError(
                "Several GPUs are visible to one process, and transformers would copy the model to each of them. Start the "
                "script with `accelerate launch`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
            )
        # The loss is divided by the number of episodes of the whole update here, so transformers must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.tokenizer: Any = tokenizer
        self.chat_template_kwargs = options_of(args.chat_template_kwargs)
        self.max_completion_length = completion_length(args)
        self._check_datasets(train_dataset)

        if reference is not None:
            reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.reference = reference
        self.reward_functions = RewardFunctions(
            functions,
            reward_processing_classes,
            args.reward_weights,
            options_of(args.model_init_kwargs),
            self.chat_template_kwargs,
            self.accelerator.device,
        )
        on_cpu = self.accelerator.device.type == "cpu"
        # With FSDP and DeepSpeed every pass communicates, so all processes must make the same ones.
        self.passes_alike = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.scorer = Scorer(
            CALL_COST["cpu" if on_cpu else "cuda"],
            self.passes_alike,
            can_share(policy.config),
            self.accelerator.autocast,
        )
        self.rows_at_once = sizes.rows_at_once or args.per_device_train_batch_size
        self._metrics: dict[str, Metrics] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._loss_sum = 0.0
        self._data: tuple[Any, str] | None = None

        self.reference_watch = ReferenceWatch(self.accelerator.is_main_process)
        self.interrupt = StopOnInterrupt()
        self.add_callback(self.interrupt)
        self.add_callback(NumericGuard(self.accelerator, self._metrics["train"]))
        self.add_callback(FinishCheckpoints(self._finish_checkpoint))
        self._deadline = None if args.save_by is None else DeadlineGuard(args.save_by)
        if self._deadline is not None:
            self.add_callback(self._deadline)

        self.follow_ups = FollowUps.render(self.tokenizer, self.kind)
        self._owns_engine, self._engine, self._sampler = engine is None, engine, None
        self.round_progress, self._round = Progress(), None
        if self.in_rounds:
            self._check_rounds()
            self.add_callback(
                EndOfRound(
                    lambda updates: self._round is None or self._is_round_over(updates),
                    lambda: self.round_progress.is_over,
                )
            )
        else:
            self.open_engine()
        self.residuals = LaggedResiduals(self.kind)
        self._state_values: StateValues | None = None
        self._critic: Critic | None = None
        self.reads_chances = len(self.kind.roles) > 1 or self.value_options.reads_chances
        # The probe computes with weights that no process has whole where they are sharded; and an engine that computes with
        # the trainer's own model cannot be behind it.
        has_probe = self.args.probe_rows > 0 and not self.is_sharded and self.engine_options.engine != "transformers"
        has_probe = has_probe and not self.in_rounds  # no update trains on what the engine has just sampled
        self.probe = PolicyProbe(self.model, self.args.probe_rows) if has_probe else None

    # --- one update, from top to bottom

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Make an update's micro-batches out of its rows.

        Transformers asks for the batches of a whole update here. They are sampled, scored and graded together, so that they all
        come from the same policy, and divided afterwards.

        Returns:
            `tuple`: The micro-batches, and the number of episodes with a signal over all processes.
        """
        began = time.perf_counter()
        rows = [row for batch in itertools.islice(epoch_iterator, num_batches) for row in batch]
        if self.in_rounds:
            rows = self._rows_of_round(len(rows))
        if not rows:
            return [], None
        self.model.train()
        batch = self.make_batch(rows, "train")
        num_episodes = sum_over_processes(batch["present"].any(1).sum()).clamp(min=1)
        batch["update_tokens"] = sum_over_processes((batch["turn_ids"] > 0).sum()).expand(len(rows))
        update = PassTotals(began)
        micro_batches = list(split_rows(batch, len(rows) // num_batches))
        return [{**micro_batch, "update": update} for micro_batch in micro_batches], num_episodes

    def make_batch(self, rows: list[dict[str, Any]], mode: str) -> dict[str, Any]:
        """Turn rows of a data set into what the loss reads.

        Args:
            rows (`list[dict[str, Any]]`):
                Rows of this process, with `prompt` and the reward functions' columns.
            mode (`str`):
                `train` or `eval`: where metrics go, and a part of the seeds.

        Returns:
            `dict[str, Any]`: `prompt_ids`, `prompt_mask` (padded left), `completion_ids`, `completion_mask`, `turn_ids`,
            `ref_logps`, `sampling_logps` of shape (B, T), and `rewards`, `values`, `weights`, `present`, `labels`, `success`,
            `centres` of shape (B, K).
        """
        kind, metrics = self.kind, self._metrics[mode]

        # An episode per row with its grades: a stored one of an earlier policy, or a new one of the present policy.
        prompts = self.tokenize([row["prompt"] for row in rows])
        is_stored = STORED in rows[0]
        found = self._stored_episodes(rows, prompts) if is_stored else self._new_episodes(rows, prompts, mode)
        rows, episodes, rewards, grades = found.rows, found.episodes, found.rewards, found.grades
        batch: dict[str, Any] = collate(episodes, self.tokenizer.pad_token_id, self.accelerator.device)

        # Score them under the reference, or under the policy that sampled them.
        if is_stored and self.round_options.lagged_logprobs == "stored":
            batch["ref_logps"] = batch["sampling_logps"]
        else:
            with torch.no_grad(), self._reference(is_stored) as reference:
                batch["ref_logps"] = self._score(reference, batch, metrics)

        # Put together what the loss reads: rewards, values and weights of the turns.
        success_BK, label_BK = successes(grades)
        values_BK, learnt_from = self._values(rows, episodes, label_BK)
        centres_BK = (
            self.residuals.centre(label_BK) if self.turn_options.centre_residuals else torch.zeros_like(values_BK)
        )
        weights_BK = self._turn_weights(label_BK, present_turns(success_BK, values_BK))
        target = targets(kind, success_BK, label_BK, values_BK, centres_BK, weights_BK)
        # The rewards that a stored row brings are those of its own policy.
        over_reference = None if self.in_rounds else over_reference_of(rows, target)
        batch |= {
            name: getattr(target, name).to(self.accelerator.device)
            for name in ("rewards", "values", "weights", "present", "labels", "success", "centres")
        }
        batch |= learnt_from

        # Log what was sampled and what it earned.
        columns = add_batch(metrics, kind, rows, episodes, grades, rewards, self.reward_functions.names, target)
        if over_reference is not None:
            metrics["reward/over_reference"].append(over_reference)
        if mode == "train":
            self.state.num_input_tokens_seen += int(metrics["num_tokens"][-1])
            if self.args.should_save:
                step, names = self.state.global_step + 1, self.reward_functions.names
                record_completions(self.args, step, columns, names, self.callback_handler.callbacks)
            if is_stored:
                assert self._round is not None
                is_known = (
                    self._round.pool.manifest.has_logprobs and self.round_options.lagged_logprobs == "recomputed"
                )
                batch["has_mismatch"] = torch.full((len(rows),), is_known)
                metrics["rounds/number"].append(float(self.round_progress.number))
                metrics["rounds/age"].append(float(self.state.global_step - self.round_progress.began))
            else:
                add_sampling(
                    metrics, episodes, found.seconds, self.sampler.policy.seconds if self.sampler.policy else 0.0
                )
        metrics["num_tokens"] = [float(self.state.num_input_tokens_seen)]
        return batch

    def _new_episodes(self, rows: list[dict[str, Any]], prompts: list[list[int]], mode: str) -> GradedEpisodes:
        """Sample an episode per row from the present policy, and grade every answer once.

        A seed follows from the run, the update and the prompt, so it depends neither on a prompt's place in the batch nor on the process
        that samples it.
        """
        kind, began = self.kind, time.perf_counter()
        seeds = prompt_seeds(prompts, mode, self.args.seed, self.state.global_step)
        with hang_watch(self.args.engine_timeout_s) as still_alive:
            episodes = self.sampler.sample(
                prompts,
                (lambda n, role: seeds[n]) if len(kind.roles) == 1 else (lambda n, role: sample_seed(seeds[n], role)),
                still_alive,
            )
        seconds = time.perf_counter() - began
        answers = [
            Answer(row, turn.text, list(turn.completion.token_ids), turn.is_truncated)
            for row, episode in zip(rows, episodes, strict=True)
            for turn in episode.turns
            if turn.role in kind.answers
        ]
        rewards = self.reward_functions(answers, self.args.require_eos, self.state)
        return GradedEpisodes(rows, episodes, rewards, self._grade(episodes, rewards.weighted_N.tolist()), seconds)

    def _stored_episodes(self, rows: list[dict[str, Any]], prompts: list[list[int]]) -> GradedEpisodes:
        """The episodes that rows of a round bring with them, with the grades that they earned when they were sampled."""
        self._end_engine()
        rows, stored = without_stored(rows)
        episodes = [replace(one.episode, prompt=tuple(ids)) for one, ids in zip(stored, prompts, strict=True)]
        rewards = stored_rewards(stored, self.kind, len(self.reward_functions.names))
        return GradedEpisodes(rows, episodes, rewards, [one.grades for one in stored], 0.0)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The A*-PO loss of a batch from [`AStarPOTrainer.make_batch`].

        Args:
            model (`torch.nn.Module`):
                The policy as wrapped by accelerate.
            inputs (`dict[str, Any]`):
                The batch; its `seen` ([`PassTotals`]), where there is one, gets what is logged.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the log-ratios too.
            num_items_in_batch (`torch.Tensor`, *optional*):
                Episodes with a signal in the whole update, over all processes; those of the batch when not given.
        """
        logps_BT, entropies_BT = self.scorer(model, inputs, len(inputs["completion_ids"]), compute_entropy=True)
        assert entropies_BT is not None
        log_ratio_BK = turn_log_ratios(logps_BT, inputs["ref_logps"], inputs["turn_ids"], inputs["values"].shape[1])
        losses_BK = astarpo_loss(log_ratio_BK, inputs["values"], inputs["rewards"], inputs["weights"], self.args.beta2)
        if self.args.mismatch_correction == "sequence_mis":
            log_mismatch_BK = turn_log_ratios(
                logps_BT, inputs["sampling_logps"], inputs["turn_ids"], losses_BK.shape[1]
            )
            losses_BK = losses_BK * mismatch_weights(log_mismatch_BK)
        if "seen" in inputs:
            inputs["seen"].add(
                log_ratio_BK.detach(), logps_BT.detach(), entropies_BT.detach(), inputs, self.args.beta2
            )
        if num_items_in_batch is None:
            loss = losses_BK.sum() / (inputs["weights"] > 0).any(1).sum().clamp(min=1)
        else:
            # The mean over the episodes of the whole update; DDP then averages the gradients of the processes.
            loss = losses_BK.sum() * self.accelerator.num_processes / num_items_in_batch
            if self.args.entropy_coef:
                # The mean over the tokens of the whole update, as the authors' code has it.
                entropy = torch.where(inputs["turn_ids"] > 0, entropies_BT, 0.0) / inputs["update_tokens"][:, None]
                loss = loss - self.args.entropy_coef * entropy.sum() * self.accelerator.num_processes
        return (loss, {"log_ratio": log_ratio_BK}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Evaluate the policy on rows of an evaluation set: one episode per row, and the loss where V* is known."""
        batch = self.make_batch(inputs, "eval")
        seen, losses, counts = PassTotals(time.perf_counter()), [], []
        for piece in split_rows(batch, self.rows_at_once if self.accelerator.num_processes == 1 else None):
            with torch.no_grad(), self.compute_loss_context_manager():
                losses.append(self.compute_loss(model, {**piece, "seen": seen}))
            counts.append((piece["weights"] > 0).any(1).sum())
        count = torch.stack(counts)
        loss = (torch.stack(losses) * count).sum() / count.sum().clamp(min=1)
        add_totals(self._metrics["eval"], sum_over_processes(seen.totals.to(loss.device)).tolist())
        return loss.detach(), None, None

    # --- the engine, which in rounds is there only while it samples

    def open_engine(self) -> EpisodeSampler:
        """The sampler of the present policy; its engine is started where there is none."""
        if self._sampler is not None:
            return self._sampler
        if self._engine is None:
            self._engine, link = start_training_engine(
                self.model,
                str(self.model.config._name_or_path),
                model_revision(self.args),
                self.engine_options,
                self.engine_options.max_model_len or self.longest_prompt() + self.longest_episode(),
                self.tokenizer,
                is_sharded=self.is_sharded,
                is_wrapped=self.passes_alike,
                device=self.accelerator.device,
            )
        else:
            link = link_policy(self._engine, self.model, self.engine_options.adapter_dir)
        settings = SamplingSettings(self.max_completion_length, self.args.temperature)
        self._sampler = EpisodeSampler(self._engine, self.tokenizer, self.kind, settings, link)
        return self._sampler

    def _end_engine(self) -> None:
        """Give the engine's memory to the trainer where that was asked for; an engine of the caller's stays."""
        closing = self.round_options.close_engine
        is_asked = closing == "on" or (closing == "auto" and self.accelerator.device.type == "cuda")
        if is_asked and self._owns_engine and self._engine is not None:
            self.close()

    @property
    def engine(self) -> Engine:
        """The engine, started where there is none."""
        self.open_engine()
        assert self._engine is not None
        return self._engine

    @property
    def sampler(self) -> EpisodeSampler:
        """Samples the present policy."""
        return self.open_engine()

    # --- rounds: where the rows of an update come from when their completions were sampled beforehand

    def _check_rounds(self) -> None:
        if self.is_sharded:
            raise ValueError(
                "Rounds exchange the adapter's weights in place, which FSDP and DeepSpeed ZeRO-3 divide. Use DDP."
            )
        if self.args.deepspeed_plugin is not None:
            # accelerate's DeepSpeedEngineWrapper.backward (accelerate/utils/deepspeed.py) takes the optimizer's step itself.
            raise ValueError(
                "Rounds judge an update before it is made, and DeepSpeed makes it within the backward pass. Use DDP."
            )
        if self.accelerator.num_processes > 1 and self.round_options.part == "both":
            raise ValueError(
                "Several processes can train on rounds, but not sample them: run the same command with --part sampler (with --engine ray "
                "for many GPUs) beside this one, and set --part trainer here."
            )
        if self.round_options.part == "sampler":
            raise ValueError("A trainer cannot be the sampler: `astarpo train --part sampler` samples without one.")

    @property
    def update_rows(self) -> int:
        """Rows of an update, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    @property
    def round_folder(self) -> RoundFolder:
        """Where the rounds are kept."""
        return folder_of_rounds(self.args, self.round_options)

    def _rows_of_round(self, count: int) -> list[dict[str, Any]]:
        """This process's rows of the next update: `count` of the present round, or none where the last round is over."""
        if count == 0:
            return []
        options, progress = self.round_options, self.round_progress
        assert options.rounds is not None
        if self._round is None and progress.number >= 0:  # resumed
            self._round = self._load_round(progress.number)
        while self._round is None or self._is_round_over(self.state.global_step):
            if progress.number + 1 >= options.rounds:
                self.control.should_training_stop = True
                return []
            progress.number, progress.began, progress.is_over = progress.number + 1, self.state.global_step, False
            self._prepare_round(progress.number)
            self._round = self._load_round(progress.number)
            self._state_values = None  # V is that of the policy that sampled this round
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        update = self.state.global_step - progress.began
        rows = self._round.rows_of_update(update, count * processes, self.args.seed)
        return rows[rank * count : (rank + 1) * count]

    def _is_round_over(self, updates: int) -> bool:
        """Whether the present round is over after so many updates of the run."""
        assert self._round is not None
        return self.round_progress.is_over or updates - self.round_progress.began >= self._round.updates

    def _prepare_round(self, number: int) -> None:
        """Keep the policy with which a round begins, and have the round sampled, here or by the other part."""
        folder, options = self.round_folder, self.round_options
        deadline = None if self._deadline is None else self._deadline.deadline.isoformat()
        if number > 0:
            save_adapter(self.model, folder.adapter(number))
        job = self._round_job()
        agree(folder, job.shared)
        if not folder.is_sampled(number) and options.part == "both":
            with self.interrupt.at_once(), until(deadline):
                self._sample_round(folder, number, job)
        elif options.part == "trainer":
            with self.interrupt.at_once(), until(deadline):
                wait_for(lambda: folder.is_sampled(number), f"the samples of round {number} in {folder.pool(number)}")

    def _sample_round(self, folder: RoundFolder, number: int, job: RoundJob) -> None:
        by, sampler = adapter_round(number, self.round_options.bound), self.open_engine()
        if by == 0:
            sampler = EpisodeSampler(sampler.engine, self.tokenizer, self.kind, sampler.settings)
        with lagged_policy(self.model, folder.adapter(by)) if by > 0 else nullcontext():
            sample_round(folder, number, job, sampler, self.state)

    def _round_job(self) -> RoundJob:
        return RoundJob(
            self.train_dataset.to_list(),
            self.round_options.prompts_per_round(self.update_rows),
            self.round_options,
            self.args,
            ModelOptions(
                str(self.model.config._name_or_path),
                model_revision(self.args),
                dtype=str(self.model.config.dtype).split(".")[-1],
            ),
            self.engine_options,
            self.tokenizer,
            self.tokenize,
            self.kind,
            self.reward_functions,
            self.chat_template_kwargs,
        )

    def _refuse_round(self, pool: ReferencePool) -> None:
        """Refuse a pool that was sampled or graded under other rules than the run's."""
        functions, weights = self.reward_functions.functions, self.reward_functions.weights_F.tolist()
        name = str(self.model.config._name_or_path)
        rules = training_rules(
            name, model_revision(self.args), self.tokenizer, self.kind, functions, weights, self.args
        )
        made = {**pool.manifest.fingerprint, "adapter": None}  # which policy sampled it `open_pool` has checked
        refuse_other_rules(made, rules, f"The pool in `{pool.folder}`", self.args.accept_undeclared)
        if self.round_options.lagged_logprobs == "stored" and not pool.manifest.has_logprobs:
            raise ValueError(
                f"The pool in `{pool.folder}` keeps no log-probs. Set --lagged_logprobs recomputed, or sample it with --logprobs true."
            )

    @contextmanager
    def _reference(self, is_stored: bool) -> Iterator[Any]:
        """The model that gives the reference's log-probs inside; for stored episodes those of the policy that sampled them."""
        adapter = self._round.adapter if is_stored and self._round is not None else None
        if adapter is None:
            with reference_of(self.model_wrapped, self.reference) as reference:
                yield reference
        else:
            with lagged_policy(self.model, adapter):
                yield self.model_wrapped

    def _load_round(self, number: int) -> Round:
        options, args, folder = self.round_options, self.args, self.round_folder
        pool = folder.open_pool(number, options.bound)
        by = adapter_round(number, options.bound)
        self._refuse_round(pool)
        found = load_round(
            number,
            pool,
            folder.adapter(by) if by > 0 else None,
            {problem_of(row).prompt_id: row for row in self.train_dataset.to_list()[::-1]},
            self.kind,
            self.follow_ups,
            self.value_options.temperature(args.beta1),
            self.value_options.solved_between,
            options.updates_per_round,
            self.update_rows,
            options.num_iterations,
        )
        if not found.rows:
            message = (
                f"Round {number}: none of its {len(found.prompts)} prompts has completions that earned different rewards, so there is "
                "nothing to learn from them."
            )
            if number == 0:
                raise ValueError(
                    f"{message} Use easier or harder problems, more --num_samples, or check the gold answers."
                )
            logger.warning("%s", message)
        self.reference_set = type(self.train_dataset).from_list(found.prompts)
        return found

    # --- the steps of make_batch that need the trainer's models and options

    def tokenize(self, prompts: list[Any]) -> list[list[int]]:
        """Token ids of prompts, generation prompt included."""
        return prompt_ids(prompts, self.tokenizer, self.chat_template_kwargs)

    @torch.no_grad()
    def _score(self, model: Any, batch: dict[str, Any], metrics: Metrics) -> torch.Tensor:
        """Log-probs of a batch without gradients, shape (B, T); in smaller passes where memory runs out."""
        while True:
            try:
                return self.scorer(model, batch, self.rows_at_once)[0]
            except torch.OutOfMemoryError:
                if self.rows_at_once == 1 or self.passes_alike:
                    raise  # the other processes would wait for passes that this one does not make
            self.rows_at_once //= 2
            metrics["oom_splits"].append(1.0)
            torch.cuda.empty_cache()

    def _grade(self, episodes: Sequence[Episode], rewards: Sequence[float]) -> list[tuple[TurnGrade, ...]]:
        """One grade a role for each episode; `rewards` are those of all answers, in the order of the episodes."""
        left = iter(rewards)
        grades = []
        for episode in episodes:
            answers = [next(left) for turn in episode.turns if turn.role in self.kind.answers]
            graded = [
                TurnGrade("rewarded", reward) if reward == reward else TurnGrade("no_signal", None)
                for reward in answers
            ]
            grades.append(grade_turns(self.kind, episode, graded))
        return grades

    def _values(
        self, rows: Sequence[dict[str, Any]], episodes: Sequence[Episode], label_BK: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """V of the state in which each turn begins, shape (B, K), and what tracker or critic learn from once it was used.

        V of a prompt is that of its own samples, unless prior or tracking have a say; later turns have no samples of their own.
        """
        role_BK = torch.arange(label_BK.shape[1]).expand(label_BK.shape)
        if self.value_options.value == "critic":
            hidden_BKD = self._hidden_states(episodes)
            if self._critic is None:
                self._critic = Critic(hidden_BKD.shape[2], label_BK.shape[1], self.args.seed)
            values_S = self._critic.values(hidden_BKD.flatten(0, 1), role_BK.flatten(), label_BK.flatten())
            return values_S.view(label_BK.shape), {"hidden": hidden_BKD}
        if not self.reads_chances:
            return torch.tensor([[row.get(VALUE, torch.nan)] for row in rows], dtype=torch.float32), {}
        # The evaluation before round 0: nothing has been sampled that V could come from.
        if self.in_rounds and self._round is None and self._state_values is None:
            return torch.full(label_BK.shape, torch.nan), {}
        values, prompts = self.state_values, [prompt_key(problem_of(row).prompt_id) for row in rows]
        prior_BK = self._prior(values, prompts, episodes, role_BK, label_BK)
        successes, trials = success_counts(rows, self.args.num_value_samples)
        chance_BK, shifted_BK = values.chances(
            prior_BK, torch.tensor(successes), torch.tensor(trials), label_BK, prompts
        )
        values_BK = turn_values(self.kind, chance_BK, label_BK, self.value_options.temperature(self.args.beta1))
        if values.tracker is None:
            return values_BK, {}
        return values_BK, {"prompt": torch.tensor(prompts), "shifted": shifted_BK, "chance": chance_BK}

    def _prior(
        self,
        values: StateValues,
        prompts: list[int],
        episodes: Sequence[Episode],
        role_BK: torch.Tensor,
        label_BK: torch.Tensor,
    ) -> torch.Tensor:
        """The prior's chances, shape (B, K); the reference is asked for hidden states only where the network needs them."""
        hidden_SD = None
        if values.needs_hidden(range(1, len(self.kind.roles))):
            hidden_SD = self._hidden_states(episodes).flatten(0, 1)
        prior_BK = values.prior(hidden_SD, role_BK.flatten(), label_BK.flatten()).view(label_BK.shape).clone()
        new = values.unknown(prompts)
        if new:
            contexts = [list(episodes[row].prompt) for row in new]
            hidden = self._reference_hidden(contexts, [[len(context) - 1] for context in contexts])
            nothing_S = torch.zeros(len(new), dtype=torch.long)
            chances = values.prior(torch.cat(hidden), nothing_S, nothing_S).tolist()
            values.first |= {prompts[row]: chance for row, chance in zip(new, chances, strict=True)}
        if values.needs_hidden([0]):
            prior_BK[:, 0] = torch.tensor([values.first[prompt] for prompt in prompts])
        return prior_BK

    def _turn_weights(self, label_BK: torch.Tensor, present_BK: torch.Tensor) -> torch.Tensor:
        """λ_k w_k, shape (B, K): the turns' weights, by the spread of their residuals and the share of their labels."""
        weights_K = torch.tensor(self.turn_options.turn_weights or [1.0] * label_BK.shape[1])
        if self.turn_options.role_weighting:
            weights_K = weights_K * self.residuals.weights(self.turn_options.centre_residuals)
        weights_BK = weights_K.expand(label_BK.shape)
        if not self.turn_options.balance_labels:
            return weights_BK
        counts_KZ = sum_over_processes(label_counts(label_BK, present_BK).to(self.accelerator.device)).cpu()
        return weights_BK * balanced(self.kind, label_BK, counts_KZ)

    def _hidden_states(self, episodes: Sequence[Episode]) -> torch.Tensor:
        """The reference's hidden state at the last token before each turn, shape (B, K, D); 0 where there is no turn."""
        sequences: list[list[int]] = []
        positions: list[list[int]] = []
        for episode in episodes:
            sequence, ends = list(episode.prompt), []
            for turn in episode.turns:
                sequence += turn.given
                ends.append(len(sequence) - 1)
                sequence += turn.completion.token_ids
            sequences.append(sequence[: ends[-1] + 1])
            positions.append(ends)
        hidden = self._reference_hidden(sequences, positions)
        hidden_BKD = torch.zeros(len(hidden), len(self.kind.roles), hidden[0].shape[1])
        for row, (episode, states) in enumerate(zip(episodes, hidden, strict=True)):
            hidden_BKD[row, [turn.number - 1 for turn in episode.turns]] = states
        return hidden_BKD

    def _reference_hidden(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        with reference_of(self.model_wrapped, self.reference) as reference:
            model: Any = self.accelerator.unwrap_model(reference)
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            return hidden_states(base, sequences, positions, self.rows_at_once, self.accelerator.autocast)

    @property
    def state_values(self) -> StateValues:
        """What V is made of; fitted to the reference's samples at first use."""
        if self._state_values is None:
            network: ValueNetwork | bool = self.value_options.value_prior == "network"
            if self.value_options.value_network is not None:
                network = self._kept_network(Path(self.value_options.value_network))
            self._state_values = StateValues.fit(
                self._reference_states(network is not False),
                self.value_options.kappa,
                network,
                self.value_options.value_tracking,
                self.args.seed,
                Path(str(self.args.output_dir)) if self.accelerator.is_main_process else None,
            )
        return self._state_values

    def _kept_network(self, folder: Path) -> ValueNetwork:
        """The value network that an earlier run saved beside its adapter."""
        if not (folder / NETWORK).is_file():
            raise ValueError(
                f"There is no {NETWORK} in `{folder}`: name the output_dir of a run with value_prior=network."
            )
        network = ValueNetwork.load(folder / NETWORK)
        found = len(network.mean_D), len(network.constants)
        wanted = self.model.config.get_text_config().hidden_size, len(self.kind.roles)
        if found != wanted:
            raise ValueError(
                f"The value network in `{folder}` is for {found[0]} hidden features and {found[1]} roles, this run has {wanted[0]} "
                f"and {wanted[1]}: it belongs to another model or kind of episode."
            )
        return network

    def _reference_states(self, with_hidden: bool) -> States:
        """The states of the reference's samples: prompts from the training set, later turns from the pool of episodes."""
        hidden = self._reference_hidden if with_hidden else None
        rows = self.reference_set.to_list()
        if not are_successes([row[REWARDS] for row in rows]):
            raise ValueError(
                "Turns are valued by chances of success, so rewards must be 0 or 1; those of the reference are not. Use a reward that "
                "says right or wrong."
            )
        contexts = self.tokenize([row["prompt"] for row in rows]) if with_hidden else None
        rewards = [row[REWARDS][: self.args.num_value_samples] for row in rows]
        first = first_states([problem_of(row).prompt_id for row in rows], rewards, contexts, self.kind, hidden)
        if len(self.kind.roles) == 1:
            return first
        pool = ReferencePool.open(self.pool_folder) if self._round is None else self._round.pool
        return all_states(first, later_states(pool, self.kind, self.follow_ups, self.tokenize, hidden))

    # --- micro-batches, and what happens when memory runs out

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a micro-batch, in passes of at most `rows_at_once` rows.

        Where memory runs out the passes are halved, and they add up to the same gradient: gradients of earlier micro-batches
        are set aside meanwhile, so that a backward pass that fails cannot spoil them.
        """
        began, metrics = time.perf_counter(), self._metrics["train"]
        update: PassTotals = inputs["update"]
        batch = {name: value for name, value in inputs.items() if name != "update"}
        earlier = self._set_gradients_aside()
        while True:
            seen = PassTotals(began)
            try:
                losses = []
                for piece in split_rows(batch, self.rows_at_once if self.accelerator.num_processes == 1 else None):
                    # Under autocast PEFT would make a float32 copy of each layer's input, and keep autocast's copy of that for the
                    # backward pass (peft/tuners/tuners_utils.py, _cast_input_dtype).
                    with disable_input_dtype_casting(model, active=self.accelerator.native_amp):
                        losses.append(super().training_step(model, {**piece, "seen": seen}, num_items_in_batch))
                break
            except torch.OutOfMemoryError as error:
                rows = min(self.rows_at_once, len(batch["completion_ids"]))
                self._refuse_to_split(rows, earlier, error)
                self.rows_at_once = rows // 2
            metrics["oom_splits"].append(1.0)
            logger.warning(
                "Out of memory: from now on %d completions a pass. The update is the same.", self.rows_at_once
            )
            for parameter in self._trained():
                parameter.grad = None
            torch.cuda.empty_cache()
        self._add_gradients(earlier)
        loss = torch.stack(losses).sum()
        update.extend(seen, float(loss))
        add_totals(metrics, sum_over_processes(seen.totals.to(loss.device)).tolist())
        tokens = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
        add_training_time(metrics, tokens, time.perf_counter() - began)
        if self.accelerator.sync_gradients:  # the last micro-batch of the update
            self._end_update(update, metrics)
        return loss

    def _end_update(self, update: PassTotals, metrics: Metrics) -> None:
        """Check that the engine held the present policy, log the update's loss, and let lagged residuals, tracker and critic take
        it in. The optimizer's step comes after."""
        if self.probe is not None:
            finding = self.probe.check(update.scored, lambda model, batch: self._score(model, batch, metrics))
            if finding is not None:
                metrics["engine/staleness"].append(finding.score)
        if metrics.get("reward/over_reference"):
            self.reference_watch.add(self.state.global_step + 1, metrics["reward/over_reference"][-1], update.kl())
        if self.args.max_grad_norm and not self.passes_alike:
            metrics["clipped"].append(float(self._grad_norm() > self.args.max_grad_norm))
        losses = sum_over_processes(torch.tensor(update.loss, device=self.accelerator.device))
        mean_loss = losses.item() / self.accelerator.num_processes
        metrics["loss"].append(mean_loss)
        self._loss_sum += mean_loss
        metrics["step_time"].append(time.perf_counter() - update.began)
        parts = gather_objects(update.parts)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.in_rounds:
            ratios_B = torch.where(joined["present"], joined["log_ratio"], 0.0).sum(1)[joined["present"].any(1)]
            share = effective_share(ratios_B)
            metrics["rounds/effective_share"].append(share)
            if share < self.round_options.least_effective_share:
                self.round_progress.is_over = True
            metrics["rounds/ended_early"].append(float(self.round_progress.is_over))
        if len(self.kind.roles) > 1:
            moments = residual_moments(joined["residual"], joined["labels"], joined["present"])
            self.residuals.add(moments)
            add_residuals(metrics, self.kind.roles, moments)
        if "shifted" in joined:
            tracker = self.state_values.tracker
            assert tracker is not None
            tracker.add(
                *(joined["prompt"].tolist(), joined["shifted"], joined["labels"], joined["success"], joined["present"])
            )
            add_tracking(metrics, self.kind, tracker.shift_KZ, joined)
        if "hidden" in joined and joined["present"].any():
            assert self._critic is not None
            here_BK = joined["present"]
            role_BK = torch.arange(here_BK.shape[1]).expand(here_BK.shape)
            error = self._critic.update(
                *(joined["hidden"][here_BK], role_BK[here_BK], joined["labels"][here_BK], joined["target"][here_BK])
            )
            metrics["value/error"].append(error)

    def _grad_norm(self) -> float:
        """Norm of the gradient before it is clipped, without the loss scale."""
        scaler = self.accelerator.scaler
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
        return norm / (scaler.get_scale() if scaler is not None else 1.0)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _set_gradients_aside(self) -> list[torch.Tensor | None] | None:
        """Take the gradients of earlier micro-batches off the parameters.

        With several processes they stay (the wrappers own them), and memory that runs out ends the run.
        """
        if self.accelerator.num_processes > 1:
            return None
        gradients = [parameter.grad for parameter in self._trained()]
        for parameter in self._trained():
            parameter.grad = None
        return gradients

    def _add_gradients(self, earlier: list[torch.Tensor | None] | None) -> None:
        for parameter, gradient in zip(self._trained(), earlier or [], strict=earlier is not None):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def _refuse_to_split(self, rows: int, earlier: Any, error: torch.OutOfMemoryError) -> None:
        if earlier is not None and rows > 1:
            return
        why = (
            "a single completion does not fit"
            if earlier is not None
            else "micro-batches are not split across processes"
        )
        raise torch.OutOfMemoryError(
            f"Out of memory in the training step, and {why}. Set --gradient_checkpointing true, lower "
            f"--per_device_train_batch_size (now {self.args.per_device_train_batch_size}; raise "
            "--gradient_accumulation_steps by as much and the update stays the same), or lower --max_completion_length. "
            f"Resume with --resume_from_checkpoint true. {error}"
        ) from error

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer.create_scheduler`, but warm-up begins with the rate of its second update: at rate 0 the first one would be
        sampled for nothing."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        warm_up = self.args.get_warmup_steps(num_training_steps)
        if warm_up > 0 and isinstance(scheduler, LambdaLR):
            rates = [_one_ahead(rate, warm_up) for rate in scheduler.lr_lambdas]
            self.lr_scheduler = scheduler = LambdaLR(scheduler.optimizer, rates)
        return scheduler

    # --- data

    def get_train_dataloader(self) -> DataLoader:
        """The rows of the training set in an order that follows from the seed and the step alone; see [`PromptOrder`]."""
        args = self.args
        order = PromptOrder(
            len(self.train_dataset),
            self.update_rows,
            args.seed,
            lambda: self.state.global_step,
            bool(args.shuffle_dataset),
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=order,
            collate_fn=list,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """An evaluation set with every row `num_generations_eval` times, one after another."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        repeats = self.args.num_generations_eval or 1
        if repeats > 1:
            rows = self.args.eval_batch_size * self.accelerator.num_processes
            if rows % repeats:
                raise ValueError(
                    f"The evaluation batch of {rows} rows must be a multiple of num_generations_eval={repeats}, so that the "
                    "completions of a prompt are sampled together. Change --per_device_eval_batch_size."
                )
            dataset = dataset.select([row for row in range(len(dataset)) for _ in range(repeats)])
        return super().get_eval_dataloader(dataset)

    def _check_datasets(self, given: Any) -> None:
        if isinstance(self.train_dataset[0]["prompt"], list):
            require_chat_template(self.tokenizer)
        if self.args.max_prompt_length is not None:
            longest = self.longest_prompt()
            if longest > self.args.max_prompt_length:
                raise ValueError(
                    f"The longest prompt has {longest} tokens, max_prompt_length is {self.args.max_prompt_length}. Truncating "
                    "a prompt would change the problem, so none is truncated: raise max_prompt_length, or take such rows out."
                )
        if len(self.kind.roles) > 1 and self.args.pool is None and REWARDS in self.train_dataset.column_names:
            raise ValueError(
                "The training set brings `reference_rewards` of first turns, but the values of later turns come from reference "
                "episodes. Name their pool (`pool`, made with --episode), or leave the column out and the trainer samples them."
            )
        needs_hidden = self.value_options.value == "critic" or self.value_options.value_prior == "network"
        if needs_hidden and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "A value network or critic needs passes through the reference that only some processes make, which FSDP and DeepSpeed "
                "do not allow. Set value_prior=constant and value=posterior, or use DDP."
            )
        if self.value_options.value_network is not None:
            self._kept_network(Path(self.value_options.value_network))  # refused here, not at the first update

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all data sets."""
        sets = [self.train_dataset]
        sets += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return longest_prompt([rows for rows in sets if rows is not None], self.tokenize)

    def longest_episode(self) -> int:
        """Most tokens after a prompt."""
        return self.follow_ups.longest_after_prompt(self.max_completion_length)

    @property
    def is_sharded(self) -> bool:
        """Whether a wrapper divides the parameters among processes."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def pool_folder(self) -> str:
        """The reference pool: the one that was named, or the trainer's own."""
        return self.args.pool or str(Path(str(self.args.output_dir)) / POOL)

    # --- a run: stage 1 first, checkpoints that count only when whole, the same numbers after a kill

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, after stage 1 where V* is not known yet.

        SIGTERM and Ctrl-C save a checkpoint after the present update and end training.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest whole one in `output_dir` (from the beginning if there is none).

        Raises:
            ValueError: If the checkpoint is not whole, or belongs to a run with other data or settings; the message shows
                what differs.
        """
        self.sample_reference()
        self._metrics["train"].clear()
        self._loss_sum = 0.0
        self.round_progress, self._round = Progress(), None
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        if folder is not None:
            refuse_changes(folder, self.fingerprint())
            self._load_progress(folder)
        with self.interrupt:
            output = super().train(str(folder) if folder else None, *args, **kwargs)
        return output._replace(training_loss=self._loss_sum / max(1, self.state.global_step))

    @property
    def deadline_reached(self) -> bool:
        """Whether training ended because the time given by `save_by` was up."""
        return self._deadline is not None and self._deadline.reached

    def sample_reference(self) -> None:
        """Do stage 1, into `output_dir/reference_pool`, where V* is not known yet; `train` begins with it."""
        if REWARDS in self.train_dataset.column_names or self.value_options.value == "critic" or self.in_rounds:
            return
        sampled = sample_reference(
            self.train_dataset,
            self.engine,
            self.tokenizer,
            self.tokenize,
            self.kind,
            self.reward_functions,
            self.args,
            self.engine_options,
            model_name=str(self.model.config._name_or_path),
            model_revision=model_revision(self.args),
            dtype=str(self.model.config.dtype).split(".")[-1],
            chat_template_kwargs=self.chat_template_kwargs,
            max_completion_length=self.max_completion_length,
            trainer_state=self.state,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self.reference_set = with_values(sampled, self.args, self.value_options)
        self.train_dataset = kept_rows(self.reference_set, self.args, self.value_options)

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        if asked is not True:
            return Path(asked)
        folder = last_complete(Path(str(self.args.output_dir)))
        found = f"resuming from {folder}" if folder else "no whole checkpoint yet, starting from the beginning"
        logger.warning("%s: %s.", self.args.output_dir, found)
        return folder

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote a checkpoint."""
        peft_config = getattr(self.model, "peft_config", {}).get("default")
        if self._data is None or self._data[0] is not self.train_dataset:
            self._data = self.train_dataset, data_identity(self.train_dataset)
        model = str(self.model.config._name_or_path)
        run = run_fingerprint(self.args, self._data[1], peft_config, model, self.accelerator.num_processes)
        turns = asdict(self.turn_options) | {
            "turn_weights": self.turn_options.turn_weights or [1.0] * len(self.kind.roles)
        }
        run |= asdict(self.value_options)
        if self.in_rounds:
            run |= {name: value for name, value in asdict(self.round_options).items() if name not in ROUND_PLACES}
            run["lag"] = self.round_options.bound
        return run | {"episode": turns | {"episode": self.kind.name} | self.kind.fingerprint()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model` does; the folder of a checkpoint is emptied first."""
        folder = Path(str(output_dir or self.args.output_dir))
        if _internal_call and folder.name.startswith("checkpoint-"):
            # Left by a run that was killed: its files would mix with ours.
            if self.args.should_save and folder.exists():
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            self.create_model_card(output_dir=str(folder))  # in place of PEFT's, which is a blank form
            if not _internal_call and self._state_values is not None:
                self._state_values.save_network(folder)

    def _finish_checkpoint(self, folder: Path) -> None:
        """Write what transformers does not keep, then the marker that makes the checkpoint count."""
        self.accelerator.wait_for_everyone()  # each process has written its random state
        if self.args.should_save:
            progress = {
                "metrics": dict(self._metrics["train"]),
                "loss_sum": self._loss_sum,
                "rows_at_once": self.rows_at_once,
                "round": asdict(self.round_progress),
            }
            (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            if len(self.kind.roles) > 1:
                save_file({"moments": self.residuals.moments}, folder / MOMENTS)
            if self._state_values is not None:
                self._state_values.save(folder)
            if self._critic is not None:
                self._critic.save(folder)
            if self.probe is not None:
                self.probe.save(folder / PROBE)
            mark_complete(folder, self.fingerprint())
            rotate(folder.parent, self._save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _load_progress(self, folder: Path) -> None:
        """Read what `_finish_checkpoint` wrote."""
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        for name, values in progress["metrics"].items():
            self._metrics["train"][name] = list(values)
        self._loss_sum = progress["loss_sum"]
        self.round_progress, self._round = Progress(**progress.get("round", {})), None
        if self.accelerator.num_processes == 1 and progress["rows_at_once"] is not None:
            self.rows_at_once = min(self.rows_at_once, progress["rows_at_once"])
        if (folder / MOMENTS).is_file():
            self.residuals = LaggedResiduals(self.kind, load_file(folder / MOMENTS)["moments"])
        if (folder / FILE).is_file():
            self._state_values = StateValues.load(folder)
        if (folder / CRITIC).is_file():
            self._critic = Critic.load(folder)
        if self.probe is not None:
            self.probe.load(folder / PROBE)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does: the means since the last log, with an evaluation's under its own prefix."""
        ended = next((name for name in logs if name.endswith("_runtime")), "")
        prefix = "" if ended in ("", "train_runtime") else ended.removesuffix("runtime")
        if "train_loss" in logs:
            logs["train_loss"] = self._loss_sum / max(1, self.state.global_step)
        metrics = self._metrics["eval" if prefix else "train"]
        if not prefix:
            add_peak_memory(metrics)
        means = finish_metrics(metrics, (self.args.num_generations_eval or 1) if prefix else None)
        for name, value in means.items():
            logs[f"{prefix}{name}"] = value  # pyright: ignore[reportArgumentType] -- None where it was never a number
        metrics.clear()
        super().log(logs, start_time)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Count nothing for `include_num_input_tokens_seen`: `make_batch` has counted the tokens."""
        # The one private method of transformers (trainer.py, `_run_epoch`) that is overridden: it would warn at every
        # micro-batch that there are no `input_ids` to count. tests/test_config.py tells when it is gone.

    def close(self) -> None:
        """Take the policy off the engine, and end an engine that was started here."""
        if self._sampler is not None and self._sampler.policy is not None:
            self._sampler.policy.close()
        self._sampler = None
        if self._owns_engine and self._engine is not None:
            self._engine.close()
            self._engine = None

    def create_model_card(  # pyright: ignore[reportIncompatibleMethodOverride] -- TRL's arguments
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        evaluations: Sequence[Evaluated] = (),
        sources: Sequence[dict[str, Any]] = (),
        output_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapter's or the model's card.

        Args:
            model_name (`str`, *optional*):
                Name of the model; that of the folder when not given.
            dataset_name (`str`, *optional*):
                Hub id of the data set that it was trained on.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
            evaluations (`Sequence[Evaluated]`, *optional*):
                Results to state; the last evaluation of the log when not given.
            sources (`Sequence[dict]`, *optional*):
                Where the problems come from, see [`data_sources`]; what the pool says of them when not given.
            output_dir (`str`, *optional*):
                Where to write; `args.output_dir` when not given.
        """
        if not self.is_world_process_zero():
            return
        pools = list(pool_fingerprints(None, self.args).values()) if self.args.pool is not None else []
        pool = self.args.pool or (self.pool_folder if Path(self.pool_folder).is_dir() else None)
        base = str(self.model.config._name_or_path)
        facts = CardFacts(
            name=model_name or Path(str(self.args.output_dir)).resolve().name,
            base_model=base,
            license=license_of(base),
            sources=tuple(sources) or tuple(pools[0].get("sources", ()) if pools else ()),
            datasets=(dataset_name,) if dataset_name else (),
            pool=pool,
            is_adapter=isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
            settings=recipe_of(self.args, self.kind.name, getattr(self.model, "peft_config", {}).get("default")),
            log=tuple(self.state.log_history),
            evaluations=tuple(evaluations),
            tags=(tags,) if isinstance(tags, str) else tuple(tags or ()),
        )
        model_card(facts).save(Path(str(output_dir or self.args.output_dir)) / "README.md")


def _one_ahead(rate: Callable[[int], float], warm_up: int) -> Callable[[int], float]:
    return lambda step: rate(step + 1) if step < warm_up else rate(step)


def _checked_args(model: Any, args: AStarPOConfig | None) -> AStarPOConfig:
    """The configuration, a default one where there is none; a `ValueError` for a model or a class that will not do."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "A ready PeftModel is refused, because A*-PO's reference is the model with the adapter off: pass the base model "
            "(merge an earlier adapter into it first) and a `peft_config`."
        )
    if args is None:
        name = model if isinstance(model, str) else str(model.config._name_or_path)
        return AStarPOConfig(f"{name.rstrip('/').split('/')[-1]}-AStarPO")
    if not isinstance(args, AStarPOConfig):
        raise ValueError(
            f"`args` must be an AStarPOConfig, got {type(args).__name__}; most fields of GRPOConfig are fields of it too."
        )
    # Here, and not in the configuration: TRL's scripts put `model_init_kwargs` together after making one.
    if options_of(args.model_init_kwargs).get("trust_remote_code"):
        raise ValueError(
            "`trust_remote_code=True` in `model_init_kwargs` is refused: astarpo runs no code that comes with a model."
        )
    return args
