r"""A second opinion on answers: normalised exact match, in the style of the PRM800K grader.

It shares no code with the verifier, on purpose: where the two disagree, one of them is wrong. It knows no algebra, so
that it misses equal answers in other forms; it is good at finding answers that the verifier wrongly rejects.
"""

import re

_STATED = re.compile(r"(?:answer\s*(?:is|:)|####)\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_DROPPED = (
    "\\left",
    "\\right",
    "\\displaystyle",
    "\\!",
    "\\,",
    "\\;",
    "\\:",
    "\\ ",
    "$",
    "\\%",
    "%",
    "\\$",
    "^\\circ",
    "^{\\circ}",
    "\\degree",
    "~",
)


def second_opinion(completion: str, gold: str) -> tuple[bool, str]:
    """Whether a completion's answer is the gold answer by normalised exact match, and the text that was compared.

    Args:
        completion (`str`):
            What the policy wrote.
        gold (`str`):
            The gold answer.
    """
    answer = _answer(completion)
    return normalise(answer) == normalise(gold) and bool(normalise(gold)), answer


def _answer(completion: str) -> str:
    """The last box; without one the last stated answer; without one the last number."""
    text = completion.rpartition("</think>")[2]
    _, box, after = text.rpartition("\\boxed{")
    if box:
        depth = 1
        for index, char in enumerate(after):
            depth += (char == "{") - (char == "}")
            if depth == 0:
                return after[:index]
        return ""
    stated = _STATED.findall(text)
    if stated:
        return stated[-1].strip().removesuffix(".")
    numbers = _NUMBER.findall(text[-2_000:])
    return numbers[-1] if numbers else ""


def normalise(answer: str) -> str:
    """One spelling for the usual ones: no spaces, sizes, units in words; `\\frac{a}{b}` for all fractions."""
    text = answer.strip()
    for mark in _DROPPED:
        text = text.replace(mark, "")
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{\s*([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^[a-zA-Z]\s*=\s*", "", text)
    text = re.sub(r"(?<=\d)\s*(?:[a-zA-Z]{2,}\.?\s*)+(?:\^\{?\d\}?)?$", "", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,)(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(
        r"^(-?)(\d*)\.(\d*?)0*$",
        lambda match: f"{match[1]}{match[2] or '0'}" + (f".{match[3]}" if match[3] else ""),
        text,
    )
    return text.lower() if re.fullmatch(r"[A-Za-z]{2,}", text) else text
