"""What can happen to a pool on disk, and who may write to it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from astarpo.rollout import ReferencePool
from astarpo.rollout.data import Problem
from astarpo.rollout.pool import PoolManifest, PoolWriter, Sample, check_pool, regrade_pool
from astarpo.rollout.pool import writing as writing_module
from astarpo.rollout.pool.lock import LOCK
from astarpo.rollout.pool.summary import pass_at_k, plot_summary
from astarpo.verifier import Verifier

PROBLEMS = [Problem(({"role": "user", "content": f"{i}+1?"},), str(i + 1)) for i in range(6)]
FINGERPRINT = {"model": "m", "require_eos": True, "verifier": "old"}


def row(problem, index=0, text="x", reward=1.0, finish_reason="stop"):
    return Sample(problem.prompt_id, index, 7, (5, 2), text, finish_reason, 2, "correct", reward)


def fill(folder):
    with PoolWriter(folder, PROBLEMS, 1, FINGERPRINT) as writer:
        for problem in PROBLEMS[:4]:
            writer.commit([row(problem)])
    return sorted(folder.glob("samples-*.parquet"))


def foreign(path):
    table = pq.read_table(path)
    index = table.schema.get_field_index("prompt_id")
    pq.write_table(table.set_column(index, "prompt_id", [["somebody else's"]]), path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "bytes instead of"),
    "flipped": (flip, "not what was written"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "missing": (lambda path: path.unlink(), "missing"),
    "foreign": (foreign, "bytes instead of|not what was written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_shard_is_named_quarantined_and_only_its_rows_are_sampled_again(tmp_path, caplog, kind):
    shards = fill(tmp_path)
    assert check_pool(tmp_path) == []
    damage, message = DAMAGE[kind]
    before = {path.name: path.read_bytes() for path in shards}
    damage(shards[1])
    (fault,) = check_pool(tmp_path)
    assert fault.file == shards[1].name
    assert any(part in fault.problem for part in message.split("|"))
    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        assert shards[1].name in caplog.text
        assert [writer.has(problem.prompt_id, 0) for problem in PROBLEMS] == [True, False, True, True, False, False]
        writer.commit([row(PROBLEMS[1])])
    assert check_pool(tmp_path) == []
    assert ReferencePool.open(tmp_path).num_rows == 4
    assert (tmp_path / "quarantine" / shards[1].name).exists() == (kind != "missing")
    for path in (shards[0], *shards[2:]):
        assert path.read_bytes() == before[path.name]


def test_a_shard_that_repeats_rows_is_named(tmp_path):
    shards = fill(tmp_path)
    manifest = PoolManifest.load(tmp_path)
    copy = replace(manifest.shards[0], file="samples-00009.parquet")
    (tmp_path / copy.file).write_bytes(shards[0].read_bytes())
    replace(manifest, shards=(*manifest.shards, copy)).save(tmp_path)
    (fault,) = check_pool(tmp_path)
    assert fault.file == copy.file
    assert "repeats 1 samples" in fault.problem


@pytest.mark.parametrize("name", ["../samples-00009.parquet", "/samples.parquet", "sub/samples.parquet"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    fill(tmp_path)
    manifest = PoolManifest.load(tmp_path)
    replace(manifest, shards=(replace(manifest.shards[0], file=name),)).save(tmp_path)
    with pytest.raises(ValueError, match="is not a file of the pool"):
        PoolManifest.load(tmp_path)


def test_a_kill_between_shard_and_manifest_leaves_an_orphan_that_is_set_aside(tmp_path):
    shards = fill(tmp_path)
    manifest = PoolManifest.load(tmp_path)
    replace(manifest, shards=manifest.shards[:-1]).save(tmp_path)
    (fault,) = check_pool(tmp_path)
    assert fault.problem == "not named by the manifest"
    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        writer.commit([row(PROBLEMS[3])])
    assert check_pool(tmp_path) == []
    assert (tmp_path / "quarantine" / shards[-1].name).exists()


def test_broken_prompts_are_written_again(tmp_path, caplog):
    fill(tmp_path)
    (tmp_path / "prompts.parquet").write_bytes(b"broken")
    assert check_pool(tmp_path)[0].file == "prompts.parquet"
    PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT).close()
    assert "written again" in caplog.text
    assert check_pool(tmp_path) == []


HOLD = """
import os, signal, sys, time
from pathlib import Path
from astarpo.rollout.pool.lock import lock_pool
try:
    lock = lock_pool(Path(sys.argv[1]))
    print("mine", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(5)
except ValueError:
    print("refused", flush=True)
"""


def test_a_second_writer_is_refused_and_a_killed_one_is_no_obstacle(tmp_path):
    first = PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT)
    with pytest.raises(ValueError, match=rf"Another job is writing to the pool in `{tmp_path}`"):
        PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT)
    elsewhere = subprocess.run([sys.executable, "-c", HOLD, tmp_path, "hold"], capture_output=True, text=True)
    assert elsewhere.stdout.strip() == "refused"
    first.close()
    killed = subprocess.run([sys.executable, "-c", HOLD, tmp_path, "die"], capture_output=True, text=True)
    assert killed.stdout.strip() == "mine" and killed.returncode == -9
    assert (tmp_path / LOCK).exists()
    PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT).close()
    # What astarpo wrote here before it left the lock to the operating system is no obstacle either.
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "1", "key": "k"}))
    PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT).close()


def test_shards_without_a_manifest_are_not_overwritten(tmp_path):
    shards = fill(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"4 shards but no manifest\.json"):
        PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT)
    assert sorted(tmp_path.glob("samples-*.parquet")) == shards
    for shard in shards:
        shard.unlink()
    PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT).close()  # the refused one released the lock


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_merge_that_is_broken_off_loses_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(writing_module, "MERGE_SHARDS", 3)
    rows = [row(problem) for problem in PROBLEMS]
    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        writer.commit(rows[:1])
        writer.commit(rows[1:2])
        with monkeypatch.context() as broken:
            broken.setattr(ReferencePool, "read", lambda *_: (_ for _ in ()).throw(error))
            if isinstance(error, OSError):
                writer.commit(rows[2:3])
            else:
                with pytest.raises(KeyboardInterrupt):
                    writer.commit(rows[2:3])
        writer.commit(rows[2:4])
    assert check_pool(tmp_path) == []
    assert ReferencePool.open(tmp_path).num_rows == 4


def test_an_interrupt_after_the_manifest_is_in_place_keeps_its_shard(tmp_path, monkeypatch):
    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        save = PoolManifest.save

        def interrupted(self, folder):
            save(self, folder)
            raise KeyboardInterrupt

        monkeypatch.setattr(PoolManifest, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.commit([row(PROBLEMS[0])])
        monkeypatch.undo()
    assert check_pool(tmp_path) == []
    assert ReferencePool.open(tmp_path).num_rows == 1


def test_of_many_heirs_one_gets_the_lock(tmp_path):
    fill(tmp_path)
    command = [sys.executable, "-c", HOLD, tmp_path, "hold"]
    heirs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    answers = [heir.communicate(timeout=60)[0].strip() for heir in heirs]
    assert sorted(answers) == ["mine"] + ["refused"] * 7


def test_small_shards_are_merged_and_rows_survive(tmp_path, monkeypatch):
    monkeypatch.setattr(writing_module, "MERGE_SHARDS", 3)
    with PoolWriter(tmp_path, PROBLEMS, 2, FINGERPRINT) as writer:
        for problem in PROBLEMS:
            writer.commit([row(problem, index, text=f"{problem.question} {index}") for index in range(2)])
        assert writer.is_complete
    pool = ReferencePool.open(tmp_path)
    assert len(pool.manifest.shards) < 4
    assert check_pool(tmp_path) == []
    found = {(r["prompt_id"], r["sample_index"]): r["text"] for r in pool.samples.to_pylist()}
    assert found == {(p.prompt_id, i): f"{p.question} {i}" for p in PROBLEMS for i in range(2)}


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path, monkeypatch):
    fill(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        monkeypatch.setattr("pyarrow.parquet.write_table", full)
        with pytest.raises(OSError, match="No space"):
            writer.commit([row(PROBLEMS[4])])
        assert not writer.has(PROBLEMS[4].prompt_id, 0)
    monkeypatch.undo()
    assert check_pool(tmp_path) == []
    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        writer.commit([row(PROBLEMS[4])])
    assert ReferencePool.open(tmp_path).num_rows == 5


def test_regrading_keeps_the_old_grades_and_counts_what_changed(tmp_path):
    with PoolWriter(tmp_path, PROBLEMS, 1, FINGERPRINT) as writer:
        texts = [r"\boxed{1}", r"\boxed{9}", "no idea", r"\boxed{4}", r"\boxed{5.0}", r"\boxed{\frac{12}{2}}"]
        cut = ["stop"] * 3 + ["length"] + ["stop"] * 2
        writer.commit([row(p, 0, t, finish_reason=c) for p, t, c in zip(PROBLEMS, texts, cut, strict=True)])
    before = ReferencePool.open(tmp_path).samples
    with Verifier() as verifier:
        transitions = regrade_pool(tmp_path, verifier, "new")
    assert transitions == {("correct", "correct"): 4, ("correct", "wrong"): 1, ("correct", "no_answer"): 1}
    pool = ReferencePool.open(tmp_path)
    assert pool.samples["reward"].to_pylist() == [1, 0, 0, 0, 1, 1]
    assert pool.samples.drop_columns(["outcome", "reward"]) == before.drop_columns(["outcome", "reward"])
    (regrade,) = pool.manifest.regrades
    assert regrade.verifier == "old"
    assert pool.manifest.fingerprint["verifier"] == "new"
    kept = pq.read_table(tmp_path / regrade.file)
    assert kept["outcome"].to_pylist() == before["outcome"].to_pylist()
    assert check_pool(tmp_path) == []
    PoolWriter(tmp_path, PROBLEMS, 1, {**FINGERPRINT, "verifier": "new"}).close()
    with pytest.raises(ValueError, match="astarpo-rollout regrade"):
        PoolWriter(tmp_path, PROBLEMS, 1, {**FINGERPRINT, "verifier": "newer"})


def test_summary_and_plot(tmp_path):
    with PoolWriter(tmp_path, PROBLEMS, 2, FINGERPRINT) as writer:
        for number, problem in enumerate(PROBLEMS):
            writer.commit([row(problem, 0, reward=float(number > 1)), row(problem, 1, reward=float(number > 3))])
    summary = ReferencePool.open(tmp_path).summary()
    assert summary["solved_histogram"] == [2, 2, 2]
    assert summary["pass_at_k"] == {"1": pytest.approx(0.5), "2": pytest.approx(4 / 6)}
    assert summary["v_star"]["0.5"]["mean"] > summary["v_star"]["2.0"]["mean"] > 0.5
    assert json.loads(json.dumps(summary)) == summary
    plot_summary(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    assert pass_at_k([0], 4, 2) == 0
    assert pass_at_k([1], 4, 2) == pytest.approx(3 / 6)
    assert pass_at_k([3], 4, 2) == 1


def command(*words, cwd):
    words = [sys.executable, "-m", "astarpo.rollout", *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_the_commands_on_a_pool(tmp_path):
    pool = tmp_path / "pool"
    shards = fill(pool)
    sound = command("verify", pool, cwd=tmp_path)
    assert sound.returncode == 0
    assert "4 of 6 samples in 4 shards, sound" in sound.stdout
    regraded = command("regrade", pool, cwd=tmp_path)
    assert regraded.returncode == 0, regraded.stderr
    assert "no_answer" in regraded.stdout
    summary = command("summary", pool, "--json", "summary.json", cwd=tmp_path)
    assert summary.returncode == 0, summary.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == 4
    os.truncate(next(pool.glob("samples-*.parquet")), 100)
    broken = command("verify", pool, cwd=tmp_path)
    assert broken.returncode == 1
    assert "100 bytes instead of" in broken.stdout
    assert command("verify", tmp_path / "nowhere", cwd=tmp_path).returncode == 2
    assert shards
