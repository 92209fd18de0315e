"""The golden sets: labelled from mathematics, judged by the real verifier."""

import pytest
from golden import golden_pairs

from astarpo.verifier import Verifier

PAIRS = golden_pairs()


@pytest.fixture(scope="module")
def grades():
    with Verifier(timeout_s=10) as verifier:
        judged = verifier.grade_batch([pair.completion for pair in PAIRS], [pair.gold for pair in PAIRS])
    return dict(zip(PAIRS, judged, strict=True))


@pytest.mark.parametrize("category", sorted({pair.category for pair in PAIRS}))
def test_every_pair_of_a_category(grades, category):
    failed = [
        f"{pair.line} -> {grades[pair].outcome}"
        for pair in PAIRS
        if pair.category == category and (grades[pair].outcome in pair.outcomes) == pair.known_to_fail
    ]
    assert not failed, "\n".join(failed)  # a pair with `?` that passes has to lose its mark


@pytest.mark.parametrize(
    ("name", "size", "agreement"),
    [
        ("golden.txt", 400, 0.98),
        ("golden_blind.txt", 400, 0.98),
        ("golden_blind2.txt", 400, 0.98),
        ("golden_redteam.txt", 400, 0.98),
        ("golden_recall.txt", 300, 0.98),
        ("golden_sealed.txt", 300, 0.98),
        ("golden_sealed2.txt", 200, 0.98),
        ("golden_recall_redteam.txt", 250, 0.9),  # with what is still wrong
    ],
)
def test_size_agreement_and_no_false_positive(grades, name, size, agreement):
    pairs = golden_pairs(name)
    assert len(pairs) >= size
    assert sum(grades[pair].outcome in pair.outcomes for pair in pairs) >= agreement * len(pairs)
    assert not [pair.line for pair in pairs if grades[pair].correct and not pair.is_correct]


def test_no_pair_is_counted_twice():
    assert len({(pair.completion, pair.gold) for pair in PAIRS}) == len(PAIRS)


@pytest.mark.slow
def test_the_verdict_does_not_depend_on_order_or_workers(grades):
    with Verifier(workers=2, timeout_s=10) as verifier:
        pairs = PAIRS[::-1]
        judged = verifier.grade_batch([pair.completion for pair in pairs], [pair.gold for pair in pairs])
    assert [grade.outcome for grade in judged] == [grades[pair].outcome for pair in pairs]
