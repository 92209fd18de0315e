"""What the journeys of users need: a folder with their files, and the command as they type it, in this process."""

import contextlib
import io
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from astarpo.__main__ import main

REWARDS = '''
def odd(completions, level, **kwargs):
    """1 for a completion of an odd number of letters: a random model earns it half of the time."""
    texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
    return [float(len(text) % 2) for text in texts]


def even(completions, **kwargs):
    texts = [said if isinstance(said, str) else said[0]["content"] for said in completions]
    return [float(len(text) % 2 == 0) for text in texts]
'''
SMALL = ["--max_completion_length", "12", "--kv_cache_gb", "0.05", "--max_num_seqs", "16"]
TRAIN = [
    *SMALL,
    *["--num_value_samples", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--max_steps", "3"],
    *["--learning_rate", "1e-2", "--bf16", "false", "--require_eos", "false", "--report_to", "none"],
    *["--gradient_checkpointing", "false", "--lr_scheduler_type", "constant"],
]


def write_files(folder: Path) -> None:
    """A user's data: questions and answers as csv and jsonl, an evaluation set that shares two of them, and own rewards."""
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "level": str(n % 3)} for n in range(12)]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "own.csv").write_text("\n".join(lines) + "\n")
    others = [{"question": f"{n} + 2?", "answer": str(n + 2), "level": "9"} for n in range(6)]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    held_out = [*rows[:2], *({"question": f"{n} + 3?", "answer": str(n + 3), "level": "0"} for n in range(4))]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    (folder / "my_rewards.py").write_text(REWARDS)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def astarpo(*words: object, cwd: Path, verbose: bool = True) -> Ended:
    """`astarpo WORDS` in this process: the engines of a test session start faster than Python does."""
    out, err = io.StringIO(), io.StringIO()
    argv, folder, handler = sys.argv, Path.cwd(), signal.getsignal(signal.SIGTERM)
    before = os.environ.get("ASTARPO_VERBOSE")
    log = logging.StreamHandler(err)
    logging.getLogger("astarpo").addHandler(log)
    sys.argv = ["astarpo", *map(str, words)]
    os.chdir(cwd)
    if verbose:
        os.environ["ASTARPO_VERBOSE"] = "1"  # the libraries' logs are as the next test expects them
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
        os.chdir(folder)
        signal.signal(signal.SIGTERM, handler)
        logging.getLogger("astarpo").removeHandler(log)
        if before is None:
            os.environ.pop("ASTARPO_VERBOSE", None)
        for name in [name for name in sys.modules if name == "my_rewards"]:
            del sys.modules[name]
        if str(cwd) in sys.path:
            sys.path.remove(str(cwd))
    return Ended(code, out.getvalue(), err.getvalue())


def done(*words: object, cwd: Path) -> Ended:
    """The same, which must end well."""
    ended = astarpo(*words, cwd=cwd)
    assert ended.code == 0, ended.err[-3000:]
    return ended
