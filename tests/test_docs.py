"""What the pages say of the code is so: the verifier's tables, the messages in troubleshooting, the options of every command shown."""

import ast
import re
import subprocess
import sys
from functools import cache

import pytest
from blocks import MARKS, PAGES, README, ROOT, RUN, blocks

from astarpo.verifier import grade

PAGE = (ROOT / "docs" / "verifier.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|", PAGE, re.MULTILINE)
SHOWN = ("bibtex", "csv", "diff", "json", "math", "text", "yaml")
"""Languages of blocks that are looked at and not run."""
SUBCOMMANDS = "compare|verify|regrade|summary|publish|import"
COMMAND = re.compile(rf"\bastarpo[ -](train|rollout|eval|plan|export)\b(?! (?:{SUBCOMMANDS})\b)((?:\\\n|[^`\n|])*)")
"""A command of ours, in a block or in a line, with its options."""


def test_the_tables_are_found():
    assert len(ROWS) > 40


@pytest.mark.parametrize(("gold", "answer", "same"), ROWS)
def test_a_row_of_the_conventions(gold, answer, same):
    assert grade(rf"\boxed{{{answer}}}", gold).outcome == ("correct" if same == "yes" else "wrong")


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_a_block_is_run_or_says_why_not(page):
    """No block escapes the tests by the name of its language, and a mark stands only where there is something to run."""
    for block in blocks(page):
        if block.language not in RUN:
            assert block.language in ("", *SHOWN), f"{page.name}, line {block.line}: {block.language}"
            assert not re.match(r"(\$ |astarpo|make |pip |python )", block.text), f"{page.name}, line {block.line}"
        elif "pip " in block.text or "Qwen/" in block.text or "docker " in block.text or "vllm serve" in block.text:
            assert any(mark in block.before for mark in MARKS), f"{page.name}, line {block.line}"


@cache
def spoken() -> list[str]:
    """Every string of the code, those between the braces of f-strings one by one."""
    found = []
    for part in ("astarpo", "rollout", "trainer", "verifier"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(" ".join(node.value.split()))
    return found


MESSAGES = [
    " ".join(block.text.split())
    for name in ("troubleshooting.md", "fresh.md")
    for block in blocks(ROOT / "docs" / name)
    if block.language == "text"
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_one_of_the_code(message):
    """`…` stands for what differs from run to run."""
    parts = [part.strip() for part in message.split("…") if len(part.strip()) > 7]
    assert parts
    for part in parts:
        assert any(part in text for text in spoken()), part


@cache
def known_options(command: str) -> set[str]:
    words = [sys.executable, "-m", "astarpo", command, "--help_all"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    return {"config", "help", "help_all", "verbose", *re.findall(r"^ +--(\w+)", shown, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_option_that_is_shown_exists(page):
    """Those of blocks that need a GPU too, and of commands in the text."""
    for command, words in COMMAND.findall(page.read_text(encoding="utf-8")):
        given = {name.replace("-", "_") for name in re.findall(r"--([a-z][\w-]*)", words)}
        aliases = {"model"} if command == "plan" else set()
        assert given - aliases <= known_options(command), f"{page.name}: astarpo {command} {words.strip()}"
