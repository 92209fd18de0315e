"""maj@k, pass@k, intervals and comparisons; against the graded data in shared/data where it is there."""

import itertools
import json
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from astarpo.rollout import load_problems
from astarpo.rollout.comparing import compare_reports, paired_interval
from astarpo.rollout.evaluation import EvaluatedSample, confidence_interval, majority_chances, pass_at_k
from astarpo.rollout.page import kinds_of
from astarpo.rollout.rows import PRESETS
from astarpo.verifier import Verifier

DATA = Path(__file__).parents[2] / "shared" / "data"


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    wanted = fmean(any(some) for some in itertools.combinations(correct, k))
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(wanted)


def sample(answer, correct=False, question="q", finish="stop"):
    return EvaluatedSample(question, "1", answer, answer, "wrong", finish, correct, ())


@pytest.mark.parametrize(
    ("answers", "chance"),
    [
        ([("1", True), ("1.0", True), ("2", False)], 1.0),  # right answers are one, whatever their form
        ([("1", True), ("2", False), ("3", False)], 1 / 3),
        ([("1", True), ("2", False), ("2", False)], 0.0),
        ([("1", True), ("2/4", False), (r"\frac{1}{2}", False)], 0.0),  # two forms of one wrong answer
        ([("1", True), ("", False), ("", False)], 1.0),  # no answer is no vote
        ([("", False), ("", False)], 0.0),
        ([("2", False), ("1", True)], 0.5),
    ],
)
def test_the_majority_counts_answers_and_not_texts(answers, chance):
    with Verifier() as verifier:
        assert majority_chances([[sample(*one) for one in answers]], verifier) == [pytest.approx(chance)]


def test_truncated_answers_do_not_vote_where_they_do_not_count():
    cut = sample("7", False, finish="length")  # right, as the grader said, but it does not count
    assert majority_chances([[sample("7", True), cut, cut]], None, require_eos=True) == [1.0]
    assert majority_chances([[cut, cut]], None, require_eos=True) == [0.0]
    assert majority_chances([[sample("7", True), cut, cut]], None) == [0.0]


def test_graded_completions_vote_as_a_plain_count_says():
    """Against `shared/data`: 100 problems with 8 graded completions each."""
    path = DATA / "graded_qwen25math.jsonl"
    if not path.is_file():
        pytest.skip("shared/data is not there")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    with Verifier() as verifier:
        grades = verifier.grade_batch([row["completion"] for row in rows], [str(row["gold"]) for row in rows])
        groups: dict[str, list[EvaluatedSample]] = {}
        for row, grade in zip(rows, grades, strict=True):
            groups.setdefault(row["problem"], []).append(sample(grade.answer, grade.correct))
        assert [len(group) for group in groups.values()] == [8] * 100
        chances = majority_chances(list(groups.values()), verifier)
    for group, chance in zip(groups.values(), chances, strict=True):
        right = sum(one.correct for one in group)
        texts = Counter(one.answer for one in group if one.answer and not one.correct)
        # Wrong answers of different texts may still be one answer, so only these bounds follow from a count.
        assert chance == 1.0 or right <= sum(texts.values())
        assert chance == 0.0 or right >= max(texts.values(), default=0)
        assert pass_at_k(8, right, 8) == float(right > 0) and pass_at_k(8, right, 1) == pytest.approx(right / 8)
    assert fmean(chances) >= fmean(sum(one.correct for one in group) / 8 for group in groups.values())


def test_intervals_are_honest_at_the_edges():
    low, high = confidence_interval([1.0] * 20, 1)
    assert 0.8 < low < 0.9 and high == pytest.approx(1.0)
    assert paired_interval([(0.0, 0.0)] * 20)[0] < 0 < paired_interval([(0.0, 0.0)] * 20)[1]
    low, high = paired_interval([(0.0, 1.0)] * 30 + [(1.0, 0.0)] * 5 + [(1.0, 1.0)] * 65)
    assert 0.1 < low < 0.25 < high < 0.4
    assert paired_interval([(0.25, 0.75)] * 10 + [(0.5, 0.5)] * 10) == pytest.approx((0.137, 0.363), abs=0.01)


def report(path, correct, **evaluated):
    samples = [{"question": f"q{n}", "gold": "1", "correct": bool(c)} for n, c in enumerate(correct)]
    path.write_text(json.dumps({"samples": samples, "evaluated": evaluated}))
    return path


def test_a_comparison_pairs_problems_and_names_other_settings(tmp_path):
    one = report(tmp_path / "a.json", [0, 0, 1, 1], sampling={"temperature": 0.0, "seed": 0}, model="base")
    two = report(tmp_path / "b.json", [1, 0, 0, 1, 1], sampling={"temperature": 1.0, "seed": 0}, model="trained")
    found = compare_reports(one, two)
    assert (found.num_problems, found.before, found.after, found.difference) == (4, 0.5, 0.5, 0.0)
    assert (found.gained, found.lost) == (("q0",), ("q2",))
    assert found.differs == {"sampling.temperature": (0.0, 1.0)}
    other = tmp_path / "c.json"
    other.write_text(json.dumps({"samples": [{"question": "z", "gold": "1", "correct": True}]}))
    with pytest.raises(ValueError, match="no problem in common"):
        compare_reports(one, other)
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a report"):
        compare_reports(one, tmp_path / "d.json")


def test_the_page_can_show_what_is_wrong_or_truncated():
    assert kinds_of(sample("2")) == ["wrong"]
    assert kinds_of(sample("1", True)) == []


@pytest.mark.parametrize(
    ("preset", "file", "rows"),
    [
        ("math500", "math500.jsonl", 500),
        ("gsm8k", "gsm8k_test.jsonl", 1319),
        ("aime24", "aime24.jsonl", 30),
        ("amc23", "amc23.jsonl", 40),
        ("minerva", "minerva_math.jsonl", 272),
        ("olympiadbench", "olympiadbench.jsonl", 675),
    ],
)
def test_presets_read_the_copies_in_shared_data(preset, file, rows, monkeypatch):
    """The name leads to the hub's data set; its copy here has the same columns and gives as many problems."""
    if not DATA.is_dir():
        pytest.skip("shared/data is not there")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list([json.loads(line) for line in (DATA / file).read_text().splitlines()])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    problems = load_problems(preset, for_evaluation=True)
    assert asked == [PRESETS[preset].evaluation]
    assert rows * 0.97 <= len(problems) <= rows and all(problem.gold for problem in problems)
