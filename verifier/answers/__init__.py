"""What an answer is and when two are the same.

A completion passes through these modules in this order: `extraction` finds the text that is its answer, `latex` brings
it to one spelling, `parsing` (with `words`, `numerals` and `units`) reads its structure into a `forms.Form`, `equality`
compares two forms, and `symbolic` (in a worker) compares the expressions that are left, by math-verify.
"""
