"""`astarpo-verify`: grade a JSONL file of completions. Imports no torch, no transformers and no TRL, so that it starts at once."""

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from .grading import Outcome
from .jsonl import ItemFile
from .verifier import Verifier

BATCH = 256


@dataclass
class VerifyOptions:
    """The options of `astarpo-verify`.

    Args:
        input (`str`):
            JSONL file with `id`, `completion` and `gold` on each line.
        output (`str`):
            JSONL file for `id`, `outcome`, `correct`, `answer` and `seconds`.
        verifier_workers (`int`, *optional*, defaults to `1`):
            Number of grading processes; `--workers` means the same.
        timeout_s (`float`, *optional*, defaults to `5.0`):
            Seconds that one item may take.
        memory_mb (`int`, *optional*, defaults to `2048`):
            Memory of one worker in MiB.
    """

    input: str = field(metadata={"help": "JSONL file with id, completion and gold on each line."})
    output: str = field(metadata={"help": "JSONL file for id, outcome, correct, answer and seconds."})
    verifier_workers: int = field(default=1, metadata={"help": "Number of grading processes.", "alias": "--workers"})
    timeout_s: float = field(default=5.0, metadata={"help": "Seconds that one item may take."})
    memory_mb: int = field(default=2048, metadata={"help": "Memory of one worker in MiB."})


def verify(options: VerifyOptions) -> int:
    """Grade a file; returns 1 when a line had to be skipped, else 0."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    source, target = ItemFile(Path(options.input)), Path(options.output)
    if target.exists() and target.samefile(source.path):
        raise ValueError(f"--output would overwrite --input `{source.path}`. Name another file.")
    if not target.parent.is_dir():
        raise ValueError(f"Folder `{target.parent}` of --output does not exist. Create it, or name another file.")
    counts: Counter[Outcome] = Counter()
    with (
        Verifier(options.verifier_workers, options.timeout_s, options.memory_mb) as verifier,
        target.open("w", encoding="utf-8") as out,
        tqdm(desc="verify", unit=" items", total=source.count()) as bar,
    ):
        for batch in source.batches(BATCH):
            grades = verifier.grade_batch([item.completion for item in batch], [item.gold for item in batch])
            for item, grade in zip(batch, grades, strict=True):
                out.write(json.dumps({"id": item.id, **grade.to_json()}) + "\n")
                counts[grade.outcome] += 1
            bar.update(len(batch))
    table = Table("outcome", "items", "share", title=f"{counts.total()} items in {source.path.name}")
    for outcome in Outcome:
        if counts[outcome]:
            table.add_row(outcome.value, str(counts[outcome]), f"{counts[outcome] / counts.total():.1%}")
    Console().print(table)
    return source.report()


def parse_options(argv: Sequence[str], prog: str) -> VerifyOptions:
    """The command line as [`VerifyOptions`]: one flag for each field."""
    parser = argparse.ArgumentParser(
        prog,
        f"{prog} --input FILE --output FILE [--verifier_workers N] [--timeout_s S] [--memory_mb M]",
        "Grade completions against gold answers: which text is the answer, and is it right?",
        allow_abbrev=False,
    )
    for option in fields(VerifyOptions):
        is_required = option.default is MISSING
        note = "required" if is_required else f"default: {option.default}"
        parser.add_argument(
            f"--{option.name}",
            *filter(None, [option.metadata.get("alias")]),
            dest=option.name,
            type=option.type,  # pyright: ignore[reportArgumentType]
            default=None if is_required else option.default,
            required=is_required,
            metavar=option.name.upper(),
            help=f"{option.metadata['help']} ({note})",
        )
    return VerifyOptions(**vars(parser.parse_args(argv)))


def main() -> None:
    """Entry point of `astarpo-verify`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same end as Ctrl-C: the workers are stopped
    is_front = sys.argv[0] == "astarpo verify"  # set by `astarpo/__main__.py`
    try:
        code = verify(parse_options(sys.argv[1:], "astarpo verify" if is_front else "astarpo-verify"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: the lines graded so far are in the output file", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
