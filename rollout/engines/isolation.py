"""One bad prompt must not cost the others: who made the engine fail?"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from .interface import Completion, EngineError, Failure

MOST_FAILURES = 16
"""So many failures with nothing finished in between mean that the engine is broken, not a prompt."""

Run = Callable[[Sequence[int]], Iterator[tuple[int, Completion]]]


def isolate_failures(prompts: Sequence[Sequence[int]], run: Run) -> Iterator[tuple[int, Completion | Failure]]:
    """Sample all prompts; when the engine fails, go on without those in flight and then find the guilty one by halving.

    Args:
        prompts (`Sequence[Sequence[int]]`):
            Token ids. Equal prompts are guilty together.
        run (`Run`):
            Samples the prompts of given indices, yields (index, completion), and raises [`EngineError`] naming those in
            flight.

    Raises:
        EngineError: If the engine fails `MOST_FAILURES` times with nothing finished in between; it names those that were
            in flight at the first of these failures.
    """
    groups = deque([list(range(len(prompts)))])
    # Not the errors themselves: their tracebacks would keep the failed attempts' memory alive.
    streak: list[tuple[int, ...]] = []
    while groups:
        group = groups.popleft()
        done: set[int] = set()
        try:
            for index, completion in run(group):
                done.add(index)
                streak.clear()
                yield index, completion
        except EngineError as error:
            streak.append(error.in_flight)
            if len(streak) == MOST_FAILURES:
                raise EngineError(
                    f"The engine failed {MOST_FAILURES} times in a row, with different prompts. The last time: {error}",
                    streak[0],
                ) from error
            left = [index for index in group if index not in done]
            in_flight = set(error.in_flight)
            suspects = [index for index in left if index in in_flight] or left
            if others := [index for index in left if index not in set(suspects)]:
                groups.appendleft(others)
            halves = _halves(suspects, prompts)
            if len(halves) == 1:
                yield from ((index, Failure(str(error))) for index in suspects)
            else:
                groups.extend(halves)


def _halves(indices: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Split `indices` in two such that equal prompts stay together; one part if they are all equal."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in indices:
        by_prompt.setdefault(tuple(prompts[index]), []).append(index)
    parts = list(by_prompt.values())
    middle = len(parts) // 2
    return [list(chain.from_iterable(half)) for half in (parts[:middle], parts[middle:]) if half]
