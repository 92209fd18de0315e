"""How many bytes each thing of a run takes. Every formula of the planner is here, and nothing else.

Suffix-free integers are counts; functions return bytes. `width` is the bytes of a weight (2 in 16 bit). Where a formula
could be counted on real tensors it was, and a test repeats that; what only a GPU can show says "estimate".
"""

from collections.abc import Collection

from .shape import ModelShape

FLOAT32 = 4
CONTEXT = 600_000_000
"""CUDA context, cuBLAS workspaces, Triton kernels of one process. Estimate."""
GRAPHS = 600_000_000
"""Memory pool of the CUDA graphs that vLLM captures, 0.2 to 0.6 GB. Estimate."""
MOMENTS = 8
"""Adam keeps two float32 numbers for each weight that is trained."""
PASS_TOKENS = 8192
"""Most prompt tokens that the transformers engine reads at once; `rollout/engines/slots.py` takes it from here."""
HEAD_TOKENS = 256
"""Completion tokens whose logits are there at once on a GPU (`trainer/logprobs.py`, TILE)."""


def weights(shape: ModelShape, width: int) -> int:
    """One copy of the base weights: every parameter once, tied ones together."""
    return shape.parameters * width


def adapter_parameters(shape: ModelShape, rank: int, targets: Collection[str] | None = None) -> int:
    """Weights of a LoRA adapter: r · (inputs + outputs) for each layer that has one; all linear layers by default."""
    return sum(
        rank * (linear.inputs + linear.outputs) * linear.count
        for linear in shape.linears
        if targets is None or linear.name in targets
    )


def adapter(parameters: int) -> int:
    """The adapter's weights, which are trained in float32."""
    return parameters * FLOAT32


def gradients(parameters: int) -> int:
    """Their gradients."""
    return parameters * FLOAT32


def optimizer(parameters: int) -> int:
    """Adam's moments, which appear with the first update."""
    return parameters * MOMENTS


def inline_copies(parameters: int, width: int) -> int:
    """`inline`: the static buffers A and B in the engine's type. B of a fused module has zeros beside each part's columns,
    which doubles it at most."""
    return 2 * parameters * width


def adapter_slot(shape: ModelShape, rank: int, width: int) -> int:
    """`adapter`: the engine's slot for one adapter, on all linear layers whatever the adapter has."""
    return adapter_parameters(shape, rank) * width


def key_values_per_token(shape: ModelShape, width: int) -> int:
    """A key and a value in every layer."""
    return 2 * shape.layers * shape.keys * width


def engine_activations(shape: ModelShape, tokens: int, width: int) -> int:
    """Largest tensors alive at once in an engine step, in the MLP: its doubled input projection, their product, the residual
    and the normed stream. Estimate."""
    return tokens * (3 * shape.intermediate + 2 * shape.hidden) * width


def sampler(shape: ModelShape, sequences: int) -> int:
    """Logits of a decoding step in float32, their log-softmax, and what the draw needs beside them. Estimate."""
    return 3 * sequences * shape.vocabulary * FLOAT32


def block_activations(shape: ModelShape, rank: int) -> int:
    """What a block keeps for the backward pass of one token, under 16-bit autocast.

    Each norm keeps its input in float32 and its output; attention its queries, keys, values and output; the MLP its two input
    projections, the activated one, and their product; each adapter its inner product. Keys and values are counted once a query head, as
    below compute capability 8.0; newer cards keep up to 6 % less. Counted to the byte by `benchmarks/trace_memory.py`.
    """
    return 12 * shape.hidden + 8 * shape.intermediate + 8 * shape.queries + 14 * rank


def cache_copy(shape: ModelShape, tokens: int, width: int) -> int:
    """The transformers engine: one layer's keys and values of prompts that are read, repeated for each query head that shares them."""
    return 2 * tokens * shape.queries * width


def saved_activations(shape: ModelShape, tokens: int, rank: int, is_checkpointed: bool) -> int:
    """What the blocks keep from the forward pass until the backward pass comes to them: with checkpointing their inputs only."""
    block = 2 * shape.hidden if is_checkpointed else block_activations(shape, rank)
    return tokens * (block * shape.layers + 6 * shape.hidden)  # and what the last norm keeps


def autocast_copies(parameters: int) -> int:
    """Weights that are trained in float32 are there in 16 bit too, from the forward pass to the backward pass."""
    return 2 * parameters


def passing_activations(shape: ModelShape, tokens: int, rank: int, is_checkpointed: bool) -> int:
    """The most that lives beside it while the blocks go backward: gradients inside the MLP, and with checkpointing all that the one
    block keeps that is computed again."""
    if is_checkpointed:
        return tokens * (5 * shape.intermediate + block_activations(shape, rank))
    return tokens * 4 * shape.intermediate


def embedding_gradients(shape: ModelShape) -> int:
    """All weights trained: the head's gradient waits for the embedding's, and their sum is a third tensor."""
    return 2 * shape.vocabulary * shape.hidden * FLOAT32


def scoring_activations(shape: ModelShape, tokens: int) -> int:
    """The most that lives while the blocks score without a backward pass: the MLP's projections, the stream, and a norm in float32."""
    return tokens * (6 * shape.intermediate + 8 * shape.hidden)


def head(shape: ModelShape, scored_tokens: int, width: int) -> int:
    """Scoring completion tokens: a tile of logits in float32 twice, the hidden states that are scored, and their gradient."""
    tile = min(scored_tokens, HEAD_TOKENS) * shape.vocabulary * FLOAT32
    return 2 * tile + 2 * scored_tokens * shape.hidden * width
