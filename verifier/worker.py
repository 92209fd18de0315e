"""A grading worker: reads `[answer, gold]` pairs as JSON lines on stdin, writes one verdict per line to stdout.

It is a program of its own (`python -m astarpo.verifier.worker`) rather than a `multiprocessing` child, so that it
never inherits threads, CUDA or the parent's `__main__`, and so that nothing but JSON crosses the pipe.
"""

import json
import logging
import resource
import sys

from .grading import MAX_ANSWER_CHARS, Outcome


def judge(answer: str, gold: str) -> Outcome:
    """Compare an extracted answer with the gold answer by math-verify, without any time limit of its own."""
    from math_verify import parse, verify

    # Boxed on both sides, so that math-verify reads exactly this text and its own extraction has nothing to choose.
    # Its SIGALRM limits are off: the parent holds the clock and kills, which also works inside C code.
    gold_parsed = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not any(not isinstance(item, str) for item in gold_parsed):
        return Outcome.CORRECT if gold.strip() and answer.strip() == gold.strip() else Outcome.UNPARSEABLE_GOLD
    if len(answer) > MAX_ANSWER_CHARS:
        return Outcome.WRONG
    answer_parsed = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    equal = verify(gold_parsed, answer_parsed, timeout_seconds=None)  # pyright: ignore[reportArgumentType]
    return Outcome.CORRECT if equal else Outcome.WRONG


def main() -> None:
    """Serve verdicts until stdin closes. The only argument is the memory limit in MB."""
    limit = int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.WARNING)  # math-verify warns about its disabled limits, at every start
    judge("1", "1")  # loads sympy and its parser before the first clock starts
    out = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not corrupt the protocol
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        answer, gold = json.loads(line)
        out.write(judge(answer, gold).value + "\n")
        out.flush()


if __name__ == "__main__":
    main()
