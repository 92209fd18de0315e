"""Characters of a cleaned answer that stand for what LaTeX has no single character for (private use, so nobody writes them)."""

WORDS_OPEN, WORDS_CLOSE = "\ue000", "\ue001"
"""Around words, so that no later step can read "even" as the product of four variables."""
MARKS = f"[{WORDS_OPEN}{WORDS_CLOSE}]"
DOLLAR = "\ue002"
"""A currency sign, as opposed to the `$` that delimits mathematics."""
ROW_BREAK = "\ue003"
"""The `\\\\` of a matrix."""
