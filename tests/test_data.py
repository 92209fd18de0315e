"""Data sets, columns, presets, prompts and seeds."""

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from astarpo.rollout import Problem, load_problems
from astarpo.rollout.data import load_from_options, without_overlap
from astarpo.rollout.episode import sample_seed
from astarpo.rollout.options import DataOptions
from astarpo.rollout.prompts import fitting_prompts, tokenize_prompts
from astarpo.rollout.rows import PRESETS
from astarpo.rollout.subset import spread_sample

DATA = Path(__file__).parents[2] / "shared" / "data"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("prompt", ["prompt", "problem", "question"])
@pytest.mark.parametrize(
    ("gold_column", "text"), [("gold", "4"), ("answer", "2 + 2\n#### 4"), ("solution", r"so \boxed{4}")]
)
def test_columns_are_found_by_name(tmp_path, prompt, gold_column, text):
    (problem,) = load_problems(write(tmp_path / "d.jsonl", [{prompt: "2+2?", gold_column: text}]))
    assert (problem.question, problem.gold) == ("2+2?", "4")


def test_rows_without_gold_and_repetitions_are_counted_and_lists_are_joined(tmp_path, caplog):
    rows = [{"question": "a", "answer": gold} for gold in (["1", "2"], None, [], ["1", "2"])]
    rows.append({"question": "a", "answer": ["3"]})
    problems = load_problems(write(tmp_path / "d.jsonl", rows))
    assert [problem.gold for problem in problems] == ["1, 2", "3"]  # one question, two answers: two problems
    assert "5 rows, skipped 2 without a gold answer and 1 exact repetitions" in caplog.text


def test_gold_wins_over_answer_and_solution(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"question": "q", "solution": "1", "answer": "2", "gold": "3"}])
    assert load_problems(path)[0].gold == "3"
    assert load_problems(path, gold_column="answer")[0].gold == "2"


def test_parquet_messages_and_system_prompt(tmp_path):
    path = tmp_path / "d.parquet"
    Dataset.from_list([{"prompt": [{"role": "user", "content": "q"}], "gold": "1"}]).to_parquet(str(path))
    (problem,) = load_problems(str(path), system_prompt="Think.")
    assert [m["role"] for m in problem.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"foo": "q", "gold": "1"}], {}, "no column `prompt` or `problem` or `question`.*--prompt_column"),
        ([{"question": "q"}], {}, "--gold_column"),
        ([{"question": "q", "gold": "1"}], {"gold_column": "nope"}, "no column `nope`"),
        ([{"question": "q", "gold": ""}], {}, "no usable problem"),
        ([{"question": "q", "gold": "1"}], {"limit": 0}, "at least 1"),
        ([], {}, "is empty"),
    ],
)
def test_bad_data_names_the_fix(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_problems(write(tmp_path / "d.jsonl", rows), **options)


def test_missing_file_bad_line_and_unreachable_hub(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist.*--dataset_name"):
        load_problems(str(tmp_path / "none.jsonl"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "gold": "1"}\n{oops\n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        load_problems(str(bad))
    with pytest.raises(ValueError, match="could not be loaded from the hub"):
        load_problems("nobody/no-such-data-set")


def test_prompt_id_keeps_equal_questions_with_different_answers_apart(tmp_path):
    rows = [{"question": "q", "gold": gold} for gold in ("1", "2", "1")]
    problems = load_problems(write(tmp_path / "d.jsonl", rows))
    assert len({problem.prompt_id for problem in problems}) == len(problems) == 2
    assert problems[0].prompt_id == Problem(({"content": "q", "role": "user"},), "1").prompt_id


def test_overlap_is_found_across_whitespace_and_case():
    def problem(text):
        return Problem(({"role": "user", "content": text},), "1")

    kept, removed = without_overlap([problem("What  is\nX?"), problem("other")], [problem("what is x? ")])
    assert removed == 1
    assert [p.question for p in kept] == ["other"]


def test_prompts_go_through_the_chat_template(tokenizer):
    problems = [Problem(({"role": "user", "content": "hé"},), "1"), Problem(({"role": "user", "content": "a"},), "1")]
    first, _ = tokenize_prompts(problems, tokenizer)
    assert tokenizer.decode(first) == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"


def test_overlong_prompts_are_an_error_or_left_out_never_truncated(tokenizer, caplog):
    short, long = (Problem(({"role": "user", "content": text},), "1") for text in ("a", "x" * 50))
    options = DataOptions("d", max_prompt_length=40)
    with pytest.raises(ValueError, match=r"1 of 2 prompts are longer than 40.*--max_prompt_length"):
        fitting_prompts([short, long], tokenizer, options)
    options.overlong_prompts = "skip"
    assert fitting_prompts([short, long], tokenizer, options) == ([short], tokenize_prompts([short], tokenizer))
    assert "1 of 2 prompts are longer than 40" in caplog.text
    with pytest.raises(ValueError, match="1 of 1 prompts"):
        fitting_prompts([long], tokenizer, options)


def test_base_models_get_their_prompt_as_text(tokenizer, tmp_path):
    """The template is the whole prompt; what is held out is found by the question alone."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    rows = [{"question": f"What is {n}?", "answer": str(n)} for n in range(3)]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps(rows[0]) + "\n")
    options = DataOptions(str(train), prompt_template="Q: {question} {x}\nA:", max_prompt_length=40)
    problems = load_from_options(options, for_evaluation=False, exclude=str(held_out))
    assert [problem.question for problem in problems] == ["Q: What is 1? {x}\nA:", "Q: What is 2? {x}\nA:"]
    assert all(len(problem.messages) == 1 for problem in problems)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        _, prompts = fitting_prompts(problems, tokenizer, options)
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(prompts[0]) == "Q: What is 1? {x}\nA:"
    options.prompt_template = "Answer:"
    with pytest.raises(ValueError, match=r"no \{question\}"):
        load_from_options(options, for_evaluation=False)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="no chat template"):
            tokenize_prompts([Problem(({"role": "user", "content": "a"},), "1")], tokenizer)
    finally:
        tokenizer.chat_template = template


def test_seeds_are_stable_and_distinct():
    assert sample_seed(0, "a", 1) == 5640247956467711177
    seeds = {sample_seed(run, prompt, i) for run in (0, 1) for prompt in ("a", "b") for i in range(8)}
    assert len(seeds) == 32
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_limited_number_is_spread_over_subjects_and_levels(tmp_path):
    rows = [
        {"question": f"q{i}", "gold": str(i), "subject": "algebra" if i < 60 else "geometry", "level": i % 2}
        for i in range(90)
    ]
    path = write(tmp_path / "d.jsonl", rows)
    chosen = [int(problem.gold) for problem in load_problems(path, limit=30)]
    assert len(chosen) == 30 and chosen == sorted(chosen)
    kinds = Counter((number < 60, number % 2) for number in chosen)
    assert kinds == {(True, 0): 10, (True, 1): 10, (False, 0): 5, (False, 1): 5}
    assert chosen == [int(problem.gold) for problem in load_problems(path, limit=30)]
    assert chosen != [int(problem.gold) for problem in load_problems(path, limit=30, limit_seed=1)]
    assert len(load_problems(path, limit=1000)) == 90


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 5), st.integers(1, 4))
@settings(deadline=None)
def test_a_sample_has_so_many_rows_and_no_kind_is_off_by_more_than_one(count, limit, seed, kinds):
    column = [f"kind {row % kinds}" for row in range(count)]
    chosen = spread_sample({"subject": column}, count, limit, seed)
    assert len(chosen) == len(set(chosen)) == min(limit, count)
    for kind, total in Counter(column).items():
        share = min(1, limit / count) * total
        assert abs(sum(column[row] == kind for row in chosen) - share) < 1


def test_a_limit_of_math_has_every_subject():
    path = DATA / "math_train.jsonl"
    if not path.is_file():
        pytest.skip("shared data is not there")
    rows = {row["problem"]: row["subject"] for row in map(json.loads, path.read_text().splitlines())}
    found = Counter(rows[problem.question] for problem in load_problems(str(path), limit=500))
    everything = Counter(rows.values())
    assert len(everything) == 7
    for subject, total in everything.items():
        assert abs(found[subject] - 500 * total / 7500) < 8


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("math500", 500),
        ("aime24", 30),
        ("amc23", 40),
        ("minerva_math", 272),
        ("olympiadbench", 675),
        ("gsm8k_test", 1319),
    ],
)
def test_presets_of_benchmarks_find_their_columns(name, count):
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("shared data is not there")
    problems = load_problems(str(path))
    assert len(problems) >= count - 2 and all(problem.gold for problem in problems)


def test_benchmarks_are_not_trained_on():
    with pytest.raises(ValueError, match=r"`aime24` is a benchmark to evaluate on.*such as `math`"):
        load_problems("aime24")
    assert {"math500", "gsm8k", "aime24", "aime25", "amc23", "minerva", "olympiadbench"} <= set(PRESETS)


def test_a_csv_is_read_as_text(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('question,answer\n"How many, in all?",007\n"Two\nlines",1/2\n', encoding="utf-8")
    problems = load_problems(str(path))
    assert [(problem.question, problem.gold) for problem in problems] == [
        ("How many, in all?", "007"),
        ("Two\nlines", "1/2"),
    ]
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        load_problems(str(path))


def test_test_problems_in_a_training_set_are_warned_of(monkeypatch, caplog):
    rows = Dataset.from_list([{"problem": str(i), "solution": rf"\boxed{{{i}}}"} for i in range(7501)])
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    load_problems("qwedsacf/competition_math", limit=2)
    assert "--dataset_name math" in caplog.text


def test_a_stray_column_does_not_hide_the_full_one(tmp_path):
    rows = [{"problem": str(n), "solution": str(n)} for n in range(1, 4)]
    rows[1]["answer"] = "9"
    assert [problem.gold for problem in load_problems(write(tmp_path / "d.jsonl", rows))] == ["1", "2", "3"]


def test_a_cell_with_a_comma_outside_quotes_is_an_error(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("question,answer\nWhat is 1 + 2?,3,\n")
    assert [problem.gold for problem in load_problems(str(path))] == ["3"]
    path.write_text("question,answer\nWhat is 1 + 2?,3\nWhat is 1,000 + 2?,1002\n")
    with pytest.raises(ValueError, match="line 3 has more cells than the header has names"):
        load_problems(str(path))


@pytest.mark.parametrize(
    ("name", "text"), [("d.csv", "question,answer\nné?,1\n"), ("d.jsonl", '{"question": "né?", "answer": "1"}\n')]
)
def test_a_byte_order_mark_is_no_part_of_a_name_and_other_encodings_are_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8-sig"))
    assert [problem.question for problem in load_problems(str(path))] == ["né?"]
    path.write_bytes(text.encode("cp1252"))
    with pytest.raises(ValueError, match=rf"{name}.* is not UTF-8"):
        load_problems(str(path))


def test_rows_without_a_question_are_skipped_and_counted(tmp_path, caplog):
    rows = [{"question": text, "answer": "1"} for text in ("q", None, "")] + [{"answer": "2"}]
    assert [problem.question for problem in load_problems(write(tmp_path / "d.jsonl", rows))] == ["q"]
    assert "skipped 3 rows without a question" in caplog.text
    with pytest.raises(ValueError, match=r"has no question in column `question`\. .*--prompt_column"):
        load_problems(write(tmp_path / "n.jsonl", [{"question": None, "answer": "1"}]))
    with pytest.raises(ValueError, match="must be text, or a list of messages, got 5"):
        load_problems(write(tmp_path / "e.jsonl", [{"question": 5, "answer": "1"}]))


def test_answers_may_be_text_here_and_numbers_there_and_columns_may_come_later(tmp_path):
    rows = [{"question": "a", "answer": "1/2"}, {"question": "b", "answer": 5, "level": 2}]
    for order in (rows, rows[::-1]):
        problems = {problem.question: problem for problem in load_problems(write(tmp_path / "d.jsonl", order))}
        assert (problems["a"].gold, problems["b"].gold) == ("1/2", "5")
        assert (problems["a"].columns["level"], problems["b"].columns["level"]) == (None, 2)
