"""What makes a run survive: the order of prompts, whole checkpoints, deadlines, memory that runs out, broken numbers.

Nothing here knows A*-PO; `trainer.py` builds on it.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from .checkpoint import data_identity, last_complete, mark_complete, refuse_changes, rotate, run_fingerprint
from .guards import DeadlineGuard, NumericGuard
from .interrupt import StopOnInterrupt
from .metrics import add_training_time
from .order import PromptOrder
from .scoring import CALL_COST, can_share, length_groups, score_completions

Inputs = dict[str, Any]
UNLOGGED = "unlogged.json"


class _PutBack(TrainerCallback):
    """Lets the trainer put back what a checkpoint remembers, at the one moment when it is not overwritten."""

    def __init__(self, trainer: "DurableTrainer"):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.put_back_unlogged()


class DurableTrainer(GRPOTrainer):
    """A `GRPOTrainer` that can be killed at any moment and goes on as if it had not been."""

    args: Any
    model: Any
    train_dataset: Any
    current_gradient_accumulation_steps: int
    _tr_loss: Any

    def __init__(self, *args: Any, callbacks: Sequence[Any] | None = None, **kwargs: Any):
        super().__init__(*args, callbacks=list(callbacks or []), **kwargs)
        self.interrupt = StopOnInterrupt()
        self.add_callback(self.interrupt)
        self.add_callback(NumericGuard(self))
        self.add_callback(_PutBack(self))
        if self.args.save_by is not None:
            self.add_callback(DeadlineGuard(self.args.save_by))
        self._piece: Inputs | None = None
        self._rows_at_once: int | None = None
        self._data: tuple[Any, str] | None = None
        self._unlogged: dict[str, Any] | None = None
        self._unlogged_loss = 0.0
        self._saved_step = -1

    # --- the order of prompts

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        args = self.args
        generation_rows = args.per_device_train_batch_size * self.accelerator.num_processes * args.steps_per_generation
        return PromptOrder(
            num_rows=len(self.train_dataset if dataset is None else dataset),
            update_rows=generation_rows * args.gradient_accumulation_steps // args.steps_per_generation,
            generation_rows=generation_rows,
            repeats=args.steps_per_generation,
            seed=args.seed,
            step=lambda: self.state.global_step,
            shuffle=bool(self.shuffle_dataset),
        )

    # --- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does. SIGTERM and Ctrl-C save a checkpoint after the present update and end training.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest whole one in `output_dir` (from the beginning if there is none).

        Raises:
            ValueError: If the checkpoint is not whole, or belongs to a run with other data or settings; the message shows
                what differs.
        """
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        if folder is not None:
            refuse_changes(folder, self.fingerprint())
        self._unlogged, self._saved_step = None, -1
        # Of an earlier call that was broken off in the middle of an update nothing must be left.
        self._step, self._buffered_inputs = 0, None
        self._metrics["train"].clear()
        with self.interrupt:
            output = super().train(str(folder) if folder else None, *args, **kwargs)
        return output._replace(training_loss=self._mean_loss())

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        if asked is not True:
            return Path(asked)
        folder = last_complete(Path(self.args.output_dir))
        if self.accelerator.is_main_process:
            found = f"resuming from {folder}" if folder else "no whole checkpoint yet: starting from the beginning"
            print(f"{self.args.output_dir}: {found}", file=sys.stderr)
        return folder

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote a checkpoint."""
        peft_config = getattr(self.accelerator.unwrap_model(self.model), "peft_config", {}).get("default")
        if self._data is None or self._data[0] is not self.train_dataset:
            self._data = self.train_dataset, data_identity(self.train_dataset)
        model = str(self.accelerator.unwrap_model(self.model).config._name_or_path)
        return run_fingerprint(self.args, self._data[1], peft_config, model, self.accelerator.num_processes)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._saved_step == self.state.global_step:
            return  # a stop and the end of an epoch may both ask for it
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # left by a run that was cut short: its files would mix with ours
        self.accelerator.wait_for_everyone()
        # Transformers deletes old checkpoints before this one can be relied on, so it is not asked to.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self._unlogged_loss = float(torch.as_tensor(gather(self._tr_loss.detach())).mean())
        if self.args.should_save:
            self._save_extra(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self.fingerprint())
            rotate(folder.parent, limit, self.state.best_model_checkpoint)
        self._saved_step = self.state.global_step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_extra(Path(resume_from_checkpoint))

    def _save_extra(self, folder: Path) -> None:
        """Write what transformers does not keep: what was measured since the last log, and the sum of losses."""
        unlogged = {
            "loss": self._unlogged_loss,
            "loss_sum": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
            "rows_at_once": self._rows_at_once,
        }
        (folder / UNLOGGED).write_text(json.dumps(unlogged), encoding="utf-8")

    def _load_extra(self, folder: Path) -> None:
        """Read it back; it is put in place when training begins."""
        self._unlogged = json.loads((folder / UNLOGGED).read_text(encoding="utf-8"))

    def put_back_unlogged(self) -> None:
        """Go on with the sums that the checkpoint's run had; transformers has just set them to 0."""
        if self._unlogged is None:
            return
        if self.accelerator.num_processes == 1:  # several make whole micro-batches
            rows = [rows for rows in (self._rows_at_once, self._unlogged["rows_at_once"]) if rows is not None]
            self._rows_at_once = min(rows, default=None)
        self._tr_loss += self._unlogged["loss"]
        self._total_loss_scalar = self._unlogged["loss_sum"]
        self._globalstep_last_logged = self._unlogged["last_logged"]
        for name, values in self._unlogged["metrics"].items():
            self._metrics["train"][name] = list(values)

    def _mean_loss(self) -> float:
        """Mean loss over the whole run, not only over what a resumed part of it did."""
        return self._total_loss_scalar / max(1, self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as TRL does; `train_loss` at the end is that of the whole run."""
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_loss()
        super().log(logs, start_time)

    # --- memory

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch. When memory runs out it is done in pieces, which add up to the same gradient."""
        began = time.perf_counter()
        model.train()
        batch = self._prepare_inputs(inputs)
        prepared = time.perf_counter()
        loss = self._train_on(model, batch, num_items_in_batch)
        tokens = int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
        add_training_time(self._metrics["train"], tokens, time.perf_counter() - prepared)
        self._step += 1
        self._current_train_step_time += time.perf_counter() - began
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return generation_batch if generation_batch is self._piece else super()._prepare_inputs(generation_batch)

    def _train_on(self, model: Any, inputs: Inputs, num_items_in_batch: Any) -> torch.Tensor:
        earlier = self._set_gradients_aside()
        logged = {name: len(values) for name, values in self._metrics["train"].items()}
        rows = min(self._rows_at_once or len(inputs["completion_ids"]), len(inputs["completion_ids"]))
        while True:
            try:
                pieces = _pieces(inputs, rows)
                loss = torch.stack([self._train_piece(model, piece, num_items_in_batch) for piece in pieces]).sum()
                self._add_gradients(earlier)
                return loss
            except torch.OutOfMemoryError as error:
                self._refuse_to_split(rows, earlier, error)
                for name, values in self._metrics["train"].items():  # the attempt that failed measured nothing
                    del values[logged.get(name, 0) :]
                self._forget_attempt()
                self._metrics["train"]["oom_splits"].append(1.0)
                logged["oom_splits"] = len(self._metrics["train"]["oom_splits"])
                rows = self._rows_at_once = rows // 2
                print(
                    f"out of memory: from now on {rows} completions at a time; the update is the same", file=sys.stderr
                )
            for parameter in self._trained():
                parameter.grad = None
            torch.cuda.empty_cache()

    def _forget_attempt(self) -> None:
        """Forget what a micro-batch left behind that is done again in smaller parts."""

    def _train_piece(self, model: Any, piece: Inputs, num_items_in_batch: Any) -> torch.Tensor:
        self._piece = piece
        try:
            return Trainer.training_step(self, model, piece, num_items_in_batch)
        finally:
            self._piece = None

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _set_gradients_aside(self) -> list[torch.Tensor | None] | None:
        """Take away the gradients of earlier micro-batches, so that a backward pass that fails cannot spoil them.

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

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        """TRL's method, without computing padding; for what it alone knows (images) it is asked."""
        if any(value is not None and value is not False for value in kwargs.values()):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        rows = min(batch_size or len(input_ids), self._rows_at_once or len(input_ids))
        while True:
            try:
                groups = self._groups(attention_mask, rows)
                min_saved = self._min_saved(int(attention_mask.sum()))
                with self.accelerator.autocast():
                    logps, entropies = score_completions(
                        model, input_ids, attention_mask, logits_to_keep, groups, min_saved, compute_entropy
                    )
                return logps, entropies, None
            except torch.OutOfMemoryError:
                # With FSDP or DeepSpeed the others would wait for passes that this process does not make.
                if torch.is_grad_enabled() or rows == 1 or self._passes_alike:
                    raise
            rows = rows // 2
            self._metrics["train"]["oom_splits"].append(1.0)
            torch.cuda.empty_cache()

    def _min_saved(self, tokens: int) -> int | None:
        """Tokens that sharing a prefix must save: a tenth, and what its pass costs; None where there is no sharing."""
        policy = self.accelerator.unwrap_model(self.model)
        # Blocks that are computed again in the backward pass keep no keys and values to share.
        is_recomputing = policy.training and getattr(policy, "is_gradient_checkpointing", False)
        if is_recomputing or self._passes_alike or not can_share(policy.config):
            return None
        return max(2 * self._call_cost, tokens // 10)

    @property
    def is_sharded(self) -> bool:
        """Whether a wrapper divides the parameters among processes."""
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def _passes_alike(self) -> bool:
        """Whether all processes must make the same passes, because each pass (or its gradient hooks) communicates."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _call_cost(self) -> int:
        return CALL_COST["cpu" if self.accelerator.device.type == "cpu" else "cuda"]

    def _groups(self, attention_mask: torch.Tensor, max_rows: int) -> list[list[int]]:
        lengths = attention_mask.sum(1).tolist()
        if self._passes_alike:
            return [list(range(len(lengths)))[start : start + max_rows] for start in range(0, len(lengths), max_rows)]
        return length_groups(lengths, self._call_cost, max_rows)


def _pieces(inputs: Inputs, rows: int) -> Iterator[Inputs]:
    """A batch in parts of at most `rows` rows; the batch itself when that is all of it. Totals go with every part."""
    count = len(inputs["completion_ids"])
    if rows >= count:
        yield inputs
        return
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        yield {k: v[part] if isinstance(v, torch.Tensor) and v.dim() > 0 else v for k, v in inputs.items()}
