"""Options of the rollout commands, as plain data. The names of the flags follow TRL."""

from dataclasses import dataclass, field
from typing import Any

SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."


def refuse_below(options: Any, least: float, *names: str, is_open: bool = False) -> None:
    """Raise a `ValueError` for the first of some numbers that is below the least one allowed; None is no number.

    Args:
        options (`Any`):
            The dataclass that has them.
        least (`float`):
            The least number allowed; with `is_open` all allowed ones are above it.
        *names (`str`):
            The fields.
        is_open (`bool`, *optional*, defaults to `False`):
            Whether `least` itself is too little.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not (value > least if is_open else value >= least):
            raise ValueError(f"`--{name}` must be {'above' if is_open else 'at least'} {least:g}, got {value}.")


@dataclass
class ModelOptions:
    """The model to sample."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights; auto: as stored.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder or hub id of a LoRA adapter: samples the trained policy instead of the model."},
    )


@dataclass
class ProblemOptions:
    """The problems, and how they are put to the model."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A preset (math, gsm8k; to evaluate also math500, aime24, aime25, amc23, minerva, olympiadbench), a hub id, or a .jsonl, "
            ".csv or .parquet file."
        },
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "A mixture of several, each PATH=WEIGHT (or all without a weight); in a recipe as TRL's `datasets:`, with path, name, "
            "split and weight."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Config name of a data set on the hub."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split of a data set on the hub. Default: train; test for an evaluation."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the question. Default: `prompt`, `problem` or `question`."}
    )
    gold_column: str | None = field(
        default=None,
        metadata={"help": "Column of the gold answer. Default: `gold`, `answer`, `final_answer` or `solution`."},
    )
    system_prompt: str = field(
        default=SYSTEM_PROMPT, metadata={"help": "System message before each question; empty for none."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "For base models: the whole prompt as plain text, with {question} where the question goes. Neither the chat template "
            "nor the system message is used then."
        },
    )
    overlong_prompts: str = field(
        default="error",
        metadata={
            "help": "How to handle prompts longer than max_prompt_length: `error` stops before anything is sampled, `skip` "
            "leaves them out and says how many.",
            "choices": ["error", "skip"],
        },
    )
    limit: int | None = field(
        default=None,
        metadata={
            "help": "Use only so many problems: a sample, spread over subjects and levels where they are known."
        },
    )
    limit_seed: int = field(default=0, metadata={"help": "Seed of that sample."})

    def __post_init__(self):
        refuse_below(self, 1, "limit")


@dataclass
class DataOptions(ProblemOptions):
    """The problems of a job that samples."""

    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt allowed, in tokens."})
    chat_template_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the chat template, as JSON, such as '{\"enable_thinking\": false}'. Stage 1 and 2 must agree."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        refuse_below(self, 1, "max_prompt_length")


@dataclass
class EngineOptions:
    """The inference engine."""

    engine: str = field(
        default="auto",
        metadata={
            "help": "vllm (in this process), transformers (several times slower), server (a running `vllm serve`), ray (one vLLM engine per "
            "worker, for many GPUs or nodes), or auto (vllm where it can run, else transformers).",
            "choices": ["auto", "vllm", "transformers", "server", "ray"],
        },
    )
    server_url: str | None = field(
        default=None, metadata={"help": "Address of the vLLM server, such as http://localhost:8000."}
    )
    adapter_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for adapters that the server can read too. Default: memory-backed disk of this machine."
        },
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": "Number of engines that Ray starts. Default: one per GPU."}
    )
    ray_address: str | None = field(
        default=None,
        metadata={"help": "Ray cluster to join, `auto` for this node's. Default: a local cluster is started."},
    )
    max_model_len: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of prompt and completion. Default: the longest prompt plus the longest completion."
        },
    )
    max_num_seqs: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of sequences decoded at once. Default: set by the planner; 64 without a GPU."
        },
    )
    max_num_batched_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens in one engine step. Default: set by the planner; vLLM's default without a GPU."
        },
    )
    kv_cache_gb: float | None = field(
        default=None,
        metadata={"help": "Size of the KV cache in GB (10^9 bytes). Default: set by the planner; 1 without a GPU."},
    )
    budget_gb: float | None = field(
        default=None,
        metadata={
            "help": "GPU memory that the run may use, in GB (10^9 bytes). The planner then sets every size that you leave out, "
            "and refuses a run that does not fit. Default: free GPU memory minus 5 %%."
        },
    )
    policy_link: str = field(
        default="auto",
        metadata={
            "help": "How updated weights reach the engine in training: inline (the engine computes with the trainer's own LoRA "
            "tensors), adapter (the adapter is loaded into the engine), copied (all weights are written into the engine), or "
            "auto (inline for LoRA, copied without).",
            "choices": ["auto", "inline", "adapter", "copied"],
        },
    )
    cuda_graphs: str = field(
        default="off",
        metadata={
            "help": "on: replay decoding steps as CUDA graphs, which a GPU decodes faster with and which take 0.2 to 0.6 GB. Not yet run "
            "on a GPU, so off by default.",
            "choices": ["off", "on"],
        },
    )
    share_base_weights: str = field(
        default="auto",
        metadata={
            "help": "Whether trainer and engine share one copy of the frozen weights: on, off, or auto (on for LoRA on a GPU).",
            "choices": ["auto", "on", "off"],
        },
    )

    def __post_init__(self):
        refuse_below(self, 1, "max_model_len", "max_num_seqs", "max_num_batched_tokens", "ray_workers")
        refuse_below(self, 0, "kv_cache_gb", "budget_gb", is_open=True)

    @property
    def sequences(self) -> int:
        """Maximum number of sequences decoded at once, where nothing was planned."""
        return self.max_num_seqs or 64

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache in bytes."""
        return int((1.0 if self.kv_cache_gb is None else self.kv_cache_gb) * 10**9)


@dataclass
class EpisodeOptions:
    """What the model is asked to do, turn by turn. `episode_kind` in `pag.py` makes an [`EpisodeKind`] of it."""

    episode: str = field(
        default="single",
        metadata={
            "help": "single (a completion), pag (an attempt, its verification by the same model, and a revision where that says "
            "`wrong`; arXiv 2506.10406), or a kind of your own as module:KIND."
        },
    )
    verify_prompt: str | None = field(
        default=None, metadata={"help": "PAG: the prompt that asks to check the attempt. Default: PAG's own."}
    )
    revise_prompt: str | None = field(
        default=None, metadata={"help": "PAG: the prompt that asks for another solution. Default: PAG's own."}
    )
    verdict_parser: str = field(
        default="strict",
        metadata={
            "help": 'PAG: official (the verification ends with "The answer is correct." or "The answer is wrong.", as in PAG\'s '
            "code), strict (and says so only once) or lenient (it says so anywhere). Their metrics cannot be compared.",
            "choices": ["strict", "official", "lenient"],
        },
    )


@dataclass
class SampleOptions:
    """Stage 1: the reference samples."""

    output_dir: str = field(metadata={"help": "Folder of the pool. A pool that is already there is continued."})
    num_samples: int = field(default=8, metadata={"help": "Number of reference samples per prompt."})
    max_completion_length: int = field(
        default=1024, metadata={"help": "Maximum number of tokens of a completion; of one turn in episodes."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature. Stage 2 must use the same."})
    require_eos: bool = field(
        default=True,
        metadata={
            "help": "Give reward 0 to an answer that was truncated at the length limit. Stage 2 must do the same."
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the run. A sample's seed is a hash of it, its prompt and its index."}
    )
    exclude_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Leave out the problems that also appear in this evaluation set. Default: a preset's own evaluation set."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Earlier name of exclude_dataset_name. `astarpo train` evaluates on it."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions as module.function, found from the present folder too. Default: math_reward, the grader."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of the reward functions. Default: all 1."}
    )
    verifier_workers: int = field(default=1, metadata={"help": "Number of grading processes."})
    logprobs: bool = field(
        default=False,
        metadata={
            "help": "Keep the log-prob of every sampled token, 4 bytes each, for training on the samples themselves."
        },
    )
    shard_rows: int = field(
        default=256, metadata={"help": "Commit a shard after this many rows. A kill loses at most the open shard."}
    )
    shard_seconds: float = field(default=30.0, metadata={"help": "Commit a shard after this many seconds."})

    def __post_init__(self):
        refuse_below(self, 1, "num_samples", "max_completion_length", "verifier_workers", "shard_rows")
        refuse_below(self, 0, "shard_seconds")
        refuse_below(self, 0, "temperature")


@dataclass
class EvaluateOptions:
    """Evaluation of a model or an adapter."""

    output: str = field(
        metadata={"help": "JSON file for the report. A page with all samples is written beside it, as .html."}
    )
    num_samples: int = field(default=1, metadata={"help": "Number of samples per problem, the k of avg@k and pass@k."})
    temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature. 0 is greedy, and allows only one sample per problem."}
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Sample from the likeliest tokens whose chances add up to this. Only here: training knows no top_p."
        },
    )
    max_completion_length: int = field(
        default=1024, metadata={"help": "Maximum number of tokens of a completion; of one turn in episodes."}
    )
    require_eos: bool = field(
        default=True, metadata={"help": "Count an answer that was truncated at the length limit as wrong."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the run."})
    show: int = field(default=0, metadata={"help": "Print the samples of this many problems with their grades."})
    verifier_workers: int = field(default=1, metadata={"help": "Number of grading processes."})

    def __post_init__(self):
        refuse_below(self, 1, "num_samples", "max_completion_length", "verifier_workers")
        refuse_below(self, 0, "temperature", "show")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`--top_p` must be above 0 and at most 1, got {self.top_p:g}.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"Greedy decoding gives the same sample {self.num_samples} times. Set --temperature above 0 (say 1.0) to draw several samples, "
                "or --num_samples 1."
            )
