"""Command-line options of the rollout jobs, as small dataclasses; flag names follow TRL."""

from dataclasses import dataclass, field

SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass
class ModelOptions:
    """The model to sample.

    Args:
        model_name_or_path (`str`):
            Hub id or folder.
        model_revision (`str`, *optional*):
            Branch, tag or commit on the hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights: `auto`, `bfloat16`, `float16` or `float32`.
        adapter (`str`, *optional*):
            Folder or hub id of a LoRA adapter: then the trained policy is sampled, not the model.
    """

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights: auto, bfloat16, float16 or float32."})
    adapter: str | None = field(
        default=None, metadata={"help": "Folder or hub id of a LoRA adapter to sample the model with."}
    )


@dataclass
class DataOptions:
    """The problems and how they are put to the model.

    Args:
        dataset_name (`str`):
            `math`, `gsm8k`, a hub id, or the path of a `.jsonl` or `.parquet` file.
        dataset_config (`str`, *optional*):
            Config name of a hub data set.
        dataset_split (`str`, *optional*):
            Split of a hub data set; `train` for stage 1 and `test` for evaluation when not given.
        prompt_column (`str`, *optional*):
            Column of the question; found by name when not given.
        gold_column (`str`, *optional*):
            Column of the gold answer; found by name when not given.
        system_prompt (`str`, *optional*):
            System message before each question; an empty text leaves it out.
        max_prompt_length (`int`, *optional*):
            Longest prompt allowed, in tokens.
        overlong_prompts (`str`, *optional*, defaults to `"error"`):
            What becomes of longer ones: `error` stops before anything is sampled, `skip` leaves them out and says how many.
        limit (`int`, *optional*):
            Use only the first problems.
    """

    dataset_name: str = field(metadata={"help": "`math`, `gsm8k`, a hub id, or a .jsonl or .parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Config name of a hub data set."})
    dataset_split: str | None = field(
        default=None, metadata={"help": "Split; `train` for stage 1 and `test` for evaluation when not given."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the question; `prompt`, `problem` or `question` when not given."}
    )
    gold_column: str | None = field(
        default=None, metadata={"help": "Column of the gold answer; `gold`, `answer` or `solution` when not given."}
    )
    system_prompt: str = field(
        default=SYSTEM_PROMPT, metadata={"help": "System message before each question; empty leaves it out."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt allowed, in tokens."})
    overlong_prompts: str = field(
        default="error",
        metadata={
            "help": "What becomes of prompts above max_prompt_length: `error` stops before anything is sampled, `skip` "
            "leaves them out.",
            "choices": ["error", "skip"],
        },
    )
    limit: int | None = field(default=None, metadata={"help": "Use only the first problems."})


@dataclass
class EngineOptions:
    """The engine.

    Args:
        engine (`str`, *optional*, defaults to `"vllm"`):
            `vllm` (in this process), `transformers` (where vLLM will not start; several times slower), `server` (a running
            `vllm serve`), or `ray` (Ray Data over one vLLM engine per worker, for many GPUs or nodes).
        server_url (`str`, *optional*):
            Address of the server, such as `http://localhost:8000`.
        adapter_dir (`str`, *optional*):
            Folder that the server sees too, to hand adapters over; memory-backed disk of this machine when not given.
        ray_workers (`int`, *optional*):
            Engines that Ray starts; one per GPU when not given.
        ray_address (`str`, *optional*):
            Ray cluster to join (`auto` for the one of this node); a local one is started when not given.
        max_model_len (`int`, *optional*):
            Most tokens of prompt and completion together; the longest prompt plus the longest completion when not
            given.
        max_num_seqs (`int`, *optional*):
            Most completions decoded at once; the planner's choice when not given, 64 where nothing is planned.
        max_num_batched_tokens (`int`, *optional*):
            Most tokens of one engine step; the planner's choice when not given, vLLM's where nothing is planned.
        kv_cache_gb (`float`, *optional*):
            Size of the KV cache in GiB; the planner's choice when not given, 1 where nothing is planned.
        budget_gb (`float`, *optional*):
            What the run may take of the GPU, in GB (10⁹ bytes): the planner then chooses the sizes that are not given, and
            a run that does not fit is refused before anything is loaded. When not given, what is free on the GPU less 5 %;
            without a GPU nothing is planned.
        policy_link (`str`, *optional*, defaults to `"auto"`):
            How the trainer's policy reaches the engine: `inline` (the engine computes with the trainer's own LoRA
            tensors), `adapter` (LoRA hot-load), `copied` (full weights are written into the engine), or `auto`:
            `inline` for LoRA and `copied` without.
        share_base_weights (`str`, *optional*, defaults to `"auto"`):
            Whether the trainer's frozen weights are the engine's: `on`, `off`, or `auto`, which is on for LoRA on a GPU.
    """

    engine: str = field(
        default="vllm",
        metadata={
            "help": "vllm (in this process), transformers (where vLLM will not start), server (a running `vllm serve`) or "
            "ray (Ray Data over one vLLM engine per worker).",
            "choices": ["vllm", "transformers", "server", "ray"],
        },
    )
    server_url: str | None = field(
        default=None, metadata={"help": "Address of the vLLM server, such as http://localhost:8000."}
    )
    adapter_dir: str | None = field(
        default=None, metadata={"help": "Folder that the server sees too, to hand adapters over."}
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": "Engines that Ray starts; one per GPU when not given."}
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Ray cluster to join, `auto` for this node's; a local one when not given."}
    )
    max_model_len: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and completion; the longest prompt plus completion when not given."},
    )
    max_num_seqs: int | None = field(
        default=None, metadata={"help": "Most completions decoded at once; planned when not given (64 without a GPU)."}
    )
    max_num_batched_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one engine step; planned when not given (vLLM's choice without a GPU)."},
    )
    kv_cache_gb: float | None = field(
        default=None, metadata={"help": "Size of the KV cache in GiB; planned when not given (1 without a GPU)."}
    )
    budget_gb: float | None = field(
        default=None,
        metadata={"help": "What the run may take of the GPU, in GB; what is free less a twentieth when not given."},
    )
    policy_link: str = field(
        default="auto",
        metadata={
            "help": "How the trainer's policy reaches the engine: inline, adapter, copied, or auto (inline for LoRA, "
            "copied without).",
            "choices": ["auto", "inline", "adapter", "copied"],
        },
    )
    share_base_weights: str = field(
        default="auto",
        metadata={
            "help": "Whether the trainer's frozen weights are the engine's: on, off, or auto (on for LoRA on a GPU).",
            "choices": ["auto", "on", "off"],
        },
    )

    @property
    def sequences(self) -> int:
        """Most completions decoded at once."""
        return self.max_num_seqs or 64

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache."""
        return int((1.0 if self.kv_cache_gb is None else self.kv_cache_gb) * 2**30)


@dataclass
class SampleOptions:
    """Stage 1: the reference samples.

    Args:
        output_dir (`str`):
            Folder of the pool; a pool that is there already is continued.
        num_samples (`int`, *optional*, defaults to `8`):
            Reference samples per prompt.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Most tokens of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature; stage 2 must use the same.
        require_eos (`bool`, *optional*, defaults to `True`):
            Whether a completion cut at the length limit earns reward 0; stage 2 must use the same rule.
        seed (`int`, *optional*, defaults to `0`):
            Each sample's seed is a hash of this seed, its prompt and its index.
        eval_dataset_name (`str`, *optional*):
            Leave out the problems that stand in this evaluation set too; a preset leaves out its own by itself.
        verifier_workers (`int`, *optional*, defaults to `1`):
            Grading processes.
        shard_rows (`int`, *optional*, defaults to `256`):
            Samples after which a shard is committed. A kill loses at most the open shard.
        shard_seconds (`float`, *optional*, defaults to `30.0`):
            Seconds after which a shard is committed.
    """

    output_dir: str = field(metadata={"help": "Folder of the pool; one that is there already is continued."})
    num_samples: int = field(default=8, metadata={"help": "Reference samples per prompt."})
    max_completion_length: int = field(default=1024, metadata={"help": "Most tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; stage 2 must use the same."})
    require_eos: bool = field(
        default=True, metadata={"help": "Whether a completion cut at the length limit earns reward 0."}
    )
    seed: int = field(default=0, metadata={"help": "Run seed; each sample's seed is a hash of it."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Leave out problems that stand in this evaluation set too; presets do so by themselves."},
    )
    verifier_workers: int = field(default=1, metadata={"help": "Grading processes."})
    shard_rows: int = field(default=256, metadata={"help": "Samples after which a shard is committed."})
    shard_seconds: float = field(default=30.0, metadata={"help": "Seconds after which a shard is committed."})


@dataclass
class EvaluateOptions:
    """Evaluation of a model or an adapter.

    Args:
        output (`str`):
            JSON file for the report.
        num_samples (`int`, *optional*, defaults to `1`):
            Samples per problem, the k of avg@k and pass@k.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; 0 is greedy and allows one sample only.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Most tokens of a completion.
        require_eos (`bool`, *optional*, defaults to `True`):
            Whether a completion cut at the length limit counts as wrong.
        seed (`int`, *optional*, defaults to `0`):
            Run seed.
        show (`int`, *optional*, defaults to `0`):
            Print this many problems with their completions and grades.
        verifier_workers (`int`, *optional*, defaults to `1`):
            Grading processes.
    """

    output: str = field(metadata={"help": "JSON file for the report."})
    num_samples: int = field(default=1, metadata={"help": "Samples per problem, the k of avg@k and pass@k."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    max_completion_length: int = field(default=1024, metadata={"help": "Most tokens of a completion."})
    require_eos: bool = field(default=True, metadata={"help": "Whether a completion cut at the limit is wrong."})
    seed: int = field(default=0, metadata={"help": "Run seed."})
    show: int = field(default=0, metadata={"help": "Print this many problems with completions and grades."})
    verifier_workers: int = field(default=1, metadata={"help": "Grading processes."})
