"""Fixtures: a tiny Qwen2 with a byte-level tokenizer, built in code, and real vLLM engines on it."""

import atexit
import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each, bound to the same cores, would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from astarpo.rollout import EngineOptions, VLLMEngine

# Every `train()` ends with a full collection in accelerate, which is most of a toy update: what was imported need not be looked
# through again and again. Released at exit, where destructors expect it.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)

MAX_MODEL_LEN = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LONG = (
    *(
        "two_process",
        "resume",
        "commands",
        "kill",
        "trainer_trl_oldest",
        "notebook",
        "quickstart",
        "stage1",
        "flat",
        "endurance",
    ),
    *(
        "episode_training",
        "hostile",
        "golden",
        "sharded",
        "engines",
        "trainer_trl",
        "engine_ray",
        "plan",
        "shared_weights",
        "faults",
    ),
)
"""Files that take longest. They are given out first: one that comes last would leave the other process without work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(LONG)))


def build_tokenizer(folder: Path) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)


def build_model(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    build_tokenizer(folder)
    build_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model: str):
    return AutoTokenizer.from_pretrained(tiny_model)


def make_engine(model: str, **kwargs) -> VLLMEngine:
    options = EngineOptions(kv_cache_gb=0.05, max_num_seqs=16)
    return VLLMEngine(model, MAX_MODEL_LEN, dtype="float32", options=options, **kwargs)


@pytest.fixture(scope="session")
def engine(tiny_model: str) -> VLLMEngine:
    """For `inline` and for sampling the reference."""
    return make_engine(tiny_model)


@pytest.fixture(scope="session")
def adapter_engine(tiny_model: str) -> VLLMEngine:
    return make_engine(tiny_model, lora_rank=8)


@pytest.fixture(scope="session")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that knows the form of PAG episodes."""
    from pag_model import teach_episodes

    folder = tmp_path_factory.mktemp("guesser")
    teach_episodes(folder)
    return str(folder)


@pytest.fixture(scope="session")
def guessing_engine(guesser: str) -> VLLMEngine:
    return make_engine(guesser)


@pytest.fixture(scope="session")
def pool(guesser: str, guessing_engine: VLLMEngine, tmp_path_factory: pytest.TempPathFactory):
    """Reference episodes of that model."""
    from pag_run import make_pool

    return make_pool(tmp_path_factory.mktemp("episodes") / "pool", guesser, guessing_engine)


@pytest.fixture(scope="session")
def make(guesser: str, guessing_engine: VLLMEngine, pool):
    """Makes trainers of episodes on that pool."""
    from pag_run import Maker

    return Maker(guesser, guessing_engine, pool)


@pytest.fixture
def writable_engine(tiny_model: str) -> VLLMEngine:
    return make_engine(tiny_model, writable=True)


def long_prompt(tokenizer, blocks: int = 2, block_size: int = 128) -> list[int]:
    """Token ids of a prompt that fills more than `blocks` KV-cache blocks of the CPU engine."""
    ids = tokenizer("The quick brown fox. " * 40)["input_ids"]
    return ids[: blocks * block_size + 20]
