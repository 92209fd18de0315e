"""`AStarPOTrainer`: A*-PO on top of TRL's `GRPOTrainer`.

What is overridden: where V* comes from (`__init__`), who samples (`EngineBackend`), the rewards of cut completions,
and the loss; in `durable.py` the order of prompts, checkpoints, and what happens when memory runs out. Everything else
(generation loop, reference log-probs, rewards, logging, the hub) is TRL's.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..rollout.engines.interface import SamplingSettings
from ..rollout.engines.policy_link import link_policy
from ..rollout.engines.server_engine import ServerEngine
from ..rollout.engines.vllm_engine import VLLMEngine
from ..rollout.options import EngineOptions
from ..rollout.prompts import require_chat_template
from ..verifier import math_reward
from .completions import KeepCompletions
from .config import AStarPOConfig, checked_args
from .dataset import REWARDS, VALUE, training_set, with_eval_values
from .engine import make_engine
from .episodes import EndUpdate, Turns
from .generation import EngineBackend
from .logprobs import has_plain_logits, use_cpu_head
from .loss import astarpo_loss, turn_log_ratios
from .metrics import add_interval, add_peak_memory, add_scores, add_speed, add_totals, divide_totals, loss_totals
from .planning import plan_training
from .probe import PolicyProbe
from .reference import POOL, add_reference_values
from .rewards import GradedTrainer
from .turn_options import TurnOptions

if TYPE_CHECKING:
    from datasets import Dataset

PROBE = "probe.safetensors"

RewardFunc = str | PreTrainedModel | Callable[..., list[float | None]]


class AStarPOTrainer(GradedTrainer):
    r"""
    Trainer for A*-PO: policy optimisation by regression on the optimal advantage.

    One completion y per prompt x is sampled from the policy, and β2·ln π(y|x)/π_ref(y|x) is regressed on r − V*(x).
    The algorithm is that of [Accelerating RL for LLM Reasoning with Optimal Advantage
    Regression](https://huggingface.co/papers/2505.20686).

    Example:

    ```python
    from astarpo.rollout import ReferencePool
    from astarpo.trainer import AStarPOConfig, AStarPOTrainer
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
            An engine to sample with, already holding the reference; made here when not given.
        engine_options ([`~astarpo.rollout.EngineOptions`], *optional*):
            Which engine is made here, and its sizes: `vllm`, `server`, or `transformers` (TRL's own `generate`).
        episode_options ([`TurnOptions`], *optional*):
            Completions or PAG episodes, the rewards and weights of their turns, and where V comes from.
    """

    _tag_names = ["trl", "astarpo"]  # noqa: RUF012
    _name = "A*-PO"
    _paper = {  # noqa: RUF012
        "title": "Accelerating RL for LLM Reasoning with Optimal Advantage Regression",
        "id": "2505.20686",
        "citation": (
            "@article{brantley2025accelerating,\n"
            "    title  = {{Accelerating RL for LLM Reasoning with Optimal Advantage Regression}},\n"
            "    author = {Brantley, Kiant\\'e and Chen, Mingyu and Gao, Zhaolin and Lee, Jason D. and Sun, Wen and "
            "Zhan, Wenhao and Zhang, Xuezhou},\n"
            "    year   = 2025,\n"
            "    eprint = {arXiv:2505.20686},\n"
            "}"
        ),
    }
    args: AStarPOConfig
    eval_dataset: Any
    max_completion_length: int

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
        *,
        engine: VLLMEngine | ServerEngine | None = None,
        engine_options: EngineOptions | None = None,
        episode_options: TurnOptions | None = None,
    ):
        engine_options = engine_options or EngineOptions()
        self.turns = Turns(self, episode_options or TurnOptions())
        if engine_options.engine == "ray":
            raise ValueError("Ray makes reference samples (astarpo-rollout); to train set --engine vllm or server.")
        args = checked_args(model, args)
        sizes = plan_training(
            model, args, engine_options, peft_config, quantization_config, engine, self.turns.options, processing_class
        )
        args, self._engine_options = sizes.args, sizes.engine_options
        use_vllm, args.use_vllm = args.use_vllm, False  # TRL must not start an engine of its own
        try:
            super().__init__(
                model=model,
                reward_funcs=math_reward if reward_funcs is None else reward_funcs,  # pyright: ignore[reportArgumentType]
                args=args,
                train_dataset=training_set(train_dataset, args, self.turns.options),
                eval_dataset=with_eval_values(eval_dataset, args),
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        finally:
            args.use_vllm = use_vllm
        if isinstance(self.train_dataset[0]["prompt"], list):
            require_chat_template(self._tokenizer)
        if self.args.max_prompt_length is not None:
            self.longest_prompt()
        self._keep_whole_updates()
        self._rewards_G = self._first_rewards_G = torch.empty(0)
        self._eval_rewards: list[float] = []
        self._probe: PolicyProbe | None = None
        self.vllm_generation = None
        self._rows_at_once = sizes.rows_at_once
        self._prepare_scoring()
        if engine is not None or (use_vllm and self._engine_options.engine != "transformers"):
            self._attach_engine(engine or make_engine(self, self._engine_options))
        if self.turns.options.value_source == "network" and self._passes_alike:
            raise ValueError(
                "value=network needs passes through the reference that only some processes make, which FSDP and DeepSpeed do not "
                "allow. Set value=constant, or use DDP."
            )
        if self.turns.options.is_pag:
            self._sample_episodes()

    def _sample_episodes(self) -> None:
        """Let episodes take the place of TRL's completions."""
        if self.vllm_generation is None:
            raise ValueError("Episodes need an engine: set --engine vllm or server, and leave --use_vllm on.")
        if self.args.pool is None and VALUE in self.train_dataset.column_names:
            raise ValueError(
                "The training set brings `reference_rewards` of first attempts, but the values of verifications and revisions come "
                "from reference episodes: name their pool (`pool`, made with --episode pag), or leave the column out and the "
                "trainer samples them."
            )
        self.rollout_func = self.turns.rollout
        self.add_callback(EndUpdate(self.turns))

    @property
    def pool_folder(self) -> str:
        """The reference pool: the one that was named, or the trainer's own."""
        return self.args.pool or str(Path(str(self.args.output_dir)) / POOL)

    @property
    def longest_completion(self) -> int:
        """Most tokens after a prompt: a completion's, or a whole episode's."""
        return self.turns.options.longest(self._tokenizer, self.max_completion_length)

    def _keep_whole_updates(self) -> None:
        """Let TRL's record of completions hold a whole update, not only its last generation; and write it."""
        rows = self.args.per_device_train_batch_size * self.accelerator.num_processes
        rows *= self.args.gradient_accumulation_steps
        lists = {name: deque(maxlen=rows) for name in ("images", "prompt", "completion", "advantages")}
        self._logs = {**lists, **{name: defaultdict(lambda: deque(maxlen=rows)) for name in ("rewards", "extra")}}
        self.add_callback(KeepCompletions(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as [`DurableTrainer.train`] does, after stage 1 where V* is not known yet."""
        if VALUE not in self.train_dataset.column_names:
            add_reference_values(self, self._engine_options)
        self.turns.forget_all()
        return super().train(*args, **kwargs)

    def _save_extra(self, folder: Path) -> None:
        super()._save_extra(folder)
        self.turns.save(folder)
        if self._probe is not None:
            self._probe.save(folder / PROBE)

    def _load_extra(self, folder: Path) -> None:
        super()._load_extra(folder)
        self.turns.load(folder)
        if self._probe is not None:
            self._probe.load(folder / PROBE)

    def _prepare_scoring(self) -> None:
        if self.args.fp16:  # QLoRA leaves adapters in bf16, which the fp16 loss scaler cannot unscale
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if self.accelerator.device.type != "cpu" or self.args.cast_lm_head_to_fp32:
            return
        models: list[Any] = [self.model, self.ref_model]
        for model in models:
            if model is not None and has_plain_logits(model.config):
                use_cpu_head(model.get_base_model() if isinstance(model, PeftModel) else model, self.temperature)

    @property
    def model_revision(self) -> str | None:
        """Branch, tag or commit that the model was loaded from."""
        kwargs = self.args.model_init_kwargs
        return kwargs.get("revision") if isinstance(kwargs, dict) else None

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all data sets.

        Raises:
            ValueError: If that is more than `max_prompt_length`.
        """
        sets = [self.train_dataset]
        sets += self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        prompts = [prompt for rows in sets if rows is not None for prompt in rows["prompt"]]
        longest = max(len(ids) for ids in self._tokenize_prompts(prompts)[0])
        if self.args.max_prompt_length is not None and longest > self.args.max_prompt_length:
            raise ValueError(
                f"The longest prompt has {longest} tokens, max_prompt_length is {self.args.max_prompt_length}. A cut prompt is "
                "another problem, so none is cut: raise max_prompt_length, or take such rows out of the training set."
            )
        return longest

    def _attach_engine(self, engine: VLLMEngine | ServerEngine) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        self.vllm_generation = EngineBackend(
            engine,
            link_policy(engine, policy, self._engine_options.adapter_dir),
            SamplingSettings(self.max_completion_length, self.temperature),
            self._seed_parts,
            self.args.engine_timeout_s,
        )
        self.use_vllm = True
        self._last_loaded_step = -1
        if self.args.probe_rows > 0 and not self.is_sharded:  # it computes with weights that no process has whole
            self._probe = PolicyProbe(policy, self.args.probe_rows)

    def _seed_parts(self) -> tuple[str | int, ...]:
        """What seeds derive from besides the prompt: mode, run seed, update, and the generation within the update."""
        mode = "train" if self.model.training else "eval"
        parts: tuple[str | int, ...] = (mode, self.args.seed, self.state.global_step)
        generation = (self._step % self.args.gradient_accumulation_steps) // (self.args.steps_per_generation or 1)
        return (*parts, generation) if self.model.training and generation else parts

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if self._signature_columns is not None and VALUE not in self._signature_columns:
            self._signature_columns += [VALUE, REWARDS]

    def _generate_and_score_completions(self, inputs):
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards_B = self._local(self._rewards_G, len(inputs))
        if self.turns.options.is_pag:
            first_B = self._local(self._first_rewards_G, len(inputs))
            output |= self.turns.of_episodes(inputs, output, first_B, rewards_B)
        else:
            output |= self.turns.of_completions(inputs, output, rewards_B)
        values_B = output.pop("v_star")
        has_signal_BK = output["present"]
        advantages_B = torch.where(has_signal_BK, output["rewards"] - output["values"], 0.0).sum(1)
        has_signal_B = has_signal_BK.any(1)
        # One completion without signal must not make the others count less.
        output["num_with_signal"] = torch.as_tensor(gather(has_signal_B)).sum().clamp(min=1)
        output["advantages"] = advantages_B
        self._log_scores(values_B, advantages_B, has_signal_B)
        if not self.model.training:
            self._eval_rewards += self._rewards_G.tolist()
        if self.model.training and self._probe is not None:
            self._run_probe(output)
        if self.model.training and isinstance(self.vllm_generation, EngineBackend):
            add_speed(self._metrics["train"], *self.vllm_generation.last_speed)
        return output

    def _log_scores(self, values_B: torch.Tensor, advantages_B: torch.Tensor, has_signal_B: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        advantages_G, values_G, has_signal_G = gather((advantages_B, values_B, has_signal_B))
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages_G), len(logged))):  # TRL has logged its group advantages, which are all 0
            logged.pop()
        logged.extend(advantages_G.tolist())
        self._logs["extra"]["v_star"].extend(values_G.tolist())
        add_scores(self._metrics[mode], values_G, advantages_G, has_signal_G)

    def _run_probe(self, output: dict[str, Any]) -> None:
        assert self._probe is not None
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        keep = output["completion_ids"].size(1)

        def score_rows(model: Any, rows: slice) -> torch.Tensor:
            batch_size = self.args.per_device_train_batch_size
            return self._get_per_token_logps_and_entropies(model, ids[rows], attention[rows], keep, batch_size)[0]

        finding = self._probe.check(score_rows, output["sampling_per_token_logps"], output["turn_ids"])
        self._metrics["train"]["engine/staleness"].append(finding.score)
        self._metrics["train"]["engine/logp_gap"].append(finding.gap)

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps_BT, entropies_BT, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].size(1), compute_entropy=True
        )
        values_BK, rewards_BK, weights_BK = inputs["values"], inputs["rewards"], inputs["weights"]
        log_ratio_BK = turn_log_ratios(logps_BT, inputs["ref_per_token_logps"], inputs["turn_ids"], values_BK.shape[1])
        losses_BK = astarpo_loss(log_ratio_BK, values_BK, rewards_BK, weights_BK, self.args.beta2)
        totals = loss_totals(log_ratio_BK.detach(), entropies_BT, inputs, self.args.beta2)
        if model.training:
            self.turns.observe(inputs, log_ratio_BK.detach(), self._step)
        summed: Any = self.accelerator.reduce(totals, "sum")
        add_totals(self._metrics["train" if self.model.training else "eval"], summed.tolist())
        if not self.model.training:
            return losses_BK.sum() / inputs.get("present", weights_BK > 0).any(1).sum().clamp(min=1)
        # The mean over the global batch: DDP averages over processes, and an update may span several generations.
        generations = self.current_gradient_accumulation_steps / (self.args.steps_per_generation or 1)
        return losses_BK.sum() * self.accelerator.num_processes / (inputs["num_with_signal"] * generations)

    def _forget_attempt(self) -> None:
        self.turns.forget(self._step)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote a checkpoint."""
        options = self.turns.options
        return super().fingerprint() | ({"episode": asdict(options)} if options != TurnOptions() else {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does, without the metrics that mean something only for groups."""
        add_peak_memory(self._metrics["train"])
        if not self.model.training:
            add_interval(self._metrics["eval"], self._eval_rewards, self.num_generations_eval or 1)
            self._eval_rewards = []
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics.pop("frac_reward_zero_std", None)
        divide_totals(metrics)
        super().log(logs, start_time)
