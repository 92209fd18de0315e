"""`astarpo recipe`: where a file that comes with astarpo lies, to copy it or to launch with it."""

import argparse
import sys
from pathlib import Path

from ..cli import run_command, suggestion


def names() -> dict[str, Path]:
    """The recipes by name, and the files for `accelerate launch` as `accelerate/NAME`."""
    folder = Path(__file__).parent
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def show(words: list[str]) -> int:
    """Print the path of the file that is named, or all names."""
    parser = argparse.ArgumentParser(
        prog="astarpo recipe",
        description="Print the path of a recipe, or of a file for accelerate; without a name, print all names. "
        "cp $(astarpo recipe t4_math) mine.yaml; accelerate launch --config_file $(astarpo recipe accelerate/ddp) ...",
    )
    parser.add_argument("name", nargs="?", help="such as t4_math or accelerate/ddp")
    name, known = parser.parse_args(words).name, names()
    if name is None:
        print("\n".join(known))
        return 0
    if name not in known:
        raise ValueError(f"There is no recipe `{name}`.{suggestion(name, known)} Names: {', '.join(known)}.")
    print(known[name])
    return 0


def main() -> None:
    """Entry point of `astarpo recipe`."""
    run_command(lambda: show(sys.argv[1:]))


if __name__ == "__main__":
    main()
