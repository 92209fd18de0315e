"""The parser of the commands that sample or train: TRL's parser, with recipes and a help that people can read.

A recipe is a YAML file for several commands: keys at its top are shared, and each of the sections `rollout`, `train`, `eval`,
`plan` and `quickstart` belongs to one command. The command modules of `rollout` and `trainer` import this file. It imports
none of ours, and TRL only where a command line is parsed, so that `astarpo verify` starts without it.
"""

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import Enum
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

SECTIONS = ("plan", "rollout", "train", "eval", "quickstart")
DONE, FAILED, BAD_INPUT, TIME_IS_UP, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes of all commands. 75 is EX_TEMPFAIL: the time given by `--save_by` was up; run the same command again."""

# What `--help` shows of the hundred options of transformers' `TrainingArguments`. `--help_all` shows the others too.
TRAINING = (
    *("output_dir", "learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    *("save_steps", "eval_steps"),  # a run is resumed by the same command
)
LOGGING = ("logging_steps", "report_to", "push_to_hub")
REST = "the other options of transformers' TrainingArguments"
LAST_SECTIONS = ("training", "logging and hub", REST)


EXTRAS = {
    **dict.fromkeys(
        ("torch", "transformers", "trl", "datasets", "pyarrow", "peft", "safetensors", "accelerate", "yaml"), "train"
    ),
    **dict.fromkeys(("huggingface_hub", "filelock", "numpy", "gguf"), "train"),
    "vllm": "gpu",
    "httpx": "server",
    "ray": "ray",
    "matplotlib": "plot",
}
"""The extra that brings a package which `pip install astarpo` alone does not."""


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """The options of a dataclass, and their place in `--help`.

    Args:
        options (`type`):
            The dataclass.
        title (`str`, *optional*, defaults to `"options"`):
            Heading of its options in `--help`. Fields that a dataclass inherits from transformers' `TrainingArguments` have
            headings of their own.
        hidden (`Collection[str]`, *optional*):
            Names of options that only `--help_all` shows.
    """

    options: type
    title: str = "options"
    hidden: Collection[str] = ()


def parse_command(
    types: Iterable[type | OptionGroup],
    *,
    section: str,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    refused: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Parse a command line and its `--config` file into dataclasses.

    Args:
        types (`Iterable[type | OptionGroup]`):
            Dataclasses of the options, with or without a heading for `--help`.
        section (`str`):
            The command's section in a recipe.
        prog (`str`):
            Name of the command.
        description (`str`):
            Text at the top of `--help`.
        argv (`Sequence[str]`, *optional*):
            The words of the command line; `sys.argv[1:]` when not given.
        refused (`Mapping[str, str]`, *optional*):
            Options that this command does not take, and for each the sentence that says why. `--help` leaves them out.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        ValueError: If an option or a key of the config file is unknown, refused, missing or has a value that it cannot
            have, or if the config file is missing.
    """
    if sys.argv[0].startswith("astarpo "):  # set by `astarpo/__main__.py`: the user typed `astarpo train`
        prog = sys.argv[0]
    groups = [given if isinstance(given, OptionGroup) else OptionGroup(given) for given in types]
    words = list(sys.argv[1:] if argv is None else argv)
    refused = refused or {}
    parser = _parser([group.options for group in groups])
    config = _pop_config(words)
    if config is not None:
        settings = load_recipe(config, section)
        for name, value in settings.pop("env", {}).items():
            os.environ[name] = str(value)
        _check_names(parser, settings, refused, prog, config)
        parser.set_defaults_with_config(**settings)
        _check_choices(parser, config, settings)
    for word in ("-h", "--help", "--help_all", "--help-all"):
        if word in words:
            print(_help(parser, groups, prog, description, refused, is_whole="all" in word), flush=True)
            sys.exit(0)
    names = [_name(word) for word in words if word.startswith("--")]
    _check_names(parser, names, refused, prog)
    try:
        _, unused = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(f"{_one_spelling(str(error))}. `{prog} --help` lists the options.") from None
    if unused:
        raise ValueError(f"`{unused[0]}` belongs to no option. `{prog} --help` lists the options.")
    return parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)[: len(groups)]


def _parser(types: list[type]) -> Any:
    """TRL's parser for the dataclasses. A mistake raises `argparse.ArgumentError` instead of 200 lines of usage."""
    # TRL declares vLLM up to 0.31 and warns at every import; 0.32 is the pinned version, and the tests run on it.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise argparse.ArgumentError(None, message)

    return Parser(types, add_help=False, allow_abbrev=False)  # pyright: ignore[reportArgumentType]


def _name(word: str) -> str:
    """The name of an option as its field has it: `--max-steps=5` is `max_steps`."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def _one_spelling(message: str) -> str:
    """argparse's message with `--max_steps` where it says `--max_steps/--max-steps`."""
    return re.sub(r"(--\w+)(?:/--[\w-]+)+", r"\1", message)


def _check_names(
    parser: Any, names: Iterable[str], refused: Mapping[str, str], prog: str, config: str | None = None
) -> None:
    """Raise a `ValueError` for an option, of the command line or of a config file, that is refused or unknown."""
    known = {_name(spelling) for action in parser._actions for spelling in action.option_strings}
    prefix = "" if config else "--"
    for name in names:
        if name in refused:
            where = f" in config `{config}`" if config else ""
            raise ValueError(f"`{prefix}{name}`{where} is refused: {refused[name].rstrip('.')}. Remove it.")
        if name not in known:
            text = (
                f"Config `{config}` has a key that `{prog}` does not know: `{name}`."
                if config
                else f"`--{name}` is not an option of `{prog}`."
            )
            close = suggestion(name, {*known, *refused, "config", "help", "help_all", "verbose"}, prefix)
            raise ValueError(f"{text}{close} `{prog} --help` lists the options.")


def suggestion(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A sentence with the nearest of the names that are known; empty when none is near."""
    close = get_close_matches(word, sorted(known), n=1)
    return f" Did you mean `{prefix}{close[0]}`?" if close else ""


def _check_choices(parser: Any, config: str, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` for a recipe's value that its option cannot have: argparse looks only at the command line's."""
    for action in parser._actions:
        value = settings.get(action.dest)
        if action.choices and value is not None and str(value) not in map(str, action.choices):
            known = ", ".join(map(str, action.choices))
            raise ValueError(f"Config `{config}` has {action.dest} `{value}`. Choose one of: {known}.")


def _help(
    parser: Any, groups: list[OptionGroup], prog: str, description: str, refused: Mapping[str, str], *, is_whole: bool
) -> str:
    """The text of `--help`, or of `--help_all`.

    A second parser, which parses nothing, formats it: the first has two spellings of every option and no sections.
    """
    display = argparse.ArgumentParser(
        prog,
        f"{prog} [--config RECIPE] [--option VALUE ...]",
        description,
        "A switch is turned on by `--name` or `--name true` and off by `--name false`."
        + ("" if is_whole else " --help_all shows every option, and says more about each."),
        add_help=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32),
    )
    first = display.add_argument_group("recipe and help")
    first.add_argument(
        "--config",
        metavar="RECIPE",
        help=f"YAML file, or the name of a recipe that comes with astarpo: {', '.join(config_names())}. Options on the "
        "command line win over it.",
    )
    first.add_argument("--help", action="store_true", help="show the options that are used most")
    first.add_argument("--help_all", action="store_true", help="show every option")
    first.add_argument("--verbose", action="store_true", help="show what the libraries log, too")
    for title, actions in _sections(parser, groups, refused, is_whole).items():
        shown = display.add_argument_group(title)
        for action in actions:
            # For a first look one sentence is enough; transformers explains its options in paragraphs.
            shown.add_argument(f"--{action.dest}", metavar=_metavar(action), help=_help_line(action, not is_whole))
    return display.format_help()


def _sections(
    parser: Any, groups: list[OptionGroup], refused: Mapping[str, str], is_whole: bool
) -> dict[str, list[argparse.Action]]:
    """The options that are shown, by heading."""
    from transformers import TrainingArguments

    inherited = {field.name for field in fields(TrainingArguments)}
    # A switch that is on by default has a second action, `--no_NAME`, after its first.
    by_name = {action.dest: action for action in reversed(parser._actions)}
    sections: dict[str, list[argparse.Action]] = {}
    for group in groups:
        is_training = issubclass(group.options, TrainingArguments)
        for field in fields(group.options):
            name, title = field.name, group.title
            if is_training and name in inherited:
                title = "training" if name in TRAINING else "logging and hub" if name in LOGGING else REST
            is_hidden = title == REST or name in group.hidden
            if field.init and name not in refused and (is_whole or not is_hidden):
                sections.setdefault(title, []).append(by_name[name])
    own = {title: actions for title, actions in sections.items() if title not in LAST_SECTIONS}
    return own | {title: sections[title] for title in LAST_SECTIONS if title in sections}


def _metavar(action: argparse.Action) -> str:
    choices = ",".join(map(str, action.choices or ()))
    if choices:  # the forty optimizers are listed where one is misspelt
        return f"{{{choices}}}" if len(choices) < 60 else "NAME"
    kind = getattr(action.type, "__name__", "str")
    word = {"int": "N", "float": "X", "string_to_bool": "true|false"}.get(kind, "TEXT")
    return f"{word} ..." if action.nargs == "+" else word


def _help_line(action: argparse.Action, is_short: bool) -> str:
    """An option's help with its default, where that says something: None means that the help tells what happens."""
    text, default = " ".join((action.help or "").split()), action.default
    if is_short:
        text = re.split(r"(?<=\w\w[.)]) (?=[A-Z])", text)[0]
    if action.required:
        return f"{text} (required)"
    if default in (None, "", [], {}, argparse.SUPPRESS):
        return text
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, Enum):
        default = default.value
    elif isinstance(default, list):
        default = " ".join(map(str, default))
    return f"{text} (default: {str(default).replace('%', '%%')})"


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


def run_command(command: Callable[[], int | None], interrupted: str = "run the same command again") -> None:
    """Run a command's body and exit: a `ValueError` is bad input and prints as one paragraph with exit code 2.

    SIGTERM is treated like Ctrl-C, so that both leave finished work saved. What the library logs goes to stderr; what other libraries log
    is left out unless `--verbose` is among the words.

    Args:
        command (`Callable`):
            The body; returns the exit code, None for 0.
        interrupted (`str`, *optional*):
            What to do after Ctrl-C, and what is kept.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="%(message)s")  # of other libraries only warnings, as Python shows them by itself
    logging.getLogger("astarpo").setLevel(logging.INFO)
    if "--verbose" in sys.argv[1:]:
        sys.argv.remove("--verbose")
    elif not os.environ.get("ASTARPO_VERBOSE"):
        _silence_libraries()
    try:
        code = command() or DONE
    except ValueError as error:
        if os.environ.get("ASTARPO_TRACEBACK"):
            raise
        print(f"error: {error}\n(ASTARPO_TRACEBACK=1 shows where this comes from)", file=sys.stderr)
        code = BAD_INPUT
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS or os.environ.get("ASTARPO_TRACEBACK"):
            raise
        print(
            f'error: this needs the package `{package}`, which is not installed: pip install "astarpo[{EXTRAS[package]}]"',
            file=sys.stderr,
        )
        code = BAD_INPUT
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        print("error: whatever read the output has ended (broken pipe)", file=sys.stderr)
        # Else Python flushes into the pipe once more, at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def _silence_libraries() -> None:
    """Keep off stderr what the libraries say of themselves at every start; their errors still come through."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("vllm", "transformers", "trl", "torch", "datasets", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|trl|vllm|peft|accelerate|huggingface_hub|datasets)\b"
    )
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
