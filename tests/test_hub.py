"""Publishing a pool and loading it again. The hub is a folder here: no hub can be reached."""

import fnmatch
import os
import shutil
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi, constants
from test_pool_faults import FINGERPRINT, PROBLEMS, command, fill, row

from astarpo.rollout import ReferencePool
from astarpo.rollout.pool import PoolWriter, regrade_pool
from astarpo.rollout.pool.publishing import publish_pool
from astarpo.verifier import Verifier


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "me" / "pool"

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_type, private, exist_ok) == ("dataset", True, True)
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, delete_patterns, commit_message):
        target = tmp_path / "hub" / repo_id
        for path in target.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in Path(folder_path).rglob("*"):
            name = str(path.relative_to(folder_path))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target / name)
        return "commit"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: str(tmp_path / "hub" / repo_id))
    return folder


def finished_pool(folder):
    with PoolWriter(folder, PROBLEMS, 2, FINGERPRINT) as writer:
        for number, problem in enumerate(PROBLEMS):
            writer.commit([row(problem, index, reward=float(number > index)) for index in range(2)])
    return ReferencePool.open(folder)


def test_a_published_pool_is_the_same_pool(hub, tmp_path, monkeypatch):
    pool = finished_pool(tmp_path / "pool")
    assert publish_pool(tmp_path / "pool", "me/pool", private=True) == "commit"
    monkeypatch.chdir(tmp_path)
    fetched = ReferencePool.open("me/pool")
    assert fetched.folder == hub
    assert fetched.samples == pool.samples
    assert fetched.values(0.5) == pool.values(0.5)
    with Verifier() as verifier:
        regrade_pool(tmp_path / "pool", verifier, "new")
    publish_pool(tmp_path / "pool", "me/pool", private=True)
    assert len(list(hub.glob("samples-*.parquet"))) == len(PROBLEMS)
    assert not list(hub.glob("*.lock"))


def test_the_card_makes_it_a_data_set(hub, tmp_path):
    finished_pool(tmp_path / "pool")
    publish_pool(tmp_path / "pool", "me/pool", private=True)
    samples = load_dataset(str(hub), "samples", split="train", cache_dir=str(tmp_path / "cache"))
    prompts = load_dataset(str(hub), "prompts", split="train", cache_dir=str(tmp_path / "cache"))
    assert (len(samples), len(prompts)) == (12, 6)
    card = (hub / "README.md").read_text()
    assert 'ReferencePool.open("me/pool")' in card
    assert '| `verifier` | `"old"` |' in card
    assert "| pass@2 |" in card


def test_nothing_is_sent_when_it_should_not(hub, tmp_path, monkeypatch):
    fill(tmp_path / "unfinished")
    with pytest.raises(ValueError, match="unfinished"):
        publish_pool(tmp_path / "unfinished", "me/pool")
    finished_pool(tmp_path / "broken")
    os.truncate(next((tmp_path / "broken").glob("samples-*.parquet")), 10)
    with pytest.raises(ValueError, match="broken: samples-"):
        publish_pool(tmp_path / "broken", "me/pool")
    assert not hub.exists()


def test_offline_nothing_tries(tmp_path):
    finished_pool(tmp_path / "pool")
    refused = command("publish", tmp_path / "pool", "me/pool", cwd=tmp_path)
    assert refused.returncode == 2
    assert "HF_HUB_OFFLINE is set" in refused.stderr
    missing = command("summary", "me/pool", cwd=tmp_path)
    assert missing.returncode == 2
    assert "neither a folder here nor" in missing.stderr
