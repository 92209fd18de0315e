"""`astarpo`: one command for all that this package does. Each subcommand is one of the commands `astarpo-...`."""

import sys
from collections.abc import Mapping
from importlib import import_module

from . import __version__
from .cli import run_command, suggestion

COMMANDS = {
    "quickstart": (
        "trainer.quickstart",
        "learn to divide with a small model on a CPU, in four to ten minutes",
    ),
    "rollout": ("rollout.__main__", "stage 1: sample the reference into a pool (astarpo-rollout)"),
    "train": (
        "trainer.__main__",
        "from problems to a trained policy: stage 1 where it is missing, then stage 2 (astarpo-train)",
    ),
    "eval": (
        "rollout.evaluate_cli",
        "avg@k, pass@k and maj@k of a model or an adapter; `eval compare A B` (astarpo-eval)",
    ),
    "export": ("trainer.export", "merge an adapter into its base model, checked, for any program that loads models"),
    "completions": ("trainer.completions", "show what the policy wrote in an update of a run"),
    "verify": ("verifier.__main__", "grade a JSONL file of completions (astarpo-verify)"),
    "recipe": (
        "configs.command",
        "print where a recipe or a file for accelerate lies, to copy it or to launch with it",
    ),
    "env": ("rollout.env_cli", "say what this machine has and which engine it runs, for a bug report"),
    "plan": ("rollout.memory.command", "say what a run will hold in GPU memory and how long it takes (astarpo-plan)"),
    "calibrate": ("trainer.calibrate", "measure how fast this machine samples and trains, for the hours of the plan"),
}
"""Subcommand: its module, whose `main` reads `sys.argv`, and a line for the help."""
POOL_COMMANDS = {
    "check": ("verify", "check the hash, the rows and the keys of every shard"),
    "regrade": ("regrade", "grade all samples again with the present verifier"),
    "summary": ("summary", "show solve rates, pass@k, lengths and the spread of V*"),
    "publish": ("publish", "upload the pool to the hub as a data set"),
    "import": ("import", "make a pool from rewards that others have published"),
}
"""Subcommand of `astarpo pool`: its older name, as in `astarpo-rollout verify POOL`, and a line for the help."""


def main() -> None:
    """Entry point of `astarpo`."""
    run_command(lambda: dispatch(sys.argv[1:]))


def dispatch(words: list[str]) -> int | None:
    """Run the subcommand that the words name."""
    lines = {name: line for name, (_, line) in COMMANDS.items()} | {
        "pool": "check, regrade, summarise, publish or import a pool"
    }
    name = _subcommand("astarpo", lines, words)
    if name is None:
        return 0
    if name == "pool":
        return _run_pool_command(words[1:])
    # The commands read `sys.argv`, as they do when they are started by their own names.
    sys.argv = [f"astarpo {name}", *words[1:]]
    return import_module(f".{COMMANDS[name][0]}", __package__).main()


def _run_pool_command(words: list[str]) -> int | None:
    name = _subcommand("astarpo pool", {name: line for name, (_, line) in POOL_COMMANDS.items()}, words)
    if name is None:
        return 0
    from .rollout.__main__ import COMMANDS as RUN

    old_name = POOL_COMMANDS[name][0]
    sys.argv = ["astarpo pool", old_name, *words[1:]]
    return RUN[old_name]()


def _subcommand(prog: str, lines: Mapping[str, str], words: list[str]) -> str | None:
    """The subcommand that comes first in `words`; None when only the help or the version was asked for, and printed."""
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        width = max(map(len, lines))
        print(f"usage: {prog} COMMAND [options]   (`{prog} COMMAND --help` explains a command)\n")
        print("\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items()))
        return None
    if first == "--version":
        print(__version__)
        return None
    if first not in lines:
        raise ValueError(
            f"`{first}` is not a command of `{prog}`.{suggestion(first, lines)} Commands: {', '.join(lines)}."
        )
    return first


if __name__ == "__main__":
    main()
