"""The order of prompts: a stream of permutations that follows from the seed and the step alone."""

import math
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from ..rollout.prompts import sample_seed


class PromptOrder(Sampler[int]):
    """Yields row numbers, update after update, from permutations that follow one another without a gap.

    The stream is cut into updates wherever a permutation happens to end, so no row is ever dropped, no batch is ever
    short, and every row comes up exactly once in each permutation. An epoch is the least number of updates that holds all
    rows. There is no generator state: where the stream stands follows from the step, so a resumed run goes on with the rows
    that the uninterrupted one would have taken, in the second epoch as in the first.

    Args:
        num_rows (`int`):
            Rows of the training set.
        update_rows (`int`):
            Rows of one update, over all processes.
        generation_rows (`int`):
            Rows sampled together; divides `update_rows`.
        repeats (`int`):
            How often a generation is handed out: once for each of its micro-batches, which are cut from it later.
        seed (`int`):
            Run seed.
        step (`Callable[[], int]`):
            Updates done so far.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether to permute; without, every pass is in the data set's order.
    """

    def __init__(
        self,
        num_rows: int,
        update_rows: int,
        generation_rows: int,
        repeats: int,
        seed: int,
        step: Callable[[], int],
        shuffle: bool = True,
    ):
        if update_rows % generation_rows:
            raise ValueError(f"{update_rows} rows of an update are no multiple of {generation_rows} sampled together.")
        self._num_rows, self._update_rows, self._generation_rows = num_rows, update_rows, generation_rows
        self._repeats, self._seed, self._step, self._shuffle = repeats, seed, step, shuffle

    @property
    def updates_per_epoch(self) -> int:
        """The least number of updates that holds all rows."""
        return math.ceil(self._num_rows / self._update_rows)

    def __len__(self) -> int:
        return self.updates_per_epoch * self._update_rows * self._repeats

    def __iter__(self) -> Iterator[int]:
        # The loader skips the updates that a resumed epoch has behind it, so an epoch always begins at its beginning.
        epoch_rows = self.updates_per_epoch * self._update_rows
        begin = self._step() // self.updates_per_epoch * epoch_rows
        rows = self._rows_from(begin)
        for _ in range(epoch_rows // self._generation_rows):
            generation = [next(rows) for _ in range(self._generation_rows)]
            for _ in range(self._repeats):
                yield from generation

    def _rows_from(self, position: int) -> Iterator[int]:
        number, offset = divmod(position, self._num_rows)
        while True:
            yield from self._permutation(number)[offset:]
            number, offset = number + 1, 0

    def _permutation(self, number: int) -> list[int]:
        if not self._shuffle:
            return list(range(self._num_rows))
        generator = torch.Generator().manual_seed(sample_seed("order", self._seed, number))
        return torch.randperm(self._num_rows, generator=generator).tolist()
