r"""Solutions that name their unknowns: `x = 1, y = 2`, `(x, y) = (1, 2)`, `x = y = 4`, and several of them.

`p = 5, q = 2; p = 7, q = 2` is two solutions of two unknowns; as tuples they are (5, 2) and (7, 2).
"""

import re

from .forms import Bracketed, Form, Listing, Named

Solution = dict[str, Form]
"""Unknowns and their values: a tuple's as written, others in the order of their names, so that `y = 2, x = 1` is (1, 2)."""


def unknowns(name: str) -> list[str]:
    """The single names in what a value is the value of: `(x,y)`, `x=y`, `x`."""
    if name.startswith("(") and name.endswith(")"):
        return name[1:-1].split(",")
    return name.split("=")


def solutions(form: Form) -> list[Solution] | None:
    """The solutions that an answer states, each with the same two or more unknowns; None for other answers."""
    found: list[Solution] = [{}]
    loose = True
    for item in form.items if isinstance(form, Listing) else (form,):
        if not isinstance(item, Named) or item.relation != "=":
            return None
        names = unknowns(item.name)
        contents: tuple[Form, ...] = (item.content,) * len(names)
        if item.name.startswith("("):
            if not isinstance(item.content, Bracketed) or len(item.content.items) != len(names):
                return None
            contents, loose = item.content.items, False
        for name, content in zip(names, contents, strict=True):
            if name in found[-1]:
                found.append({})
            found[-1][name] = content
    complete = all(solution.keys() == found[0].keys() for solution in found)
    if not complete or len(found[0]) < 2:
        return None
    return [{name: solution[name] for name in sorted(solution, key=_order)} for solution in found] if loose else found


def are_members(solution: Solution) -> bool:
    """Whether the names only count the answers: x_1 and x_2, which have no order."""
    return len({stem(name) for name in solution}) == 1


def is_same_unknown(items: tuple[Form, ...]) -> bool:
    """Whether all items are values of one unknown: `x = 1, x = 2` or `x_1 = 1, x_2 = 2`."""
    named = [item for item in items if isinstance(item, Named) and item.relation == "="]
    return len(named) == len(items) and len({stem(item.name) for item in named}) == 1


def stem(name: str) -> str:
    """A name without its number: x for x_1."""
    return re.sub(r"_\{?\d+\}?$", "", name)


def _order(name: str) -> tuple[str, int]:
    number = re.search(r"_\{?(\d+)\}?$", name)
    return stem(name), int(number[1]) if number else 0
