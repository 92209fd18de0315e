"""`astarpo train`: from problems to a trained policy. Also `astarpo-train` and `accelerate launch -m astarpo.trainer`.

A run is a list of phases: sample the reference (or take a pool), evaluate it, train, evaluate what was trained. Each continues what an
earlier run of the same command left, so repeating the command is always safe.
"""

import logging
import shutil
import sys
import warnings
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import INTERRUPTED, TIME_IS_UP, OptionGroup, parse_command, run_command
from ..rollout.options import DataOptions, EngineOptions, ProblemOptions, refuse_below

if TYPE_CHECKING:
    from datasets import Dataset

    from ..rollout.rounds import RoundFolder
    from .record import RunRecord
    from .trainer import AStarPOTrainer

logger = logging.getLogger(__name__)

HIDDEN_MODEL = (
    *("model_revision", "dtype", "lora_dropout", "lora_target_modules", "load_in_4bit"),
    *("trust_remote_code", "attn_implementation", "use_rslora", "use_dora", "load_in_8bit", "bnb_4bit_quant_type"),
    *(
        "use_bnb_nested_quant",
        "bnb_4bit_quant_storage",
        "lora_target_parameters",
        "lora_modules_to_save",
        "lora_task_type",
    ),
)
HIDDEN_TRAINING = (
    *(
        "log_completions",
        "num_generations",
        "vllm_mode",
        "vllm_gpu_memory_utilization",
        "disable_dropout",
        "trust_remote_code",
    ),
    *("remove_unused_columns", "model_init_kwargs", "cast_lm_head_to_fp32", "shuffle_dataset", "log_unique_prompts"),
    *("engine_timeout_s", "probe_rows", "use_vllm", "num_generations_eval", "num_completions_to_print"),
    *("mismatch_correction", "accept_undeclared", "entropy_coef", "filter_all_incorrect", "chat_template_kwargs"),
)
HIDDEN_ENGINE = (
    *("adapter_dir", "max_num_batched_tokens", "share_base_weights", "ray_workers", "ray_address", "policy_link"),
    *("max_model_len", "cuda_graphs", "server_url"),
)
HIDDEN_DATA = (
    "datasets",
    "dataset_config",
    "dataset_split",
    "prompt_template",
    "limit_seed",
    "eval_limit",
    "overlong_prompts",
)
HIDDEN_TURNS = (
    *(
        "verify_prompt",
        "revise_prompt",
        "alpha",
        "role_weighting",
        "centre_residuals",
        "verdict_parser",
        "turn_weights",
    ),
    "balance_labels",
)
HIDDEN_ROUNDS = (
    *(
        "num_iterations",
        "lag",
        "part",
        "trainers",
        "rounds_dir",
        "close_engine",
        "lagged_logprobs",
        "least_effective_share",
    ),
    *("updates_per_round", "num_samples"),
)
HIDDEN_VALUES = ("value_network", "value_estimate", "value_kappa", "value_prior")


@dataclass
class TrainingData(ProblemOptions):
    """The problems to train on, the problems to evaluate on, and the reward."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate on this data set before and after training, and on the way with --eval_steps. Its problems are left out of "
            "the training set."
        },
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Evaluate on only so many of its problems, spread as with --limit."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions as module.function, found from the present folder too. Default: math_reward, the grader."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_below(self, 1, "eval_limit")


@dataclass
class RunOptions:
    """What becomes of an earlier run, and where this one starts from."""

    start_from_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Go on from an earlier adapter: it is merged into the model, which is then the reference and needs a pool of its own."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete the run in output_dir first: checkpoints, adapter and rounds, never its reference pool."
        },
    )


def options() -> list[Any]:
    """The command's groups of options; a function, because defining them loads TRL."""
    from trl import ModelConfig

    from .config import AStarPOConfig, RoundOptions, TurnOptions, ValueOptions

    @dataclass
    class PolicyConfig(ModelConfig):
        """TRL's `ModelConfig` with LoRA by default, on all linear layers and without dropout."""

        dtype: str | None = field(
            default="auto", metadata={"help": "Type of the base weights; auto: as stored, float16 on a T4."}
        )
        use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; off: all weights."})
        lora_dropout: float = field(default=0.0, metadata={"help": "Taken as 0: sampling knows no dropout."})
        lora_target_modules: list[str] | None = field(
            default_factory=lambda: ["all-linear"], metadata={"help": "Modules with a LoRA adapter."}
        )

    return [
        OptionGroup(PolicyConfig, "model and LoRA", HIDDEN_MODEL),
        OptionGroup(AStarPOConfig, "A*-PO", HIDDEN_TRAINING),
        OptionGroup(TrainingData, "problems and reward", HIDDEN_DATA),
        OptionGroup(RunOptions, "the run"),
        OptionGroup(EngineOptions, "engine", HIDDEN_ENGINE),
        OptionGroup(TurnOptions, "episodes", HIDDEN_TURNS),
        OptionGroup(ValueOptions, "values", HIDDEN_VALUES),
        OptionGroup(RoundOptions, "rounds", HIDDEN_ROUNDS),
    ]


def train(
    model_config: Any,
    args: Any,
    data: TrainingData,
    run: RunOptions,
    engine_options: EngineOptions,
    episode_options: Any,
    value_options: Any,
    round_options: Any,
) -> int:
    """Make a run, or what is missing of it; returns the exit code."""
    from accelerate import PartialState
    from trl import get_peft_config, get_quantization_config

    from ..rollout.graders import load_reward_functions
    from ..rollout.prompts import load_tokenizer
    from ..rollout.rewards import check_columns
    from ..rollout.rounds import RoundFolder
    from .callbacks import parse_deadline
    from .progress import show_progress
    from .record import REFERENCE, asked_run, delete_run
    from .round_job import path_of_rounds
    from .trainer import AStarPOTrainer

    if not model_config.model_name_or_path and not run.start_from_adapter:
        raise ValueError("No model given: set --model_name_or_path to a hub id or a folder.")
    if args.pool is None and data.dataset_name is None and data.datasets is None:
        raise ValueError(
            "There is nothing to train on: name a data set with --dataset_name (a preset such as math, a hub id, or a .jsonl, .csv or "
            ".parquet file), or a reference pool with --pool."
        )
    if data.eval_dataset_name is None and (data.eval_limit is not None or args.eval_strategy != "no"):
        raise ValueError("There is nothing to evaluate on: name a data set with --eval_dataset_name.")
    functions = load_reward_functions(data.reward_funcs)
    if round_options.part == "sampler":
        return sampler_part(model_config, args, data, run, engine_options, episode_options, round_options, functions)
    if round_options.rounds is not None and args.max_steps <= 0:
        args.max_steps = round_options.most_updates
    value_options.solved_range(args)  # refused here, not when the model is loaded

    # What the folder holds decides what is left to do, before anything is loaded.
    folder, state = Path(args.output_dir), PartialState()
    rounds = RoundFolder(path_of_rounds(args, round_options))
    if run.overwrite_output_dir:
        _refuse_to_delete_used_rounds(rounds, args.pool, round_options.part)
    asked = asked_run(
        *(args, model_config, data, replace(run, overwrite_output_dir=False)),
        *(episode_options, value_options, round_options),
    )
    record, checkpoint = (asked, None) if run.overwrite_output_dir else left_behind(folder, asked, args)
    state.wait_for_everyone()  # all have read before one writes
    model = model_config.model_name_or_path
    if record.is_over(asked):
        if not state.is_main_process:
            return 0
        print(f"the run in {folder} has finished; nothing is left to do")
        trained = str(folder / REFERENCE) if run.start_from_adapter else model
        _print_end(record, trained, data, args, model_config.use_peft, folder)
        return 0
    if args.save_by is not None:  # a duration counts from here, not from the first update
        args.save_by = parse_deadline(args.save_by, datetime.now()).isoformat()
    if data.eval_dataset_name is not None and args.eval_steps is not None:
        args.eval_strategy, args.do_eval = type(args.eval_strategy)("steps"), True

    if run.start_from_adapter:
        from .merge import merged_reference

        with state.main_process_first():
            if run.overwrite_output_dir and state.is_main_process:
                shutil.rmtree(folder / REFERENCE, ignore_errors=True)
            model = str(
                merged_reference(run.start_from_adapter, model, model_config.model_revision, folder / REFERENCE)
            )
        model_config.model_revision = None
    tokenizer = load_tokenizer(model, model_config.model_revision)
    train_rows, eval_rows = load_rows_of(data, args, tokenizer)
    for rows, where in (
        (train_rows, "the training set"),
        (eval_rows, f"the evaluation set `{data.eval_dataset_name}`"),
    ):
        if rows is not None:
            check_columns(functions, rows.column_names, where)
    if run.overwrite_output_dir and state.is_main_process:
        delete_run(folder)  # not before the data are known to be good
        if round_options.part == "both":
            rounds.delete()
    state.wait_for_everyone()
    # 8 is transformers' default, and too few to keep an engine busy.
    if eval_rows is not None and args.per_device_eval_batch_size == 8:
        args.per_device_eval_batch_size = min(64, len(eval_rows))
    args.model_init_kwargs = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": base_dtype(model_config, args),
    }
    trainer = AStarPOTrainer(
        model=model,
        reward_funcs=functions,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        quantization_config=get_quantization_config(model_config),
        engine_options=engine_options,
        episode_options=episode_options,
        value_options=value_options,
        round_options=round_options,
    )
    show_progress(trainer)
    try:
        record, code = run_phases(trainer, record, checkpoint, folder, args.save_by)
    finally:
        trainer.close()
    if code:
        return code
    found: dict[str, Any] = {"evaluations": results_of(record, data, args), "sources": _sources(data)}
    trainer.create_model_card(**found)
    if state.is_main_process:
        _print_end(record, model, data, args, model_config.use_peft, folder)
    if args.push_to_hub:
        trainer.push_to_hub(**found)
    return 0


def run_phases(
    trainer: "AStarPOTrainer", record: "RunRecord", checkpoint: str | None, folder: Path, save_by: str | None
) -> "tuple[RunRecord, int]":
    """Sample, evaluate, train, evaluate; what a checkpoint or an earlier run has done already is left out.

    Returns:
        `tuple[RunRecord, int]`: What the run's folder remembers, and the exit code.
    """
    from .callbacks import TimeIsUp, until

    is_main = trainer.accelerator.is_main_process

    def keep(record: "RunRecord") -> "RunRecord":
        if is_main:
            record.save(folder)
        return record

    record = keep(record)
    try:
        with until(save_by):
            trainer.sample_reference()
            if trainer.eval_dataset is not None and record.before is None and checkpoint is None:
                record = keep(replace(record, before=evaluation_of(trainer)))
    except TimeIsUp:
        print("time was up before the first update: samples are kept; run the same command again", file=sys.stderr)
        return record, TIME_IS_UP
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except TimeIsUp:
        print(
            f"time was up between two rounds, after update {trainer.state.global_step}, which is saved; run the same command again",
            file=sys.stderr,
        )
        return record, TIME_IS_UP
    record = replace(record, updates=trainer.state.global_step, log=list(trainer.state.log_history))
    is_cut = trainer.interrupt.requested or trainer.deadline_reached
    if not is_cut and trainer.eval_dataset is not None:
        entry = next((entry for entry in reversed(record.log) if "eval_reward" in entry), None)
        if entry is not None and entry["step"] == record.updates:  # the last update was evaluated on the way
            after = {name: value for name, value in entry.items() if isinstance(value, int | float)}
        else:
            after = evaluation_of(trainer)
        record = replace(record, after=after)
    trainer.save_model(str(folder))
    record = keep(replace(record, is_finished=not is_cut))
    if trainer.interrupt.requested:
        print(
            f"interrupted after update {record.updates}, which is saved; run the same command again to go on from there",
            file=sys.stderr,
        )
        return record, INTERRUPTED
    if trainer.deadline_reached:
        print(
            f"time was up after update {record.updates}, which is saved; run the same command again", file=sys.stderr
        )
        return record, TIME_IS_UP
    return record, 0


def sampler_part(
    model_config: Any,
    args: Any,
    data: TrainingData,
    run: RunOptions,
    engine_options: EngineOptions,
    episode_options: Any,
    round_options: Any,
    functions: list[Any],
) -> int:
    """Sample the rounds that the same command with `--part trainer` trains on, beside this one or elsewhere."""
    import torch

    from ..rollout.options import ModelOptions
    from ..rollout.pag import episode_kind
    from ..rollout.prompts import load_tokenizer
    from ..rollout.rewards import RewardFunctions, check_columns
    from ..rollout.startup import chosen_engine
    from .callbacks import TimeIsUp, until
    from .dataset import problem_set, prompt_ids
    from .policy import options_of
    from .round_job import RoundJob, folder_of_rounds, sample_rounds

    if run.start_from_adapter:
        raise ValueError(
            "--start_from_adapter is for one process. Merge the adapter with `astarpo export`, and name that folder as the model of both "
            "parts."
        )
    model, revision = model_config.model_name_or_path, model_config.model_revision
    tokenizer, kwargs = load_tokenizer(model, revision), options_of(args.chat_template_kwargs)
    rows, _ = load_rows_of(data, args, tokenizer)
    rows = problem_set(rows, args)
    check_columns(functions, rows.column_names, "the training set")
    update_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * round_options.trainers
    job = RoundJob(
        rows.to_list(),
        round_options.prompts_per_round(update_rows),
        round_options,
        args,
        ModelOptions(model, revision, dtype=base_dtype(model_config, args) or "auto"),
        chosen_engine(engine_options),
        tokenizer,
        lambda prompts: prompt_ids(prompts, tokenizer, kwargs),
        episode_kind(episode_options, episode_options.alpha),
        RewardFunctions(functions, None, args.reward_weights, None, kwargs, torch.device("cpu")),
        kwargs,
    )
    folder = folder_of_rounds(args, round_options)
    try:
        with until(args.save_by):
            sample_rounds(folder, job)
    except TimeIsUp:
        print("time was up; samples are kept: run the same command again to go on", file=sys.stderr)
        return TIME_IS_UP
    print(f"all {round_options.rounds} rounds are sampled in {folder.path}")
    return 0


def left_behind(folder: Path, asked: "RunRecord", args: Any) -> "tuple[RunRecord, str | None]":
    """What an earlier run has left in its folder: its record, or a new one, and the checkpoint to go on from.

    Raises:
        ValueError: If the folder holds another run, or one that `--resume_from_checkpoint false` would overwrite.
    """
    from accelerate import PartialState

    from .checkpoint import checkpoints, last_complete, step_of
    from .record import RunRecord

    found = RunRecord.load(folder)
    if found is not None:
        if not found.is_finished and not checkpoints(folder) and found.options != asked.options:
            found = None  # it ended before its first update, so nothing is lost; the pool has a guard of its own
        else:
            found.refuse_other(asked, folder)
    given = args.resume_from_checkpoint
    named = None if given is None else str(given).lower()
    if named in ("false", "no", "0") and checkpoints(folder):
        raise ValueError(
            f"`{folder}` holds the checkpoints of a run, which a new one would overwrite. Leave --resume_from_checkpoint out to continue "
            "it, choose another --output_dir, or set --overwrite_output_dir true."
        )
    if named is not None and named not in ("true", "yes", "1", "false", "no", "0"):
        checkpoint: Path | None = Path(str(given))
    else:
        checkpoint = last_complete(folder) if folder.is_dir() else None
    record = asked if found is None else found
    if record.is_over(asked):
        return record, None
    if checkpoint is not None and PartialState().is_main_process:
        print(f"continuing the run in {folder} after update {step_of(checkpoint)}", flush=True)
    return record.with_options(asked), None if checkpoint is None else str(checkpoint)


def load_rows_of(data: TrainingData, args: Any, tokenizer: Any) -> "tuple[Dataset | None, Dataset | None]":
    """The rows to train on, None for those of the pool as they are, and the rows to evaluate on.

    Raises:
        ValueError: If there is something wrong with a data set, or nothing is left to train on.
    """
    from ..rollout.data import held_out_problems, load_from_options, with_template, without_overlap
    from ..rollout.pool import ReferencePool
    from ..rollout.prompts import fitting_prompts

    names = {one.name for one in fields(ProblemOptions)}
    job = DataOptions(
        **{name: getattr(data, name) for name in names},
        max_prompt_length=args.max_prompt_length,
        chat_template_kwargs=args.chat_template_kwargs,
    )
    has_data = data.dataset_name is not None or data.datasets is not None
    if not has_data:  # the evaluation's prompts look like those of the pool
        made = ReferencePool.open(args.pool).manifest.fingerprint
        job.prompt_template = made.get("prompt_template")
        system = made.get("system_prompt")
        if isinstance(system, list) and system:
            logger.warning(
                "The prompts of the pool have %d system prompts; those of the evaluation have this run's.", len(system)
            )
        elif system is not None:
            job.system_prompt = str(system or "")  # an empty list where there is none
    problems = None
    if has_data:
        problems = load_from_options(job, for_evaluation=False, exclude=data.eval_dataset_name)
        problems, _ = fitting_prompts(problems, tokenizer, job)
        print(f"{len(problems)} problems to train on", flush=True)
    if data.eval_dataset_name is None:
        return None if problems is None else _rows(problems, job), None
    columns = data.eval_dataset_name, data.prompt_column, data.gold_column
    system_prompt = None if job.prompt_template else job.system_prompt
    held_out = held_out_problems(*columns, system_prompt, data.eval_limit, data.limit_seed)
    if problems is None:
        pool = ReferencePool.open(args.pool).to_dataset()
        from .dataset import problem_of

        # The whole evaluation set stays out, however few of its problems are asked.
        every = with_template(held_out_problems(*columns), job.prompt_template)
        own = [problem_of(row) for row in pool.to_list()]
        kept = {problem.prompt_id for problem in without_overlap(own, every)[0]}
        rows = pool.select([row for row, problem in enumerate(own) if problem.prompt_id in kept])
        if len(rows) < len(pool):
            print(
                f"{len(pool) - len(rows)} problems of the pool are in `{data.eval_dataset_name}` too, and are left out",
                flush=True,
            )
    else:
        rows = _rows(problems, job)
    held_out, _ = fitting_prompts(with_template(held_out, job.prompt_template), tokenizer, job)
    print(f"{len(held_out)} problems to evaluate on", flush=True)
    return rows, _rows(held_out, job)


def _rows(problems: Any, job: DataOptions) -> "Dataset":
    """Problems as rows for the trainer, with the columns that all of them have."""
    from datasets import Dataset

    from ..rollout.graders import row_of_problem

    rows = [row_of_problem(problem, job.prompt_template is not None) for problem in problems]
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    return Dataset.from_list([{name: row[name] for name in shared} for row in rows])


def _refuse_to_delete_used_rounds(rounds: "RoundFolder", pool: str | None, part: str) -> None:
    """Raise a `ValueError` where --overwrite_output_dir would take rounds away from a sampler, or from the run itself."""
    if part == "trainer" and rounds.adapter(1).is_dir():
        raise ValueError(
            f"`{rounds.path}` holds the rounds of an earlier run, and a sampler may be at work there. End it, delete that folder, and "
            "start both parts again."
        )
    if pool is not None and rounds.path.resolve() in Path(pool).resolve().parents:
        raise ValueError(
            f"--pool `{pool}` is one of the rounds that --overwrite_output_dir would delete. Copy it to another folder first."
        )


def evaluation_of(trainer: "AStarPOTrainer") -> dict[str, float]:
    """The mean of every metric on the evaluation set."""
    return {name: float(value) for name, value in trainer.evaluate().items() if isinstance(value, int | float)}


def results_of(record: "RunRecord", data: TrainingData, args: Any) -> list[Any]:
    """The run's evaluations as its card states them."""
    from ..rollout.rows import source_of
    from .card import Evaluated

    if record.after is None or data.eval_dataset_name is None:
        return []
    source = source_of(data.eval_dataset_name, None, None, for_evaluation=True)
    name = str(source.get("id") or source.get("file"))
    metric = "accuracy" if data.reward_funcs in (None, ["math_reward"]) else "mean_reward"
    how = f"avg@{args.num_generations_eval or 1}, temperature {args.temperature:g}"
    before = None if record.before is None else record.before.get("eval_reward")
    return [Evaluated(name, name, metric, record.after["eval_reward"], before, how)]


def _sources(data: TrainingData) -> list[dict[str, Any]]:
    from ..rollout.data import data_sources

    return data_sources(data, for_evaluation=False)


def _print_end(record: "RunRecord", model: str, data: TrainingData, args: Any, is_adapter: bool, folder: Path) -> None:
    from ..rollout.rows import PRESETS
    from .summary import SERVED, next_lines, print_training_summary

    print_training_summary(record.log, str(folder), record.before, record.after, args.temperature)
    # A preset names its evaluation set, too.
    preset = data.dataset_name if data.dataset_name in PRESETS else None
    evaluation_set = data.eval_dataset_name or preset
    if evaluation_set is None:
        evaluation_set = "HELD_OUT_PROBLEMS"
        print(f"put a file of problems that were not trained on in the place of {evaluation_set}")
    print(SERVED)
    print("next:")
    for line in next_lines(model, str(folder), evaluation_set, args.max_completion_length, is_adapter):
        print(f"  {line}")


def base_dtype(model_config: Any, args: Any) -> str | None:
    """Type of the base weights: as asked for; by itself as stored, and float16 where training is in fp16."""
    return "float16" if args.fp16 and model_config.dtype == "auto" else model_config.dtype


def refused_options() -> dict[str, str]:
    """What a TRL habit may type and this command does not take, with the reasons. `num_iterations` is an option of rounds, which say
    themselves where it means nothing."""
    from .config import BYPASSED, REFUSED, RoundOptions

    reasons = {**REFUSED, **{name: reason for name, (_, reason) in BYPASSED.items()}}
    return {name: reason for name, reason in reasons.items() if name not in {one.name for one in fields(RoundOptions)}}


def main() -> None:
    """Entry point of `astarpo train`."""
    # In a script max_prompt_length may come from a GRPO habit; here the help says what it does.
    warnings.filterwarnings("ignore", message="max_prompt_length")

    def command() -> int:
        return train(
            *parse_command(
                options(),
                section="train",
                prog="astarpo-train",
                description="Train a model on math problems with A*-PO: samples of the reference give V* (stage 1, or a pool made "
                "beforehand), then one on-policy completion per prompt trains a LoRA adapter, or all weights with --use_peft false. The "
                "same command again continues a run.",
                refused=refused_options(),
            )
        )

    run_command(
        command, interrupted="samples and checkpoints are kept; run the same command again to go on from the last one"
    )


if __name__ == "__main__":
    main()
