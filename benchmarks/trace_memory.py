"""The planner held against the true training pass, without a GPU: every tensor is made, but none has numbers in it.

    python benchmarks/trace_memory.py            # the default recipe's model, Qwen2.5-1.5B
    python benchmarks/trace_memory.py --json

The model is built with fake tensors (`torch._subclasses.FakeTensorMode`), which know their size and hold nothing. A dispatch mode follows
the storage of each from the operation that makes it to its end. So the peak and what is kept for the backward pass are those of the
pass that a GPU would make, but for two things: kernels' own workspaces, and fake tensors on `cuda`, which a CPU build of torch does not
have; so they are on `cpu`, where attention saves the same tensors. Takes some ten seconds, and less than 1 GB.
"""

import argparse
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from random_model import QWEN_1_5B
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from astarpo.rollout.memory import ModelShape, RunSizes, formulas
from astarpo.rollout.memory.plan import BACKWARD, lines
from astarpo.trainer.attention import repeated_sdpa
from astarpo.trainer.logprobs import TILE, TokenLogProbs

ATTENTIONS = ("grouped", "repeated", "math")
"""`grouped`: the flash kernel, from compute capability 8.0. `repeated`: ours for a T4. `math`: PyTorch's fallback, which makes all scores."""


class Storages(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return found

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)

        def ended() -> None:
            self._known.discard(key)
            self.alive -= size

        weakref.finalize(storage, ended)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Puts into the list the most bytes that were alive inside, beyond those at its beginning, and those left at its end."""
        self.most, before = self.alive, self.alive
        found: list[int] = []
        yield found
        found += [self.most - before, self.alive - before]


def policy(sizes: dict[str, Any], rank: int | None, attention: str, is_checkpointed: bool) -> Any:
    """The policy as `trainer/policy.py` makes it: base in float16 and adapter in float32, or all weights in float32."""
    # On a GPU a causal row needs no mask; with fake tensors transformers would make one.
    function = repeated_sdpa if attention == "repeated" else sdpa_attention_forward
    AttentionInterface.register("traced", function)
    AttentionMaskInterface.register("traced", lambda *args, **kwargs: None)
    config: Any = Qwen2Config(**sizes, tie_word_embeddings=True, use_cache=False)
    with torch.device("meta"):
        dtype = torch.float32 if rank is None else torch.float16
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="traced")
        if rank is not None:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    _give_storage(model)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def _give_storage(model: torch.nn.Module) -> None:
    """Fake tensors in the place of those on `meta`; PEFT cannot make its own, because `Module.to` cannot exchange fake parameters."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # tied weights once
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]  # pyright: ignore[reportArgumentType]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def trace(
    sizes: dict[str, Any],
    prompt: int,
    completion: int,
    rank: int | None,
    is_checkpointed: bool,
    rows: int = 1,
    attention: str = "repeated",
) -> dict[str, int]:
    """Bytes of one pass, beside weights, adapter and moments.

    Args:
        sizes (`dict[str, Any]`):
            Of a Qwen2.
        prompt (`int`):
            Tokens of a prompt.
        completion (`int`):
            Tokens of a completion, all of which are scored.
        rank (`int`, *optional*):
            Rank of the adapter; None trains all weights.
        is_checkpointed (`bool`):
            Whether blocks are computed again in the backward pass.
        rows (`int`, *optional*, defaults to `1`):
            Completions of the pass.
        attention (`str`, *optional*, defaults to `"repeated"`):
            One of `ATTENTIONS`.

    Returns:
        `dict[str, int]`: `kept` by the blocks for the backward pass; `blocks`, the most that lives beside it while the blocks go
        backward; `gradients`; `head`, the most that scoring completion tokens takes beside the hidden states; `scoring`, the most of the
        blocks without a backward pass; `update`, the most from the forward pass to the end of the backward pass.
    """
    with FakeTensorMode(), Storages() as storages:
        model = policy(sizes, rank, attention, is_checkpointed)
        causal = model.get_base_model() if rank else model
        ids = torch.zeros(rows, prompt + completion, dtype=torch.long)
        scored, labels = torch.arange(rows * completion), ids[:, prompt:].flatten()

        def hidden_states() -> torch.Tensor:
            with torch.autocast("cpu", torch.float16):
                return causal.base_model(input_ids=ids, use_cache=False).last_hidden_state

        def log_probs(hidden: torch.Tensor) -> torch.Tensor:
            # As `use_scoring_head` does it, with positions instead of a mask: fake tensors have no values that could choose.
            return TokenLogProbs.apply(hidden.flatten(0, 1)[scored], causal.lm_head.weight, None, labels, 1.0)[0]  # pyright: ignore

        kernel = sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()
        with _tiles_of_a_gpu(), kernel, disable_input_dtype_casting(model):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:  # the reference is frozen: autocast keeps no copies of its weights
                parameter.requires_grad_(False)
            with storages.peak() as scoring, torch.no_grad(), model.disable_adapter() if rank else nullcontext():
                hidden_states()
            for parameter in trained:
                parameter.requires_grad_(True)
            with storages.peak() as forward:
                hidden = hidden_states()
            upstream = torch.zeros_like(hidden)
            with storages.peak() as backward:
                hidden.backward(upstream)
            leaf = hidden.detach().requires_grad_()
            del hidden, upstream
            with storages.peak() as head:
                log_probs(leaf).sum().backward()
            model.zero_grad()
            del leaf
            with storages.peak() as update:
                log_probs(hidden_states()).sum().backward()
    return {
        "kept": forward[1],
        "blocks": backward[0],
        "gradients": update[1],
        "head": head[0],
        "scoring": scoring[0],
        "update": update[0],
    }


@contextmanager
def _tiles_of_a_gpu() -> Iterator[None]:
    own = TILE["cpu"]
    TILE["cpu"] = TILE["cuda"]
    try:
        yield
    finally:
        TILE["cpu"] = own


def planned(
    shape: ModelShape, prompt: int, completion: int, rank: int | None, is_checkpointed: bool, rows: int = 1
) -> dict[str, int]:
    """What the planner's formulas say of the same pass, under the same names."""
    sizes = RunSizes(
        *(prompt + completion, completion, rank, None, 4 if rank is None else 2),
        gradient_checkpointing=is_checkpointed, micro_batch=rows, max_num_seqs=1, max_num_batched_tokens=1, kv_cache_bytes=0,
    )  # fmt: skip
    held = {line.name.partition(" (")[0]: line.bytes for line in lines(shape, sizes) if BACKWARD in line.phases}
    trained = shape.parameters if rank is None else formulas.adapter_parameters(shape, rank)
    tokens = rows * (prompt + completion)
    kept = held["activations kept for the backward pass"] + held.get("trained weights in 16 bit", 0)
    return {
        "kept": kept,
        "blocks": formulas.passing_activations(shape, tokens, rank or 0, is_checkpointed),
        "gradients": formulas.gradients(trained),
        "head": formulas.head(shape, rows * completion, sizes.width),
        "scoring": formulas.scoring_activations(shape, tokens),
        "update": kept
        + held["a tile of logits, or a block's gradients"]
        + held.get("gradients of this micro-batch, beyond what it frees", 0),
    }


CASES: dict[str, dict[str, Any]] = {
    "t4_math": dict(prompt=256, completion=512, rank=16, is_checkpointed=False),
    "t4_math, checkpointing": dict(prompt=256, completion=512, rank=16, is_checkpointed=True),
    "t4_math, 4 rows, checkpointing": dict(prompt=256, completion=512, rank=16, is_checkpointed=True, rows=4),
    "t4_pag": dict(prompt=256, completion=1696, rank=16, is_checkpointed=True),
    "all weights, checkpointing": dict(prompt=256, completion=512, rank=None, is_checkpointed=True),
}
"""What is traced. An episode of `t4_pag` is three turns and what stands between them."""


def main() -> None:
    """Trace all cases and print what was traced beside what is planned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    shape = ModelShape.of_config(Qwen2Config(**QWEN_1_5B, tie_word_embeddings=True), "Qwen2.5-1.5B")
    found = {
        name: {"traced": trace(QWEN_1_5B, **case), "planned": planned(shape, **case)} for name, case in CASES.items()
    }
    if options.json:
        print(json.dumps(found))
        return
    print("| pass | line | planned (GB) | traced (GB) | planned / traced |\n|---|---|---|---|---|")
    for name, sides in found.items():
        for line, traced in sides["traced"].items():
            plan = sides["planned"][line]
            print(f"| {name} | {line} | {plan / 1e9:.3f} | {traced / 1e9:.3f} | {plan / traced:.2f} |")


if __name__ == "__main__":
    main()
