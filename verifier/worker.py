"""A grading worker: reads batches of `[answer, gold]` pairs, writes one verdict per pair.

It is a program of its own (`python -m astarpo.verifier.worker`) rather than a `multiprocessing` child, so that it never
inherits threads, CUDA or the parent's `__main__`, and so that nothing but JSON and words crosses the pipes.

Two processes make one worker. The *keeper* loads math-verify once and forks the *judge*, which answers on the keeper's
stdin and stdout. When a judge hangs, the parent has it killed; when it dies, the keeper forks the next one: milliseconds
instead of a second of imports.
"""

import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import sys

WARM_UP = (
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}"),
    (r"x^{2}+2x+1", r"(x+1)^{2}"),
    (r"\sin(2x)-3\pi", r"2\sin(x)\cos(x)-3\pi"),
    (r"\log_{2} 3+e^{3}", r"|x-1|"),
    (r"3+4i", r"5!-\binom{5}{2}"),
)


def keep(memory_mb: int, control: int) -> None:
    """Fork judges, one after another, until the parent goes away.

    Args:
        memory_mb (`int`):
            Address space of a judge in MiB.
        control (`int`):
            File descriptor on which the parent writes the number of a judge to kill. Its end is ours.
    """
    for number in range(sys.maxsize):
        alive, held = os.pipe()  # the judge holds one end; its death closes it
        judge = os.fork()
        if judge == 0:
            os.close(alive)
            _serve(number, memory_mb)
        os.close(held)
        poller = select.poll()
        poller.register(alive, select.POLLIN)
        poller.register(control, select.POLLIN)
        while not any(descriptor == alive for descriptor, _ in poller.poll()):
            request = os.read(control, 4096)
            if not request or str(number) in request.decode().split():
                os.kill(judge, signal.SIGKILL)
            if not request:
                os.waitpid(judge, 0)
                return
        _, status = os.waitpid(judge, 0)
        os.close(alive)
        if status == 0:  # nobody is at the other end any more, though something may still hold `control`
            return


def _serve(number: int, memory_mb: int) -> None:
    """Answer batches until stdin closes. Never returns."""
    from .answers.equality import judge
    from .answers.symbolic import MathVerify

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the keeper
    limit = memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    comparer = MathVerify()
    _write(f"ready {number}")
    with os.fdopen(0, "rb", closefd=False) as lines:
        for line in lines:
            try:
                batch, pairs = json.loads(line)
            except ValueError:  # the rest of a batch that a killed judge had begun to read
                continue
            for answer, gold in pairs:
                try:
                    verdict = judge(answer, gold, comparer)
                except MemoryError:
                    os._exit(1)  # the parent sees the death; what is left of this heap is not to be trusted
                _write(f"{batch} {verdict}")
    os._exit(0)


def _write(line: str) -> None:
    try:
        os.write(1, line.encode() + b"\n")
    except BrokenPipeError:  # the parent has gone: an end, not an error
        os._exit(0)


def main() -> None:
    """Serve until the parent goes away. Arguments: memory limit in MB, the control descriptor."""
    memory_mb, control = (int(word) for word in sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout = sys.stderr  # a library that prints must not corrupt the protocol
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipes
    logging.disable(logging.WARNING)  # math-verify warns about its disabled limits, at every start
    from .answers.equality import judge
    from .answers.symbolic import MathVerify

    for gold, answer in WARM_UP:
        judge(answer, gold, MathVerify())
    gc.collect()
    gc.freeze()  # what is loaded stays shared between keeper and judges
    keep(memory_mb, control)


if __name__ == "__main__":
    main()
