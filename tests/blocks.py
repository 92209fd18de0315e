"""The code blocks of README and of the pages of docs, and running those of one page as a reader does: in order, in one folder."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = ("bash", "python")
MARKS = ("needs a GPU", "needs the network", "changes the environment")
"""What the paragraph before a block says, for all to see, where the tests leave the block out."""
PRELUDE = """
set -euo pipefail
# A target of the Makefile is looked up and not made: `.ci/run` makes them.
make() { command make --dry-run --directory "$ROOT" "$@" > /dev/null; }
"""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language (`str`):
            The word after the fence; empty where there is none.
        title (`str`):
            The file that the block shows, from `title="..."`; empty where it shows none.
        text (`str`):
            What stands in it.
        before (`str`):
            The paragraph before it.
        line (`int`):
            Its line on the page.
    """

    language: str
    title: str
    text: str
    before: str
    line: int

    @property
    def is_run(self) -> bool:
        """Whether the tests run it."""
        return self.language in RUN and not any(mark in self.before for mark in MARKS)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for fence in FENCE.finditer(text):
        before = " ".join(text[end : fence.start()].strip().rpartition("\n\n")[2].split())
        title = re.search(r'title="([^"]+)"', fence["info"])
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(fence["language"], title[1] if title else "", fence["text"], before, line))
        end = fence.end()
    return found


def run_page(page: Path, folder: Path, timeout_s: float) -> str:
    """Run the blocks of a page in one shell; returns what they printed."""
    script = [PRELUDE]
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        if not block.is_run:
            continue
        script.append(f"echo '== {page.name}, line {block.line}'")
        if block.language == "bash":
            script.append(block.text)
        else:
            name = block.title or f"block_{block.line}.py"
            (folder / name).write_text(block.text, encoding="utf-8")
            script.append(f"python {name}")
    env = {**os.environ, "ROOT": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
    return ended.stdout
