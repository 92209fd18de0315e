"""Command-line parsing for all astarpo commands: TRL's parser, plus recipes.

It lives in the lowest of the three parts because every command needs it. A recipe is a YAML file for several commands:
keys at its top are shared, the sections `rollout`, `train` and `eval` belong to one command each.
"""

import os
import signal
import sys
import warnings
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any

SECTIONS = ("plan", "rollout", "train", "eval", "quickstart")


def parse_command(
    types: Iterable[Any], *, section: str, prog: str, description: str, argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Parse a command line and its `--config` file into dataclasses.

    Args:
        types (`Iterable[type]`):
            Dataclasses of the options.
        section (`str`):
            The command's section in a recipe.
        prog (`str`):
            Name of the command.
        description (`str`):
            Text at the top of `--help`.
        argv (`Sequence[str]`, *optional*):
            The words of the command line; `sys.argv[1:]` when not given.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        ValueError: If the config file is missing or holds a key that the command does not know.
    """
    # TRL declares vLLM up to 0.31 and warns at every import; 0.32 is the pinned version, and the tests run on it.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    from trl import TrlParser

    types = list(types)
    words = list(sys.argv[1:] if argv is None else argv)
    parser: Any = TrlParser(
        types, prog=prog, description=description, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        help=f"YAML file, or the name of one that comes with astarpo ({', '.join(config_names())}). Options on the "
        "command line win over it.",
    )
    config = _pop_config(words)
    if config is not None:
        settings = load_recipe(config, section)
        for name, value in settings.pop("env", {}).items():
            os.environ[name] = str(value)
        unknown = parser.set_defaults_with_config(**settings)
        if unknown:
            keys = ", ".join(f"`{word[2:]}`" for word in unknown[::2])
            raise ValueError(
                f"Config `{config}` has a key that {prog} does not know: {keys}. `{prog} --help` lists them."
            )
        _check_choices(parser, config, settings)
    return parser.parse_args_into_dataclasses(args=words)[: len(types)]


def _check_choices(parser: Any, config: str, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` for a recipe's value that its option does not have: argparse looks only at the command line's."""
    for action in parser._actions:
        value = settings.get(action.dest)
        if action.choices and value is not None and str(value) not in map(str, action.choices):
            known = ", ".join(map(str, action.choices))
            raise ValueError(f"Config `{config}` has {action.dest} `{value}`. Choose one of: {known}.")


def load_recipe(config: str, section: str) -> dict[str, Any]:
    """The settings of one command in a YAML file or in a named recipe: shared keys, then its own section."""
    import yaml

    path = Path(config)
    if not path.is_file():
        path = Path(str(files("astarpo.configs") / f"{config}.yaml"))
        if not path.is_file():
            raise ValueError(
                f"Config `{config}` is neither a file nor one of the recipes that come with astarpo: "
                f"{', '.join(config_names())}."
            )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Config `{config}` is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Config `{config}` must hold `key: value` lines.")
    settings: dict[str, Any] = {str(key): value for key, value in content.items() if key not in SECTIONS}
    return settings | (content.get(section) or {})


def config_names() -> list[str]:
    """Names of the recipes that come with astarpo."""
    folder = files("astarpo.configs")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _pop_config(words: list[str]) -> str | None:
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise ValueError("--config needs a file or a name after it.")
            del words[index]
            return words.pop(index)
        if word.startswith("--config="):
            return words.pop(index).removeprefix("--config=")
    return None


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command's body and exit: a `ValueError` is bad input and prints as one paragraph with exit code 2.

    SIGTERM is treated like Ctrl-C, so that both leave finished work saved.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = command() or 0
    except ValueError as error:
        if os.environ.get("ASTARPO_TRACEBACK"):
            raise
        print(f"error: {error}\n(ASTARPO_TRACEBACK=1 shows where this comes from)", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted: finished work is saved; run the same command again to continue", file=sys.stderr)
        code = 130
    sys.exit(code)
