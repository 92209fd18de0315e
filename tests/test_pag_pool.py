"""Reference episodes in a pool: the same guarantees as for completions, with the real engine and the real verifier."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pag_model import REVISE, VERIFY, problem
from transformers import AutoTokenizer

from astarpo.rollout import SINGLE, Pag, ReferencePool, sample_pool
from astarpo.rollout.engines.interface import EngineError, Failure
from astarpo.rollout.episode import TurnGrade
from astarpo.rollout.fingerprint import pool_fingerprint
from astarpo.rollout.options import EngineOptions, ModelOptions, SampleOptions
from astarpo.rollout.pool import check_pool, regrade_pool
from astarpo.verifier import Verifier

pytestmark = pytest.mark.pag

PROBLEMS = [problem(number) for number in range(6)]
PAG = Pag(VERIFY, REVISE)


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as verifier:
        yield verifier


class Fixture:
    """What sampling needs, with a choice of engine, folder and episodes."""

    def __init__(self, guesser, engine, verifier):
        self.tokenizer = AutoTokenizer.from_pretrained(guesser)
        self.guesser, self.engine, self.verifier = guesser, engine, verifier

    def __call__(self, folder: Path, engine=None, kind=PAG, grader=None, **changes):
        options = replace(SampleOptions(str(folder), num_samples=3, max_completion_length=32, shard_rows=8), **changes)
        model = ModelOptions(self.guesser)
        fingerprint = pool_fingerprint(model, EngineOptions(), self.tokenizer, PROBLEMS, options)
        return sample_pool(
            engine or self.engine,
            self.tokenizer,
            PROBLEMS,
            options,
            fingerprint,
            grader or self.verifier,
            kind=kind,
        )


@pytest.fixture(scope="module")
def sampling(guesser, guessing_engine, verifier):
    return Fixture(guesser, guessing_engine, verifier)


def rows_of(pool):
    return sorted(pool.samples.to_pylist(), key=lambda row: (row["prompt_id"], row["sample_index"]))


@pytest.fixture(scope="module")
def pool(sampling, tmp_path_factory):
    return sampling(tmp_path_factory.mktemp("episodes") / "pool")


def test_every_turn_has_a_row_with_role_turn_and_parent(pool):
    assert pool.is_complete and pool.manifest.turns == 3 and pool.num_rows == 6 * 3 * 3
    assert check_pool(pool.folder) == []
    rows = rows_of(pool)
    for start in range(0, len(rows), 3):
        attempt, verification, revision = rows[start : start + 3]
        assert [row["role"] for row in rows[start : start + 3]] == ["attempt", "verify", "revise"]
        assert [row["turn"] for row in rows[start : start + 3]] == [1, 2, 3]
        first = attempt["sample_index"]
        assert [row["parent"] for row in rows[start : start + 3]] == [None, first, first + 1]
        assert len({row["seed"] for row in rows[start : start + 3]}) == 3
        said = verification["outcome"].removeprefix("verdict_")
        assert verification["reward"] == float(said != "none" and (said == "correct") == (attempt["reward"] > 0))
        assert (revision["outcome"] == "not_reached") == (said != "wrong")
        assert (revision["reward"] is None) == (said != "wrong")
        if said == "wrong":
            assert "Again." not in revision["text"] and revision["num_tokens"] > 0
    assert {row["outcome"] for row in rows} >= {"verdict_wrong", "verdict_correct", "correct", "wrong", "not_reached"}


def test_the_attempts_are_those_of_a_pool_of_completions(pool, sampling, tmp_path):
    """V* of the first turn does not depend on what follows."""
    single = sampling(tmp_path / "single", kind=SINGLE)
    assert single.manifest.turns == 1
    assert (single.reward_matrix() == pool.reward_matrix()).all()
    assert pool.rewards() == single.rewards() and pool.values(0.5) == single.values(0.5)
    assert pool.to_dataset().to_list() == single.to_dataset().to_list()
    attempts = [row["completion_ids"] for row in rows_of(pool)[::3]]
    assert attempts == [row["completion_ids"] for row in rows_of(single)]


def test_the_summary_counts_turns_apart(pool):
    summary, rewards = pool.summary(), pool.turn_rewards()
    assert summary["num_samples"] == 3 and summary["turns"] == 3
    assert summary["mean_reward"] == pytest.approx(rewards[:, :, 0].mean())
    later = summary["later_turns"]
    assert later["verify"]["mean_reward"] == pytest.approx(rewards[:, :, 1].mean())
    assert later["verify"]["graded"] == 18
    assert later["revise"]["graded"] == 18 - later["revise"]["outcomes"]["not_reached"]


class Breaking:
    """An engine that breaks down, or fails a prompt, in a certain stream."""

    def __init__(self, engine, at, failure=None):
        self.engine, self.at, self.failure, self.streams = engine, at, failure, 0
        self.max_model_len, self.max_num_seqs, self.kv_cache_tokens = engine.max_model_len, 16, None

    def stream(self, prompts, seeds, settings, policy=None):
        self.streams += 1
        for number, (index, completion) in enumerate(self.engine.stream(prompts, seeds, settings, policy)):
            if self.streams == self.at and number == 1:
                if self.failure is None:
                    raise EngineError("out of luck", (index,))
                yield index, Failure(self.failure)
            else:
                yield index, completion


@pytest.mark.parametrize("at", [1, 4, 5, 6])
def test_a_broken_run_goes_on_and_ends_as_an_unbroken_one(pool, sampling, tmp_path, at):
    with pytest.raises(EngineError, match="out of luck"):
        sampling(tmp_path / "pool", Breaking(sampling.engine, at))
    broken = ReferencePool.open(tmp_path / "pool")
    assert not broken.is_complete and broken.num_rows % 3 == 0
    assert len(broken.manifest.failures) == 3  # all turns of one episode
    again = sampling(tmp_path / "pool")
    assert again.is_complete and not again.manifest.failures
    assert rows_of(again) == rows_of(pool)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_episode_that_fails_costs_none_of_the_others(pool, sampling, tmp_path, at):
    hurt = sampling(tmp_path / "pool", Breaking(sampling.engine, at, "too strange"))
    assert hurt.num_rows == 18 * 3 - 3 and hurt.manifest.is_settled
    assert {failure.reason for failure in hurt.manifest.failures} == {"too strange"}
    assert hurt.turn_rewards().shape == (6, 3, 3)
    assert rows_of(sampling(tmp_path / "pool")) == rows_of(pool)


def test_another_kind_of_pool_is_refused_with_the_difference(pool, sampling):
    with pytest.raises(ValueError, match="episode: 'pag' in the pool, None asked for"):
        sampling(pool.folder, kind=SINGLE)
    with pytest.raises(ValueError, match="verdict_parser: 'strict' in the pool, 'lenient' asked for"):
        sampling(pool.folder, kind=replace(PAG, verdict_parser="lenient"))


def test_grading_again_keeps_verdicts_and_follows_the_attempts(sampling, verifier, tmp_path, monkeypatch):
    pool = sampling(tmp_path / "pool")
    before, rows = pool.turn_rewards(), rows_of(pool)
    changes = regrade_pool(pool.folder, verifier, "the same")
    assert all(old == new for old, new in changes)
    same = ReferencePool.open(pool.folder)
    assert rows_of(same) == rows
    monkeypatch.setattr(
        verifier,
        "grade_batch",
        lambda texts, gold, inner=verifier.grade_batch: inner(texts, [str(1 - int(g)) for g in gold]),
    )
    regrade_pool(pool.folder, verifier, "the opposite")
    after = ReferencePool.open(pool.folder).turn_rewards()
    said = [row["outcome"] != "verdict_none" for row in rows[1::3]]
    right = [bool(row["text"]) and row["outcome"] in ("correct", "wrong") for row in rows[::3]]
    order = {prompt_id: place for place, prompt_id in enumerate(sorted(pool.prompt_ids))}
    checked = 0
    for place, prompt_id in enumerate(pool.prompt_ids):
        for sample in range(3):
            number = 3 * order[prompt_id] + sample
            if said[number] and right[number]:
                assert after[place, sample, 1] == 1 - before[place, sample, 1]
                checked += 1
    assert checked > 5


def test_partial_credit_is_refused_and_nothing_is_committed(sampling, tmp_path):
    with pytest.raises(ValueError, match=r"earned 0\.5.*--episode single"):
        sampling(tmp_path / "pool", grader=lambda answers: [TurnGrade("half", 0.5) for _ in answers])
    assert ReferencePool.open(tmp_path / "pool").num_rows == 0


def test_old_pools_without_the_new_columns_can_be_read_and_continued(sampling, tmp_path):
    """A pool as it was written before there were episodes."""
    import pyarrow.parquet as pq

    from astarpo.rollout.files import file_hash

    folder = tmp_path / "old"
    rewards = sampling(folder, kind=SINGLE, num_samples=2).reward_matrix()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["turns"]
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        pq.write_table(pq.read_table(path).drop_columns(["role", "turn", "parent"]), path)
        shard["blake2b"], shard["bytes"] = file_hash(path), path.stat().st_size
    manifest["shards"], kept = manifest["shards"][1:], manifest["shards"][0]
    (folder / kept["file"]).unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert check_pool(folder) == []
    again = sampling(folder, kind=SINGLE, num_samples=2)
    assert again.is_complete
    assert (again.reward_matrix() == rewards).all()
