r"""Which text of a completion is its answer.

Plain string handling in time proportional to the text, since it runs in the caller on whatever a policy writes.
"""

import re
from collections import deque

from .verdicts import ABOUT_AN_ANSWER, says_correct

MAX_COMPLETION_CHARS = 100_000
"""Of a longer completion only the end is read: that is where answers stand."""
MAX_ANSWER_CHARS = 2_000
"""A longer answer is not parsed: no gold answer is near this long, and parsing cost grows with it."""

_THINK = re.compile(r"<(/?)think(?:ing)?\s*>", re.IGNORECASE)
_CHAT_TOKENS = re.compile(r"(?:\s*(?:<\|[a-z_]{1,20}\|>|</?s>|<eos>|<end_of_turn>|\[EOS\]))+\s*\Z")
_BOX_PART = re.compile(r"\\(?:boxed|fbox)\s*\{|\\boxed\s+(?=[^\s{])|\\.|[{}]", re.DOTALL)
# Between two boxes of one answer: "$\boxed{1}$, $x_2 = \boxed{2}$", "\boxed{1} or maybe \boxed{2}", list items.
_SAME_ANSWER = re.compile(
    r"(?:[\s$,;&/|*•-]|\\[()\[\],;: \\]|\\(?:quad|qquad|text\{\s*(?:and|or)?\s*,?\s*\})|\([^()]{0,40}\)|\.(?=\s*or\b)"
    r"|\b(?:and|or|also|maybe|possibly|perhaps|either|alternatively|vs|versus)\b\.?"
    r"|\b(?:answer|option|choice|case|solution)\s*(?:\d|[A-D])?\s*[:.)]|\b\d[.)]|[a-zA-Z](?:_\{?\w\}?)?\s*=)*",
    re.IGNORECASE,
)


def visible(completion: str) -> str:
    """The completion without its reasoning in `<think>`: what stands behind the last closed one, up to a new one."""
    tags = list(_THINK.finditer(completion)) if "<" in completion else []
    start = max((tag.end() for tag in tags if tag[1]), default=0)
    end = next((tag.start() for tag in tags if tag.start() >= start and not tag[1]), None)
    seen = completion[start:end].rstrip()
    ending = _CHAT_TOKENS.search(seen, max(len(seen) - 200, 0)) if seen.endswith((">", "]")) else None
    return seen[: ending.start()] if ending else seen


def boxes(text: str) -> list[tuple[int, int, str | None]]:
    r"""All outermost `\boxed{...}` in `text`: start, end and content, in order. A box that never closes has no content."""
    first = text.find("\\boxed")
    other = text.find("\\fbox")
    if first < 0 or 0 <= other < first:
        first = other
    found: list[tuple[int, int, str | None]] = []
    if first < 0:
        return found
    open_boxes: list[tuple[int, int, int]] = []  # start, start of the content, depth of braces
    depth = 0
    for match in _BOX_PART.finditer(text, first):
        part = match[0]
        if part.startswith(("\\boxed", "\\fbox")):
            if part[-1] != "{":
                bare = re.compile(r"[^\s$]+").match(text, match.end())
                if bare is not None and not open_boxes:
                    found.append((match.start(), bare.end(), bare[0].rstrip(".,")))
                continue
            open_boxes.append((match.start(), match.end(), depth))
            depth += 1
        elif part == "{":
            depth += 1
        elif part == "}":
            depth -= 1
            if open_boxes and open_boxes[-1][2] == depth:
                start, content, _ = open_boxes.pop()
                while found and found[-1][0] > start:  # boxes inside this one
                    found.pop()
                found.append((start, match.end(), text[content : match.start()].strip()))
    found += [(start, len(text), None) for start, content, _ in open_boxes]
    return sorted(found, key=lambda box: box[0])


def last_box(text: str) -> str | None:
    r"""The answer in the last `\boxed{...}` of `text`, or None where there is none or the last one never closes.

    An unterminated box is a completion that was cut while stating its answer; an earlier box was not its last word.
    Boxes that stand side by side ("\boxed{1} or \boxed{2}") are one answer with several values.
    """
    return _last_of([box for box in boxes(text) if box[2] != ""], text)


def _last_of(found: list[tuple[int, int, str | None]], text: str) -> str | None:
    """The answer in the last of the boxes that were found in `text`, empty ones left out."""
    start, _, content = found[-1] if found else (0, 0, None)
    if content is None:
        return None
    values = [content]
    for earlier_start, earlier_end, earlier in reversed(found[:-1]):
        between = text[earlier_end:start]
        if earlier is None or len(between) > 80 or _SAME_ANSWER.fullmatch(between) is None:
            break
        if earlier not in values:
            values.append(earlier)
        start = earlier_start
    separator = "; " if any("," in value for value in values) else ", "
    return separator.join(reversed(values))


_STATEMENT = re.compile(
    r"####[ \t]*(?P<marked>)|^[ \t]*A:[ \t]*(?P<short>)|<answer>\s*(?P<tagged>)|"
    r"(?:option|choice)\s+(?=\(?[A-J]\)?\s+is\s+(?:the\s+)?(?:correct|right))(?P<chosen>)|"
    r"(?<![a-zA-Z])(?:answers?|(?:correct|right|best)\s+(?:option|choice)|final\s+result|the\s+solution)[*_\"']*(?:\s+(?:to|for|of|in)\s+[^.\n?!:=]{1,80}?)?[*_\"']*\s*"
    r"(?:(?:\bis|\bare|\b(?:must|should|would|will|has\s+to)\s+be|\bequals|\bcomes\s+(?:out\s+)?to|\bturns\s+out\s+to\s+be)(?![a-zA-Z])\s*:?|:|=)"
    r"[*_\"'\s]*(?:(?:therefore|thus|then|simply|just|exactly|indeed|clearly|hence|given\s+by|equal\s+to)\b[,:]?\s*)?(?P<stated>)|"
    r"^[#*_ \t]*(?:the\s+)?final\s+answer[*_ \t]*\n\s*(?P<headed>)",
    re.IGNORECASE | re.MULTILINE,
)
_VALUE_START = re.compile(
    r"\s*(?:(?:and|or)\s+)*(?:[$\\({\[\d]|[-−+±.]\s*[\d$\\]|[a-zA-Z](?=\s*[=<>^_+*/]|\s*(?:[,.;]|$|and\b|or\b)))"
)
_CLAUSE_END = re.compile(
    r"[.!?](?=[\s\"'*_)]|$)|\n|[,;]|\s(?:and|because|since|as|so|which|where|for|by)\b|\s[-–—]\s|\s\(|</answer>"
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"'*_)]|$)|\n")
_EXPLANATION = re.compile(r"\b(?:because|since|as|so|which|where)\b")
_ALTERNATIVE = re.compile(r"\bor\b\s+(?:[a-zA-Z]+\s+){0,2}[\d$\\(+-]|\b(?:otherwise|unless)\b")
_MATH_SPAN = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)
# "The answer is correct.", "…, so this answer is not right because …": a verdict about an answer, as PAG's episodes end with.
_VERDICT = re.compile(
    r"(?:[,;(]\s*)?[*_\"'(]{0,4}\b(?:(?:so|yes|no|and|but|thus|hence|therefore|wait|ok|okay)\b[,:.]?\s+){0,3}"
    rf"(?:the|this|that|my|your|our)\s+(?:(?:final|first|given|previous|above)\s+)?{ABOUT_AN_ANSWER}[*_\"')]{{0,4}}"
    r"(?:[.!]+[*_\"')]{0,4}|\s*(?:\n|\Z)|,?\s+(?:because|since|as)\b[^.!?\n]*[.!]?)",
    re.IGNORECASE,
)
_ASSUMED = re.compile(r"\b(?:suppos|assum)(?:e|ing)\b[^.!?\n]*\bthat\s+(?:(?:the|my|our)\s+)?\Z", re.IGNORECASE)
MAX_STATEMENT_CHARS = 400
MAX_STATEMENTS = 20


def _statement(text: str) -> str | None:
    """The last clear statement of an answer: "#### 5", "The answer is 5", "A: 5"."""
    for match in reversed(deque(_STATEMENT.finditer(text), maxlen=MAX_STATEMENTS)):
        if _ASSUMED.search(text, max(0, match.start() - 80), match.start()):
            continue
        rest = text[match.end() : match.end() + MAX_STATEMENT_CHARS]
        if match.lastgroup == "marked":
            stated = _bare(rest.partition("\n")[0])
        elif match.lastgroup == "chosen":
            stated = rest.partition(" ")[0]
        else:
            stated = _clause(rest)
        if stated:
            return stated
    return None


def _clause(text: str) -> str | None:
    """The answer at the start of `text`: up to where the sentence, or an explanation behind the answer, begins."""
    text = text.lstrip()
    end = _first_end(text)
    mark = text[end : end + 1]
    if mark == "?":
        return None
    # "5, or alternatively 6" and "5 (or 6 if x > 0)" state two values: the whole sentence is the answer.
    sentence = _SENTENCE_END.search(text, end)
    rest = _EXPLANATION.split(text[end : sentence.start() if sentence else len(text)])[0]
    return _bare(text[:end] + (rest if _ALTERNATIVE.search(rest) else ""))


def _first_end(text: str) -> int:
    spans = {match.start(): match.end() for match in _MATH_SPAN.finditer(text)}
    position = 0
    while position < len(text):
        match = None if position in spans else _CLAUSE_END.match(text, position)
        if match is not None and not _goes_on(text, match):
            return position
        position = spans[position] if position in spans else match.end() if match else position + 1
    return len(text)


def _goes_on(text: str, end: re.Match[str]) -> bool:
    """Whether what looks like the end of the answer is inside it: in a list, in a grouped number, before the value."""
    mark = end[0].strip()
    if mark == "(":
        return not text[: end.start()].strip()
    grouped = mark == "," and re.match(r"\d{3}(?!\d)", text[end.end() :]) is not None
    return grouped or (mark in (",", ";", "and") and _VALUE_START.match(text, end.end()) is not None)


def _bare(text: str) -> str | None:
    text = text.strip().strip("*_\"'` ").rstrip("!").strip()
    text = text.removesuffix(".").strip("*_\"' ")
    return text or None


_NUMBER = r"[-−+]?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?\s*(?:\\?%)?"
_VALUE = rf"(?P<answer>\$[^$\n]+\$|\\\([^\n]+?\\\)|{_NUMBER}|[-−+]?\\frac\{{\d+\}}\{{\d+\}})"
_ONLY_VALUE = re.compile(rf"\s*(?:[a-zA-Z]\s*=\s*)?{_VALUE}\s*\.?\s*")
_ARITHMETIC = (
    r"(?:[\d\s.,+\-−*/×÷·()^]|\bx\b|\\times|\\cdot|\b(?:times|plus|minus|multiplied|divided|by|product|sum|difference|quotient|result|total|"
    r"of|and|the|multiplying|adding|subtracting|dividing|from|so|therefore|thus|hence)\b)+"
)
_COMPUTED = re.compile(
    rf"(?=(?:[^\d]*(?<![\d.,])\d[\d.,]*){{3}}){_ARITHMETIC}(?:\bis\b|\bare\b|\bequals\b|\bgives\b|=)\s*\**\s*{_VALUE}\**",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(
    r"(?:(?:so|thus|therefore|hence|in total|altogether|consequently|finally|in conclusion|the (?:final )?result)\b"
    r"(?![^\n]*\b(?:if|find)\b)[^\n]*?|the (?:[a-z]+ ){0,2}number of\b(?:(?!\b(?:is|are|not|if|when|at|whose|where|which|that|such|given|"
    r"suppose|unless|but|with|depends)\b)[^\n;:=])*?)"
    rf"(?:\bis\b|\bare\b|\bequals\b|\bgives\b|(?:^|[\s,$])[a-zA-Z]\s*=)\s*\**\s*{_VALUE}\**",
    re.IGNORECASE,
)


def _conclusion(text: str) -> str | None:
    """What the last sentence computes or concludes: "7 times 8 is 56.", "So the total is 42."; or a lone value."""
    text = text.strip()
    if len(text) <= MAX_STATEMENT_CHARS and (lone := _ONLY_VALUE.fullmatch(text)):
        value = lone["answer"].strip()
        # "$7 \\times 8$" alone restates the question.
        return (
            None if value[0] in "$\\" and re.search(r"[+*/×÷·=]|(?<=.)-|\\(?:times|cdot|div|pm)", value[1:]) else value
        )
    line = text[-MAX_STATEMENT_CHARS:].rpartition("\n")[2].rstrip(" .*")
    sentence = re.split(r"[.!?]\s", line)[-1].strip().lstrip("*")
    clause = re.split(r",\s+(?=(?:so|thus|hence|therefore)\s+the\b)", sentence)[-1]
    match = _COMPUTED.fullmatch(sentence) or _CONCLUDED.fullmatch(clause)
    return match["answer"].strip() if match else None


def _without_verdicts(text: str) -> tuple[str, str]:
    """`text` without verdicts about an answer, and without what stands before one that rejects it; and from the last verdict on."""
    rejected, last = 0, len(text)
    for verdict in _VERDICT.finditer(text):
        if not says_correct(verdict):
            rejected = verdict.end()
        last = verdict.start()
    return _VERDICT.sub("\n", text[rejected:]), text[last:]


def extract_answer(completion: str) -> str | None:
    r"""Find the text that a completion gives as its final answer.

    The rules, in order: reasoning inside `<think>` does not count; the last `\boxed{...}` decides, also when it is
    cut off; without any box, the last clear final statement (`#### 5`, "The answer is 5"); without one, a last sentence
    that computes or concludes ("7 times 8 is 56.", "So the total is 42."), or a completion that is nothing but a value.
    A verdict ("The answer is correct.") is an answer only where there is no other; one that rejects takes back all before it.

    Args:
        completion (`str`):
            What the policy wrote, without the prompt.

    Returns:
        `str` or `None`: The answer's text, or `None` when the completion states none.
    """
    text = visible(completion)[-MAX_COMPLETION_CHARS:]
    if "boxed" in text or "fbox" in text:
        found = [box for box in boxes(text) if box[2] != ""]
        if found:
            return _last_of(found, text)
    judged, verdict = _without_verdicts(text)
    return _statement(judged) or _conclusion(judged) or _statement(verdict)


def extract_gold(text: str) -> str:
    r"""The gold answer in a data set's answer or worked solution.

    Args:
        text (`str`):
            An answer ("42"), or a worked solution that gives it after `####` (GSM8K) or in its last `\boxed{}` (MATH).

    Returns:
        `str`: The answer; empty when a worked solution's box never closes.
    """
    _, marker, after = text.rpartition("####")
    if marker:
        return after.strip()
    if boxes(text):
        return last_box(text) or ""
    return text.strip()
