"""A vLLM server as an engine: `vllm serve` anywhere, spoken to by its completions API with token ids both ways."""

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import httpx

from ..options import EngineOptions
from .interface import (
    MOST_FAILURES,
    Completion,
    EngineError,
    Failure,
    FinishReason,
    PolicyLink,
    SamplingSettings,
    stop_token_ids,
)

ATTEMPTS = 4
"""How often a request is sent when the server cannot be reached or is overloaded; the waits double from one second."""
_TRY_AGAIN = (429, 502, 503, 504)


class _ServerFault(Failure):
    """A failure that may be the server's, not the prompt's."""


class ServerEngine:
    """Samples completions from a running vLLM server.

    Args:
        model (`str`):
            Hub id or folder of the model, which the server must serve.
        options ([`EngineOptions`]):
            `server_url`; `max_num_seqs` requests are kept open at once.
        revision (`str`, *optional*):
            Branch, tag or commit of the tokenizer.

    Raises:
        ValueError: If no server answers, or it serves another model.
    """

    def __init__(self, model: str, options: EngineOptions, *, revision: str | None = None):
        from transformers import AutoTokenizer

        self._url = server_url(options)
        self.max_num_seqs = options.sequences
        self._client = self._new_client()
        self.stop_token_ids = stop_token_ids(model, revision, AutoTokenizer.from_pretrained(model, revision=revision))
        served = ask_server(self._client, "/v1/models", "data")
        card = next((card for card in served if model in (card["id"], card.get("root"))), None)
        if card is None:
            raise ValueError(
                f"The server at {self._url} serves {', '.join(card['id'] for card in served)}, not `{model}`. Give the path or "
                "id that `vllm serve` was started with as --model_name_or_path."
            )
        self._name = str(card["id"])
        self.max_model_len = int(card["max_model_len"])

    @property
    def kv_cache_tokens(self) -> None:
        """None: the server does not say how much its KV cache holds."""

    def _new_client(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=self.max_num_seqs, max_keepalive_connections=self.max_num_seqs)
        return httpx.Client(base_url=self._url, timeout=httpx.Timeout(30, read=None), limits=limits)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: SamplingSettings,
        policy: PolicyLink | None = None,
    ) -> Iterator[tuple[int, Completion | Failure]]:
        """Sample one completion per prompt; see [`Engine.stream`]."""
        if policy is not None:
            policy.sync()
        with policy.active() if policy is not None else nullcontext() as adapter:
            bodies = (
                (i, self._body(p, s, settings, adapter)) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
            )
            yield from self._run(bodies, prompts)

    def _run(
        self, bodies: Iterator[tuple[int, dict[str, Any]]], prompts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Completion | Failure]]:
        threads = ThreadPoolExecutor(self.max_num_seqs, thread_name_prefix="astarpo-request")
        stopped = threading.Event()
        running: dict[Future[Completion | Failure], int] = {}
        streak: list[int] = []
        try:
            while True:
                while len(running) < 2 * self.max_num_seqs and (item := next(bodies, None)) is not None:
                    running[threads.submit(self._complete, item[1], stopped)] = item[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, completion = running.pop(future), future.result()
                    if isinstance(completion, Completion):
                        streak = []
                    elif isinstance(completion, _ServerFault):
                        streak.append(index)
                    # Of different prompts: one that makes the server fail may have many samples.
                    if len({tuple(prompts[i]) for i in streak}) == MOST_FAILURES and isinstance(completion, Failure):
                        raise EngineError(
                            f"The server at {self._url} failed {MOST_FAILURES} times in a row. The last time: {completion.reason}",
                            tuple(streak),
                        )
                    yield index, completion
        finally:
            # Requests that the server is decoding are waited for: they cannot be called back.
            stopped.set()
            threads.shutdown(wait=True, cancel_futures=True)

    def _body(
        self, prompt: Sequence[int], seed: int, settings: SamplingSettings, adapter: str | None
    ) -> dict[str, Any]:
        return {
            "model": adapter or self._name,
            "prompt": list(prompt),
            "max_tokens": settings.max_completion_length,
            "temperature": settings.temperature,
            "seed": seed if settings.temperature > 0 else None,
            # The server mixes in the model's own generation config unless it is told otherwise.
            "top_p": settings.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": self.stop_token_ids,
            "logprobs": 0 if settings.logprobs else None,
            "return_token_ids": True,
            "add_special_tokens": False,
        }

    def _complete(self, body: dict[str, Any], stopped: threading.Event) -> Completion | Failure:
        if stopped.is_set():
            return Failure("stopped")
        try:
            answer = self._post("/v1/completions", body, stopped)
        except httpx.HTTPError as error:
            return _ServerFault(f"{type(error).__name__}: {error}")
        if answer.status_code != 200:
            kind = Failure if 400 <= answer.status_code < 500 else _ServerFault
            return kind(f"HTTP {answer.status_code}: {_message(answer)}")
        choice = answer.json()["choices"][0]
        if choice.get("token_ids") is None or choice["finish_reason"] not in ("stop", "length"):
            return Failure(f"an answer without token ids, finish_reason {choice['finish_reason']!r}")
        logprobs = tuple(choice["logprobs"]["token_logprobs"]) if choice.get("logprobs") else ()
        return Completion(tuple(choice["token_ids"]), logprobs, FinishReason(choice["finish_reason"]))

    def _post(self, path: str, body: dict[str, Any], stopped: threading.Event | None = None) -> httpx.Response:
        client = self._client
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                answer = client.post(path, json=body)
                if answer.status_code not in _TRY_AGAIN or last:
                    return answer
            except httpx.TransportError:
                if last or (stopped is not None and stopped.is_set()):
                    raise
            time.sleep(2**attempt)
        raise AssertionError

    def load_adapter(self, version: int, path: str) -> str:
        """Load an adapter from a path that the server sees too; returns the name that requests must carry."""
        name = f"astarpo-{uuid.uuid4().hex[:12]}-{version}"
        answer = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if answer.status_code == 404 and answer.text == '{"detail":"Not Found"}':  # there is no such address
            raise ValueError(
                f"The server at {self._url} takes no adapters. Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and `vllm "
                "serve MODEL --enable-lora --max-lora-rank RANK`."
            )
        if answer.status_code != 200:
            raise ValueError(
                f"The server at {self._url} refused the adapter in `{path}`: {_message(answer)}. It needs --enable-lora, "
                "--max-lora-rank of at least the adapter's, and must see that path (--adapter_dir)."
            )
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name}).raise_for_status()

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()


def server_url(options: EngineOptions) -> str:
    """The server's address; raises `ValueError` when there is none."""
    if not options.server_url:
        raise ValueError("--engine server needs --server_url, such as http://localhost:8000.")
    return options.server_url.rstrip("/").removesuffix("/v1")


def server_version(options: EngineOptions) -> str:
    """Version of vLLM at the server."""
    with httpx.Client(base_url=server_url(options), timeout=30) as client:
        return str(ask_server(client, "/version", "version"))


def ask_server(client: httpx.Client, path: str, key: str) -> Any:
    """What the server answers there under `key`; raises a `ValueError` that names the fix when there is no vLLM server."""
    try:
        return client.get(path).raise_for_status().json()[key]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ValueError(
            f"No vLLM server answers at {str(client.base_url).rstrip('/')} ({type(error).__name__}: {error}). Start one with "
            "`vllm serve MODEL`, or check --server_url."
        ) from error


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
