"""Verdicts about an answer: "The answer is correct.", "This answer isn't right because …". One reading for the grader, which
cuts them out before it looks for the answer, and for PAG's lenient parser, which looks for nothing else."""

import re

ABOUT_AN_ANSWER = (
    r"answer\s+(?:(?:above|given)\s+)?is(?P<contracted>n['’]t\b)?[\s*_\"'(:]{1,5}"
    r"(?:(?:therefore|thus|hence|indeed|actually|still|also|certainly|definitely)\s+)?"
    r"(?P<negated>[*_\"']{0,3}not[*_\"']{0,3}\s+)?[*_\"']{0,4}(?P<said>correct|right|incorrect|wrong)\b"
)
"""What such a sentence says, from the word "answer" on: a pattern to build others from, for any case."""


def says_correct(verdict: re.Match[str]) -> bool:
    """Whether a match of a pattern with `ABOUT_AN_ANSWER` calls the answer correct: "not wrong" does."""
    is_negated = bool(verdict["negated"]) != bool(verdict["contracted"])
    return (verdict["said"].lower() in ("correct", "right")) != is_negated
