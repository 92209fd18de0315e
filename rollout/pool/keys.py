"""Which rows a pool has, as arrays: a million keys are no million Python objects."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

KEYS = ("prompt_id", "sample_index")


def key_numbers(table: "pa.Table", prompt_ids: Sequence[str], slots: int) -> "np.ndarray":
    """A number for each row of a table with the key columns.

    Args:
        table (`pa.Table`):
            Rows with `prompt_id` and `sample_index`.
        prompt_ids (`Sequence[str]`):
            Ids of all P prompts, in the pool's order.
        slots (`int`):
            Rows per prompt, N; in pools of episodes N·K.

    Returns:
        `np.ndarray` of shape (rows,): `position · N + sample_index`, in [0, P·N); -1 for a key that is none of the pool's.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    compute: Any = pc
    column = table["prompt_id"]
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries()
    if column.num_chunks == 0:
        return np.zeros(0, dtype=np.int64)
    # Strings are looked up once each, not once per row.
    found = compute.index_in(column.chunk(0).dictionary, value_set=pa.array(prompt_ids, type=pa.string()))
    lookup = np.append(np.asarray(compute.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64), -1)
    codes = [compute.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in column.chunks]
    positions = lookup[np.concatenate(codes)]
    indices = np.asarray(compute.fill_null(table["sample_index"], -1).to_numpy(), dtype=np.int64)
    valid = (positions >= 0) & (indices >= 0) & (indices < slots)
    return np.where(valid, positions * slots + indices, -1)
