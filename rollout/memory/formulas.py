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
HEAD_TOKENS, HEAD_WORDS = 4096, 32_768
"""TRL's fused head goes through tokens and vocabulary in tiles of this size."""


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


def saved_activations(shape: ModelShape, tokens: int, rank: int, is_checkpointed: bool) -> int:
    """What the forward pass keeps for the backward pass, with LoRA on all linear layers in 16 bit.

    With checkpointing each block keeps its input, and one block at a time is computed again. The factors of a block were
    counted on saved tensors.
    """
    block = 18 * shape.hidden + 8 * shape.intermediate + 6 * shape.queries + 4 * shape.keys + 22 * rank
    if is_checkpointed:
        return tokens * (2 * shape.hidden * shape.layers + block)
    return tokens * block * shape.layers


def passing_activations(shape: ModelShape, tokens: int) -> int:
    """Tensors of one block that live only while it is computed: float32 copies of the MLP's widest input and its gradient,
    and of the adapter's output. Estimate."""
    return tokens * (3 * shape.intermediate * FLOAT32)


def head(shape: ModelShape, scored_tokens: int, width: int) -> int:
    """Scoring completion tokens: one tile of logits, and the gradient of the hidden states in float32."""
    tile = min(scored_tokens, HEAD_TOKENS) * min(HEAD_WORDS, shape.vocabulary) * width
    return tile + scored_tokens * shape.hidden * FLOAT32
