"""The tables in docs/verifier.md say what the verifier does."""

import re
from pathlib import Path

import pytest

from astarpo.verifier import grade

PAGE = (Path(__file__).parent.parent / "docs" / "verifier.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|", PAGE, re.MULTILINE)


def test_the_tables_are_found():
    assert len(ROWS) > 40


@pytest.mark.parametrize(("gold", "answer", "same"), ROWS)
def test_a_row_of_the_conventions(gold, answer, same):
    assert grade(rf"\boxed{{{answer}}}", gold).outcome == ("correct" if same == "yes" else "wrong")
