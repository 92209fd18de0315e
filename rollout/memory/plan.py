"""What a run will hold in GPU memory, phase by phase, and the sizes that make it fit."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from . import formulas
from .shape import ModelShape

STAGE1, GENERATE, SCORE, BACKWARD = "stage 1", "generate", "score", "backward"
PHASES = (STAGE1, GENERATE, SCORE, BACKWARD)
TRAINING = (GENERATE, SCORE, BACKWARD)
BLOCK = 16
"""Tokens of a block of vLLM's KV cache on GPUs."""
MICRO_BATCHES = (32, 16, 8, 4, 2, 1)
SEQUENCES = (64, 32, 16, 8)
"""Completions decoded at once, from what is enough on a small GPU down to what is hardly worth an engine."""
MORE_SEQUENCES = (256, 128)
"""What is taken when the trainer has all it wants and there is still room."""


@dataclass(frozen=True, slots=True)
class RunSizes:
    """What a run is planned for; what is None is chosen.

    Attributes:
        sequence (`int`):
            Most tokens of prompt and completion.
        completion (`int`):
            Most tokens of a completion.
        rank (`int`, *optional*):
            Rank of the LoRA adapter; None trains all weights.
        targets (`tuple[str, ...]`, *optional*):
            Names of the layers with an adapter; None is all linear ones.
        width (`int`):
            Bytes of a base weight.
        policy_link (`str`):
            `inline`, `adapter` or `copied`.
        share_base_weights (`bool`):
            Whether engine and trainer use one copy of the base weights.
        gradient_checkpointing (`bool`, *optional*):
            Whether blocks are computed again in the backward pass.
        micro_batch (`int`, *optional*):
            Completions of one forward and backward pass.
        batch (`int`, *optional*):
            `per_device_train_batch_size`, which the trainer divides into passes of `micro_batch`.
        max_num_seqs (`int`, *optional*):
            Most completions decoded at once.
        max_num_batched_tokens (`int`, *optional*):
            Most tokens of one engine step.
        kv_cache_bytes (`int`, *optional*):
            Size of the KV cache.
        trains (`bool`):
            Whether a trainer is there; a rollout job has none.
        cuda_graphs (`bool`):
            Whether the engine replays decoding steps as CUDA graphs.
        engine (`str`):
            `vllm`, or `transformers`, which samples the trainer's own model.
        in_rounds (`bool`):
            Whether the engine is ended while the trainer works, so that either may take what the other one does not hold then.
    """

    sequence: int
    completion: int
    rank: int | None = 16
    targets: tuple[str, ...] | None = None
    width: int = 2
    policy_link: str = "inline"
    share_base_weights: bool = False
    gradient_checkpointing: bool | None = None
    micro_batch: int | None = None
    batch: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    trains: bool = True
    cuda_graphs: bool = False
    engine: str = "vllm"
    in_rounds: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to choose."""
        chosen = (self.gradient_checkpointing, self.micro_batch, self.max_num_seqs, self.max_num_batched_tokens)
        return None not in (*chosen, self.kv_cache_bytes)


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that is held: its bytes and the phases in which it is there."""

    name: str
    bytes: int
    phases: tuple[str, ...] = PHASES


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run holds.

    Attributes:
        sizes (`RunSizes`):
            With everything chosen.
        lines (`tuple[Line, ...]`):
            What is held.
        budget (`int`):
            Bytes that it may take.
        advice (`str`):
            The cheapest change that would fit, where it does not.
    """

    sizes: RunSizes
    lines: tuple[Line, ...]
    budget: int
    advice: str = field(default="")

    def total(self, phase: str) -> int:
        """Bytes held in a phase."""
        return sum(line.bytes for line in self.lines if phase in line.phases)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return self.total(self.largest_phase)

    @property
    def largest_phase(self) -> str:
        """The phase that decides the peak."""
        return max(PHASES, key=self.total)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak <= self.budget

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, as `astarpo-plan --json` prints it."""
        return {
            "peak_gb": round(self.peak / 1e9, 3),
            "budget_gb": round(self.budget / 1e9, 3),
            "fits": self.fits,
            "advice": self.advice,
            "phases_gb": {phase: round(self.total(phase) / 1e9, 3) for phase in PHASES},
            "lines": [
                {"name": line.name, "gb": round(line.bytes / 1e9, 4), "phases": line.phases} for line in self.lines
            ],
            "chosen": asdict(self.sizes),
        }


def describe(plan: Plan) -> str:
    """What a plan chose, in one line."""
    chosen = plan.sizes
    words = [
        f"peak {plan.peak / 1e9:.1f} GB of {plan.budget / 1e9:.1f} GB ({plan.largest_phase})",
        f"{chosen.max_num_seqs} completions decoded at once",
        f"{chosen.max_num_batched_tokens} tokens in an engine step",
        f"KV cache {(chosen.kv_cache_bytes or 0) / 1e9:.2f} GB",
    ]
    if chosen.trains:
        own = chosen.engine == "transformers"
        checkpointed = "with" if chosen.gradient_checkpointing else "without"
        words.append(f"{chosen.micro_batch} completions trained at once, {checkpointed} gradient checkpointing")
        is_one = chosen.share_base_weights or (own and chosen.rank is not None)
        words.append("one copy of the base weights" if is_one else "two copies of the base weights")
        words.append("the trainer's own model is sampled" if own else f"policy link {chosen.policy_link}")
        if chosen.in_rounds:
            words.append("the engine is ended while the trainer works")
    return ", ".join(words)


def training_sizes(
    prompt: int,
    completion: int,
    *,
    width: int,
    rank: int | None,
    targets: Collection[str] | str | None = None,
    policy_link: str = "auto",
    share_base_weights: bool = True,
    gradient_checkpointing: bool | None = None,
    batch: int | None = None,
    is_one_pass: bool = False,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    kv_cache_gb: float | None = None,
    cuda_graphs: bool = False,
    engine: str = "vllm",
    in_rounds: bool = False,
) -> RunSizes:
    """The sizes of a training run, from the options as users give them. What is None is left to the planner.

    Args:
        prompt (`int`):
            Most tokens of a prompt.
        completion (`int`):
            Most tokens of a completion; of an episode, all its turns and the follow-up prompts between them.
        width (`int`):
            Bytes of a base weight.
        rank (`int`, *optional*):
            Rank of the LoRA adapter; None trains all weights.
        targets (`Collection[str]` or `str`, *optional*):
            Names of the layers with an adapter; all linear ones when not given, or given as one string such as
            `"all-linear"`.
        policy_link (`str`, *optional*, defaults to `"auto"`):
            `inline`, `adapter`, `copied`, or `auto`: `inline` with an adapter and `copied` without.
        share_base_weights (`bool`, *optional*, defaults to `True`):
            Whether engine and trainer may hold one copy of the base weights. Without an adapter they never do.
        gradient_checkpointing (`bool`, *optional*):
            Whether blocks are computed again in the backward pass.
        batch (`int`, *optional*):
            `per_device_train_batch_size`.
        is_one_pass (`bool`, *optional*, defaults to `False`):
            Whether a micro-batch must go through the model whole. It must where several processes train, because all of
            them have to make the same passes.
        max_model_len (`int`, *optional*):
            Most tokens of prompt and completion together; the sum of the two when not given.
        max_num_seqs (`int`, *optional*):
            Most completions decoded at once.
        max_num_batched_tokens (`int`, *optional*):
            Most tokens of one engine step.
        kv_cache_gb (`float`, *optional*):
            Size of the KV cache in GB.
        cuda_graphs (`bool`, *optional*, defaults to `False`):
            Whether the engine replays decoding steps as CUDA graphs.
        engine (`str`, *optional*, defaults to `"vllm"`):
            `vllm`, or `transformers`, which samples the trainer's own model.
        in_rounds (`bool`, *optional*, defaults to `False`):
            Whether the engine is ended while the trainer works.

    Raises:
        ValueError: If a length or the rank is below 1.
    """
    if min(prompt, completion) < 1 or (rank is not None and rank < 1):
        raise ValueError("max_prompt_length, max_completion_length and lora_r must be at least 1.")
    return RunSizes(
        max_model_len or prompt + completion,
        completion,
        rank,
        targets=None if targets is None or isinstance(targets, str) else tuple(targets),
        width=width,
        policy_link=policy_link if policy_link != "auto" else "copied" if rank is None else "inline",
        share_base_weights=share_base_weights and rank is not None,
        gradient_checkpointing=gradient_checkpointing,
        micro_batch=batch if is_one_pass else None,
        batch=batch,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=None if kv_cache_gb is None else int(kv_cache_gb * 10**9),
        cuda_graphs=cuda_graphs,
        engine=engine,
        in_rounds=in_rounds,
    )


def lines(shape: ModelShape, sizes: RunSizes) -> tuple[Line, ...]:
    """Everything that a run of these sizes holds; nothing in them may be open."""
    if not sizes.is_complete:
        raise ValueError("Sizes are still open. Use `plan_run`, which chooses them.")
    engine = _transformers(shape, sizes) if sizes.engine == "transformers" else _vllm(shape, sizes)
    held = [*_weights(shape, sizes), *engine, *(_trainer(shape, sizes) if sizes.trains else ())]
    return tuple(line for line in held if line.bytes)


def _weights(shape: ModelShape, sizes: RunSizes) -> Iterator[Line]:
    yield Line("CUDA context and kernels", formulas.CONTEXT)
    base = formulas.weights(shape, sizes.width)
    if not sizes.trains:
        yield Line("weights of the engine", base)
        return
    has_own = sizes.engine != "transformers"
    if sizes.rank is None:
        if has_own:
            yield Line("weights of the engine", base)
        yield Line("weights of the policy (float32)", formulas.adapter(shape.parameters))
        yield Line("weights of the reference", base)
        return
    is_one = sizes.share_base_weights or not has_own
    yield Line("base weights" if is_one else "base weights of the engine", base, PHASES if is_one else _there(sizes))
    if not is_one:
        yield Line("base weights of the trainer", base)


def _there(sizes: RunSizes) -> tuple[str, ...]:
    """The phases in which what belongs to the engine is there."""
    return (STAGE1, GENERATE) if sizes.in_rounds else PHASES


def _transformers(shape: ModelShape, sizes: RunSizes) -> Iterator[Line]:
    """The engine that samples the trainer's own model: its cache lives while it samples."""
    sampling = (STAGE1, GENERATE)
    assert sizes.max_num_seqs and sizes.kv_cache_bytes is not None
    tokens = sizes.max_num_seqs * sizes.sequence
    yield Line(f"KV cache ({tokens:,} tokens, {sizes.max_num_seqs} rows)", sizes.kv_cache_bytes, sampling)
    reading = min(formulas.PASS_TOKENS, sizes.max_num_seqs * (sizes.sequence - sizes.completion))
    passing = formulas.scoring_activations(shape, reading) + formulas.cache_copy(shape, reading, sizes.width)
    yield Line("reading prompts", passing, sampling)
    yield Line("sampler's logits", formulas.sampler(shape, sizes.max_num_seqs), sampling)


def _vllm(shape: ModelShape, sizes: RunSizes) -> Iterator[Line]:
    sampling = (STAGE1, GENERATE)
    assert sizes.max_num_batched_tokens and sizes.max_num_seqs and sizes.kv_cache_bytes is not None
    tokens = sizes.kv_cache_bytes // formulas.key_values_per_token(shape, sizes.width)
    there = _there(sizes)
    yield Line(f"KV cache ({tokens:,} tokens, {sizes.max_num_seqs} sequences)", sizes.kv_cache_bytes, there)
    if sizes.trains and sizes.rank is not None and sizes.policy_link == "adapter":
        yield Line("engine's adapter slot", formulas.adapter_slot(shape, sizes.rank, sizes.width), there)
    if sizes.trains and sizes.rank is not None and sizes.policy_link == "inline":
        parameters = formulas.adapter_parameters(shape, sizes.rank, sizes.targets)
        copies = formulas.inline_copies(parameters, sizes.width)
        yield Line("adapter in the engine's type", copies, tuple(phase for phase in TRAINING if phase in there))
    yield Line(
        "engine's activations",
        formulas.engine_activations(shape, sizes.max_num_batched_tokens, sizes.width),
        sampling,
    )
    if sizes.cuda_graphs:
        yield Line("CUDA graphs of decoding", formulas.GRAPHS, there)
    yield Line("sampler's logits", formulas.sampler(shape, sizes.max_num_seqs), sampling)


def _trainer(shape: ModelShape, sizes: RunSizes) -> Iterator[Line]:
    assert sizes.micro_batch and sizes.gradient_checkpointing is not None
    if sizes.rank is None:
        trained = shape.parameters
    else:
        trained = formulas.adapter_parameters(shape, sizes.rank, sizes.targets)
        yield Line("adapter (float32)", formulas.adapter(trained))
    yield Line("Adam's moments", formulas.optimizer(trained), TRAINING)
    tokens, scored = sizes.micro_batch * sizes.sequence, sizes.micro_batch * sizes.completion
    used, rank = sizes.gradient_checkpointing, sizes.rank or 0
    head, scoring = formulas.head(shape, scored, sizes.width), formulas.scoring_activations(shape, tokens)
    yield Line("a tile of logits, or a block", max(head, scoring), (SCORE,))
    kept = {is_on: formulas.saved_activations(shape, tokens, rank, is_on) for is_on in (True, False)}
    other = f"{kept[not used] / 1e9:.2f} {'without' if used else 'with'} checkpointing"
    yield Line(f"activations kept for the backward pass ({other})", kept[used], (BACKWARD,))
    copies = 0 if used else formulas.autocast_copies(trained)  # with checkpointing they are made again, block by block
    yield Line("trained weights in 16 bit", copies, (BACKWARD,))
    passing = formulas.passing_activations(shape, tokens, rank, used)
    if sizes.rank is None:
        passing += formulas.embedding_gradients(shape)
    yield Line("a tile of logits, or a block's gradients", max(head, passing), (BACKWARD,))
    gradients = formulas.gradients(trained)
    yield Line("gradients of earlier micro-batches", gradients, (BACKWARD,))
    # They come as what is kept goes: what they take beyond that.
    beyond = gradients + passing - (kept[used] + copies + max(head, passing))
    yield Line("gradients of this micro-batch, beyond what it frees", max(0, beyond), (BACKWARD,))


def plan_run(shape: ModelShape, sizes: RunSizes, budget: int) -> Plan:
    """Choose what is open in `sizes`, as generously as the budget allows, and say what the run then holds.

    Where nothing fits, the smallest sizes are planned, and the plan's `advice` names the cheapest change that would fit.
    """
    plan = _largest(shape, sizes, budget)
    if plan.fits:
        return plan
    return replace(plan, advice=_advice(shape, sizes, budget))


def _largest(shape: ModelShape, sizes: RunSizes, budget: int) -> Plan:
    """The first candidate that fits, with as many sequences as still fit then; or else the last and smallest."""
    plan = None
    for candidate in _candidates(shape, sizes):
        plan = Plan(candidate, lines(shape, candidate), budget)
        if plan.fits:
            return _with_more_sequences(shape, sizes, plan)
    assert plan is not None
    return plan


def _candidates(shape: ModelShape, sizes: RunSizes) -> Iterator[RunSizes]:
    """From large to small: smaller micro-batches before computing blocks again, that before fewer sequences."""
    checkpointed = (False, True) if sizes.gradient_checkpointing is None else (sizes.gradient_checkpointing,)
    for at_once in SEQUENCES if sizes.max_num_seqs is None else (sizes.max_num_seqs,):
        for is_checkpointed in checkpointed:
            for micro_batch in _micro_batches(sizes):
                yield _completed(shape, sizes, at_once, is_checkpointed, micro_batch)


def _micro_batches(sizes: RunSizes) -> tuple[int, ...]:
    if sizes.micro_batch is not None:
        return (sizes.micro_batch,)
    limit = MICRO_BATCHES[0] if sizes.batch is None else min(sizes.batch, MICRO_BATCHES[0])
    return (limit, *(count for count in MICRO_BATCHES if count < limit))


def _with_more_sequences(shape: ModelShape, sizes: RunSizes, plan: Plan) -> Plan:
    chosen = plan.sizes
    assert chosen.max_num_seqs and chosen.micro_batch and chosen.gradient_checkpointing is not None
    if sizes.max_num_seqs is not None or chosen.max_num_seqs < SEQUENCES[0]:
        return plan
    for at_once in MORE_SEQUENCES:
        more = _completed(shape, sizes, at_once, chosen.gradient_checkpointing, chosen.micro_batch)
        larger = Plan(more, lines(shape, more), plan.budget)
        if larger.fits:
            return larger
    return plan


def _completed(shape: ModelShape, sizes: RunSizes, at_once: int, is_checkpointed: bool, micro_batch: int) -> RunSizes:
    cached = sizes.sequence * at_once
    if sizes.engine == "vllm":
        cached = (-(-sizes.sequence // BLOCK) * at_once + 1) * BLOCK  # vLLM keeps one block to itself
    cache = cached * formulas.key_values_per_token(shape, sizes.width)
    return replace(
        sizes,
        max_num_seqs=at_once,
        gradient_checkpointing=is_checkpointed,
        micro_batch=micro_batch,
        max_num_batched_tokens=sizes.max_num_batched_tokens or max(2048, sizes.sequence),
        kv_cache_bytes=cache
        if sizes.kv_cache_bytes is None or sizes.engine == "transformers"
        else sizes.kv_cache_bytes,
    )


def _advice(shape: ModelShape, sizes: RunSizes, budget: int) -> str:
    """The cheapest change that would fit: first what costs nothing, then speed, then what the run is about."""
    for words, change in _changes(sizes):
        if _largest(shape, replace(sizes, **change), budget).fits:
            return words
    everything: dict[str, Any] = {}
    for _, change in _changes(sizes):
        everything |= change
    least = _largest(shape, replace(sizes, **everything), budget).peak
    return f"no single change fits: even with all of them {least / 1e9:.1f} GB are needed; take a smaller model"


def _changes(sizes: RunSizes) -> Iterator[tuple[str, dict[str, Any]]]:
    if sizes.trains and sizes.rank is not None and not sizes.share_base_weights and sizes.engine == "vllm":
        yield "share_base_weights=on", {"share_base_weights": True}
    if sizes.trains and sizes.policy_link == "adapter" and sizes.engine == "vllm":
        yield "policy_link=inline", {"policy_link": "inline"}
    if sizes.trains and sizes.gradient_checkpointing is False:
        yield "gradient_checkpointing=true", {"gradient_checkpointing": True}
    if sizes.trains and sizes.micro_batch is not None and sizes.micro_batch > 1:
        yield "per_device_train_batch_size=1", {"micro_batch": 1, "batch": 1}
    if sizes.kv_cache_bytes is not None:
        yield "leave kv_cache_gb to the planner", {"kv_cache_bytes": None}
    if sizes.max_num_seqs is not None and sizes.max_num_seqs > SEQUENCES[-1]:
        yield f"max_num_seqs={SEQUENCES[-1]}", {"max_num_seqs": SEQUENCES[-1]}
    if sizes.trains and sizes.rank is None:
        yield "train a LoRA adapter (use_peft=true)", {"rank": 16}
    for factor in (2, 4):
        completion = sizes.completion // factor
        shorter = {"completion": completion, "sequence": sizes.sequence - sizes.completion + completion}
        yield f"max_completion_length={completion}", shorter
