"""What is looked at before anything loads: driver, builds of torch and vLLM, and the engine that follows from them."""

from dataclasses import replace

import pytest

from astarpo.rollout import EngineOptions, startup
from astarpo.rollout.startup import Machine, built_for, chosen_engine, driver_runs, judge

GIGABYTE = 10**9
CPU = Machine(None, (), False, "2.13.0+cpu", None, False, "0.32.0", None)
T4 = Machine(
    "580.95.05", ("Tesla T4",), False, "2.13.0", "13.0", True, "0.32.0", "13.0", (7, 5), 15 * GIGABYTE, 16 * GIGABYTE
)
OLD_DRIVER = replace(T4, driver="550.54.15")


def test_both_can():
    assert judge(T4) == judge(T4, "vllm") == startup.Verdict("vllm")


def test_a_gpu_that_torch_cannot_use_is_an_error_with_two_ways_out():
    machine = replace(OLD_DRIVER, torch_sees_gpu=False, capability=None)  # torch cu130, driver 550
    for asked in ("auto", "vllm", "transformers"):
        with pytest.raises(ValueError, match=r"driver \(550.54.15\) sees a GPU \(Tesla T4\)") as error:
            judge(machine, asked)
        assert "needs driver 580" in str(error.value)
        assert "cu126" in str(error.value) and "CUDA_VISIBLE_DEVICES=''" in str(error.value)


def test_a_cpu_build_of_torch_beside_a_gpu_is_an_error():
    with pytest.raises(ValueError, match="it is a CPU build"):
        judge(replace(T4, torch="2.13.0+cpu", torch_cuda=None, torch_sees_gpu=False, capability=None))


def test_torch_can_and_vllm_cannot():
    machine = replace(OLD_DRIVER, torch="2.13.0+cu126", torch_cuda="12.6")  # driver 550, torch cu126, vLLM cu130
    verdict = judge(machine)
    assert verdict.engine == "transformers"
    assert verdict.note is not None and "Tesla T4" in verdict.note and "needs driver 580" in verdict.note
    with pytest.raises(ValueError, match=r"vLLM cannot run here: vllm 0\.32\.0 is built for CUDA 13\.0"):
        judge(machine, "vllm")
    assert judge(replace(machine, vllm="0.24.0+cu129", vllm_cuda="12.9")).engine == "vllm"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vllm": None, "vllm_cuda": None}, "it is not installed"),
        ({"vllm_cuda": None}, "built for CPUs"),
        ({"capability": (7, 0)}, "compute capability 7.5"),
    ],
)
def test_why_vllm_cannot_run_on_a_gpu(change, reason):
    verdict = judge(replace(T4, **change))
    assert verdict.engine == "transformers" and verdict.note is not None and reason in verdict.note


def test_without_a_gpu_the_cpu_is_used():
    assert judge(CPU) == startup.Verdict("vllm")
    assert judge(replace(CPU, vllm=None)).engine == "transformers"
    with pytest.raises(ValueError, match="built for GPUs"):
        judge(replace(CPU, vllm_cuda="13.0"), "vllm")


def test_a_gpu_hidden_on_purpose_is_none():
    machine = replace(T4, is_hidden=True, torch_sees_gpu=False, torch_cuda=None, vllm_cuda=None, capability=None)
    assert judge(machine) == startup.Verdict("vllm")


@pytest.mark.parametrize(
    ("driver", "cuda", "runs"),
    [
        ("580.65.06", "13.0", True),
        ("575.51", "13.0", False),
        ("550.54.15", "12.9", True),
        ("515.43", "12.0", False),
        ("470.1", "11.8", True),
    ],
)
def test_drivers(driver, cuda, runs):
    assert driver_runs(driver, cuda) is runs


@pytest.mark.parametrize(
    ("vllm", "cuda"),
    [("0.32.0", "13.0"), ("0.24.0+cu129", "12.9"), ("0.11.2", "12.8"), ("0.20.0", "13.0"), ("0.31.0+cpu", None)],
)
def test_what_a_wheel_was_built_for(vllm, cuda):
    assert built_for(vllm) == cuda


def test_the_choice_is_made_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(startup, "look", lambda: replace(OLD_DRIVER, torch_cuda="12.6"))
    startup._said.cache_clear()
    assert chosen_engine(EngineOptions()).engine == chosen_engine(EngineOptions()).engine == "transformers"
    assert len([record for record in caplog.records if "Tesla T4" in record.message]) == 1
    assert chosen_engine(EngineOptions(engine="server", server_url="http://localhost:1")).engine == "server"


def test_this_machine(capsys, monkeypatch):
    from astarpo.rollout.env_cli import main

    monkeypatch.setattr("sys.argv", ["astarpo env"])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "engine          vllm" in said and "torch" in said and "transformers" in said
