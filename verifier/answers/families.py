r"""Letters that stand for nothing in particular: the argument of a function, the integer of a family, a free constant.

`f(z) = z` is `f(x) = x`, `n\pi` is `k\pi`, and "for all real x" adds nothing to a formula. A letter that the problem may
have named keeps its name: `2a` is not `2b`, `\pi s^2` is not `\pi t^2`, and `x = 2` is not `y = 2`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from .spelling import GREEK, MARKS, WORDS_CLOSE, WORDS_OPEN

_LETTER = rf"(?:\\(?:{GREEK})(?![a-zA-Z])|[a-zA-Z])"
_LETTERS = rf"{_LETTER}(?:\s*(?:,|\band\b)\s*{_LETTER})*(?![a-zA-Z])"
_KIND = (
    r"(?:(?:some|any|every|each|all|an?|the|arbitrary|fixed|positive|non-?\s?negative|non-?\s?zero|real|complex|rational|natural)\s+)*"
    r"(?:integers?|(?:real|complex|rational|natural)\s+numbers?|numbers?|reals?|constants?|parameters?)"
)
_SET = r"\\mathbb\s*\{?\s*[ZNRQC]\s*\}?(?:\s*[\^_]\s*(?:\{[^{}]*\}|\\cdot|\S))*"  # N^* has become N^\cdot
_LEAD = r"(?:\\forall|for\s+(?:all|any|every|each|some)|for|where|with|and)"
_QUALIFIER = re.compile(
    rf"[\s,;.]*(?P<open>\(?)\s*(?:"
    rf"(?:{_LEAD}\s*)?(?P<in>{_LETTERS})\s*(?:\\in|\bin)\s*(?P<set>{_SET})"
    rf"|(?:{_LEAD}\s*)?(?P<named>{_LETTERS})\s*(?:is|are|being|:)?\s*(?P<is>{_KIND})"
    rf"|{_LEAD}\s*(?P<kind>{_KIND})\s*(?P<those>{_LETTERS})"
    rf"|(?:\\forall|for\s+(?:all|any|every|each))\s*(?P<all>{_LETTERS})"
    rf")\s*(?P<close>\)?)[\s,;.]*"
)
_DOMAINS = (
    (r"\\mathbb\{?N\}?(?:\^\{?(?:\\cdot|\+)\}?|_\{?\+\}?)?|\\mathbb\{?Z\}?[\^_]\{?\+\}?", "positive integer"),
    (r"\\mathbb\{?Z\}?_\{?(?:\\ge)0\}?|\\mathbb\{?N\}?_\{?0\}?", "non-negative integer"),
    (r"\\mathbb\{?Z\}?", "integer"),
    (r"\\mathbb\{?R\}?", "real"),
    (r"\\mathbb\{?Q\}?", "rational"),
    (r"\\mathbb\{?C\}?", "complex"),
)
_INDICES = frozenset("ijklmnpq")
_ARGUMENTS = frozenset("xyztsuvwnmkr")
_CONSTANTS = frozenset("cCkK")
_PARAMETERS = frozenset("knmltsu") | {"\\lambda", "\\mu"}
_INTEGERS = frozenset("knml")
_CONSTANT = re.compile(r"[cCkK]_\{\w\}")
_SYMBOL = re.compile(
    rf"{WORDS_OPEN}[^{WORDS_CLOSE}]*{WORDS_CLOSE}|\\mathbb\s*\{{?\s*[A-Z]\s*\}}?|\\(?:{GREEK})(?![a-zA-Z])|\\[a-zA-Z]+"
    r"|(?P<base>[a-zA-Z])_\{(?P<index>\w+)\}|[a-zA-Z]"
)
_DEFINED = re.compile(
    r"(?<![a-zA-Z\\])(?:(?P<function>[a-zA-Z])\(\s*(?P<arguments>[a-zA-Z](?:\s*,\s*[a-zA-Z])*)\s*\)"
    r"|(?P<sequence>[a-zA-Z])_\{?(?P<index>[a-z])\}?)\s*(?==)"
)
_NAME = re.compile(r"^(?:[a-zA-Z](?:_\{\w+\})?|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\))\s*=")
MAX_RENAMED = 2
"""More letters than this are not tried in every order."""


@dataclass(frozen=True, slots=True)
class Qualifier:
    """What an answer says of its letters: `k \\in \\mathbb{Z}`.

    Attributes:
        letters (`frozenset[str]`):
            The letters.
        domain (`str`):
            What kind of number they are ("integer"); empty for any.
    """

    letters: frozenset[str]
    domain: str

    @property
    def goes_without_saying(self) -> bool:
        """Whether an answer that leaves it out says the same: n and k are integers by custom, x and c are real."""
        if self.letters <= _INDICES and self.domain in ("integer", "positive integer", "non-negative integer"):
            return True
        return self.domain in ("", "real")


def unqualified(text: str) -> tuple[str, Qualifier | None]:
    r"""Take "for all real x", `k \in \mathbb{Z}` and their like off the end of an answer.

    Conditions that restrict ("for x > 0") are no qualifiers, and neither is what is said of the unknown itself
    (`x > 0, x \in \mathbb{Z}`) or of a letter that does not occur (`x = 0, y \in \mathbb{R}`).

    Args:
        text (`str`):
            A cleaned answer.

    Returns:
        `tuple[str, Qualifier | None]`: The answer without its qualifier, and that; None without one.
    """
    plain = re.sub(MARKS, " ", text)
    for match in re.finditer(r"[\s,;.(]*(?:\\forall|\b(?:for|where|with)\b|[,;(]|\s(?=\\?[a-zA-Z]+\s*\\in))", plain):
        found = _QUALIFIER.fullmatch(plain, match.start())
        if found is None or bool(found["open"]) != bool(found["close"]):
            continue
        said = found["in"] or found["named"] or found["those"] or found["all"]
        letters = frozenset(re.findall(_LETTER, re.sub(r"\band\b", " ", said)))
        head = text[: match.start()]
        if head.count(WORDS_OPEN) > head.count(WORDS_CLOSE):
            head += WORDS_CLOSE
        body = re.sub(rf"{WORDS_OPEN}\s*{WORDS_CLOSE}", "", head).strip()
        value = _NAME.sub("", body)
        name = re.sub(r"_\{\w+\}", "", body[: len(body) - len(value)])  # the index of a sequence is no unknown
        unknowns = set(re.findall(_LETTER, name)) if name else _bounded(body)
        indexed = re.match(r"[a-zA-Z]_\{?([a-z])\}?\s*=", body)
        if letters <= _occurring(body) | {*(indexed[1] if indexed else "")} and not letters & unknowns:
            return body, Qualifier(letters, _domain(found["set"], found["is"] or found["kind"]))
    return text, None


def _bounded(body: str) -> set[str]:
    """The unknowns of inequalities: what `x > 0` speaks of."""
    return _occurring(body) if re.search(r"[<>]|\\(?:le|ge|ne|in)(?![a-zA-Z])", body) else set()


def _domain(numbers: str | None, words: str | None) -> str:
    if numbers is not None:
        bare = numbers.replace(" ", "")
        return next((name for pattern, name in _DOMAINS if re.fullmatch(pattern, bare)), bare)
    said = re.sub(r"\b(?:some|any|every|each|all|an?|the|arbitrary|fixed|numbers?)\b", " ", words or "")
    said = re.sub(r"non-?\s?(?=negative|zero)", "non-", said).replace("integers", "integer").replace("reals", "real")
    said = re.sub(r"\b(?:constant|parameter)s?\b", " ", said).replace("natural", "positive integer")
    return " ".join(said.split())


def agree(one: Qualifier | None, other: Qualifier | None) -> bool:
    """Whether two qualifiers do not contradict each other; one that goes without saying may be left out."""
    if one is not None and other is not None and one.domain == other.domain:
        return True
    return all(said is None or said.goes_without_saying for said in (one, other)) and (
        one is None or other is None or "" in (one.domain, other.domain)
    )


def respelt(gold: str, answer: str, declared: tuple[Qualifier | None, Qualifier | None]) -> Iterator[str]:
    """The answer with its bound letters called as in the gold answer, one spelling after another.

    Args:
        gold (`str`):
            The cleaned gold answer, without its qualifier.
        answer (`str`):
            The cleaned answer, without its qualifier.
        declared (`tuple[Qualifier | None, Qualifier | None]`):
            What both say of their letters.
    """
    mine, theirs = _arguments(gold), _arguments(answer)
    names: dict[str, str] = {}
    if mine and mine.keys() == theirs.keys():
        if any(len(mine[function]) != len(theirs[function]) for function in mine):
            return
        for function in mine:
            names |= dict(zip(theirs[function], mine[function], strict=True))
        bound = {*names, *names.values()}
        # A letter that is free in the answer would be captured; what is said of f(a) may be said of a alone.
        if len(set(names.values())) != len(names) or (set(names.values()) - set(names)) & _occurring(answer):
            return
        defines = set(names) <= _occurring(_values(answer)) or bound <= _ARGUMENTS
        if not defines:
            return
    renamed = _renamed(answer, names)
    if renamed != answer:
        yield renamed
    arguments = set(names.values())
    here, there = (_occurring(_NAME.sub("", text)) - arguments for text in (gold, renamed))
    mine_only, theirs_only = sorted(here - there), sorted(there - here)
    if len(mine_only) != len(theirs_only) or not 0 < len(mine_only) <= MAX_RENAMED:
        return
    either = {*mine_only, *theirs_only}
    if either & {
        letter for text in (gold, answer) for name in [_NAME.match(text)] if name for letter in _occurring(name[0])
    }:
        return
    constants = bool(arguments) and here == set(mine_only) and bool(either & _CONSTANTS)
    integration = bool(here & there) and all(_CONSTANT.fullmatch(letter) for letter in either)
    said = all(
        qualifier is not None and set(letters) <= qualifier.letters
        for qualifier, letters in zip(declared, (mine_only, theirs_only), strict=True)
    )
    family = (
        len(mine_only) == 1
        and here == set(mine_only)
        and _is_family(gold, mine_only[0])
        and _is_family(renamed, theirs_only[0])
    )
    if constants or integration or said or family:
        for order in permutations(mine_only):
            yield _renamed(renamed, dict(zip(theirs_only, order, strict=True)))


def _is_family(text: str, letter: str) -> bool:
    """Whether a letter runs through a family: angles a whole multiple of π or of some degrees apart, or a tuple with a parameter
    in several of its places."""
    value = re.sub(r"\s|\\cdot|\\times", "", _NAME.sub("", text))
    places = re.split(r",", value[1:-1]) if re.fullmatch(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", value) else []
    if letter in _PARAMETERS and sum(letter in _occurring(place) for place in places) > 1:
        return True
    whole = rf"\d*{letter}|{letter}\d*|\(\d*{letter}[+-]\d+\)"
    turn = rf"(?:{whole})\\pi|\d*\\pi(?:{whole})|\\frac\{{(?:{whole})\\pi\}}\{{\d+\}}|(?:{whole})\d+°|\d+°(?:{whole})"
    return (
        letter in _INTEGERS
        and len(re.findall(letter, value)) == 1
        and re.search(rf"(?:^|[-+]){turn}(?:[-+]|$)", value) is not None
    )


def _arguments(text: str) -> dict[str, list[str]]:
    """The letters that functions and sequences are defined with: f(x, y) = ... has x and y, a_n = ... has n."""
    found: dict[str, list[str]] = {}
    for match in _DEFINED.finditer(text):
        letters = re.split(r"\s*,\s*", match["arguments"]) if match["function"] else [match["index"]]
        name = match["function"] or f"{match['sequence']}_"
        if len(set(letters)) != len(letters) or found.setdefault(name, letters) != letters:
            return {}
    return found


def _values(text: str) -> str:
    return _DEFINED.sub(" ", text)


def _occurring(text: str) -> set[str]:
    """The letters of a text, as symbols: those of indices too, but no function that is defined, no e and no i."""
    functions = {match["function"] or match["sequence"] for match in _DEFINED.finditer(text)}
    found: set[str] = set()
    for match in _SYMBOL.finditer(text):
        name = match[0]
        if match["base"]:
            found |= {name, match["index"]} if not match["index"].isdigit() else {name}
        elif name[0] not in (WORDS_OPEN, "\\") or re.fullmatch(rf"\\(?:{GREEK})", name):
            found.add(name)
    return found - functions - {"e", "i"}


def _renamed(text: str, names: dict[str, str]) -> str:
    def rename(match: re.Match[str]) -> str:
        if match["base"] and match["index"] in names:
            return f"{match['base']}_{{{names[match['index']]}}}"
        name = names.get(match[0])
        return match[0] if name is None else f"{name} " if name[0] == "\\" else name

    return _SYMBOL.sub(rename, text)
