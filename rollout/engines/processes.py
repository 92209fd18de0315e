"""What an engine in this process must leave as it found it: process groups, threads and random states.

vLLM expects a process of its own. Here it shares one with the trainer, and with the engines before and after it.
"""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_GROUPS_OF_VLLM: set[int] = set()
"""Identities of default process groups that vLLM has made."""


def joins_launcher() -> bool:
    """Whether the processes were started together by torchrun or accelerate, and the engine has to join their process group.

    A group that vLLM made itself, for an earlier engine of this process, says nothing: there is no launcher, and its variables (RANK,
    LOCAL_RANK) are not set.
    """
    import torch

    if not torch.distributed.is_initialized() or "LOCAL_RANK" not in os.environ:
        return False
    return id(torch.distributed.group.WORLD) not in _GROUPS_OF_VLLM


def forget_lost_groups() -> None:
    """Let vLLM make its groups anew where the process group under them is gone: destroyed by the trainer's side (accelerate's
    `end_training`), or by vLLM itself when it gave up the start of another engine. It would take the old ones for its own
    (`ensure_model_parallel_initialized` in vllm/distributed/parallel_state.py) and fail."""
    import torch

    groups: Any = sys.modules.get("vllm.distributed.parallel_state")
    if groups is None or not groups.model_parallel_is_initialized():
        return
    try:
        torch.distributed.get_backend(groups.get_tp_group().device_group)
        return
    except (ValueError, RuntimeError, AssertionError, AttributeError):
        pass
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: None
    try:
        groups.destroy_model_parallel()
        groups.destroy_distributed_environment()
    finally:
        torch.distributed.destroy_process_group = destroy


@contextmanager
def starting() -> Iterator[None]:
    """Around the start of an engine: note whether the process group is vLLM's, and undo what else it changes for the whole process.

    vLLM seeds all random states (`set_random_seed` in vllm/utils/torch_utils.py), so a resumed training would not be the one that was
    interrupted. On a GPU it sets one thread for torch (`set_default_torch_num_threads` there), which slows tokenising, grading and
    CPU offload of the trainer.
    """
    import numpy
    import torch

    threads = torch.get_num_threads()
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    forget_lost_groups()
    had_group = torch.distributed.is_initialized()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        if torch.cuda.is_available() and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if not had_group and torch.distributed.is_initialized():
            _GROUPS_OF_VLLM.add(id(torch.distributed.group.WORLD))


@contextmanager
def ending() -> Iterator[None]:
    """Around the end of an engine: keep a default process group that vLLM did not make.

    `destroy_distributed_environment` (vllm/distributed/parallel_state.py) destroys it in any case, and with it the trainer's.
    """
    import torch

    if not joins_launcher():
        _GROUPS_OF_VLLM.clear()
        yield
        return
    destroy, world = torch.distributed.destroy_process_group, torch.distributed.group.WORLD

    def spare_world(group: Any = None) -> None:
        if group is not None and group is not world:
            destroy(group)

    torch.distributed.destroy_process_group = spare_world
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
