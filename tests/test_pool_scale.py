"""A pool of a million rows opens, gives V* and is continued in seconds."""

import time

import numpy as np
import pytest

from astarpo.rollout import ReferencePool
from astarpo.rollout.data import Problem
from astarpo.rollout.pool import PoolWriter, Sample

PROMPTS, SAMPLES, SHARD = 125_000, 8, 20_000


@pytest.mark.slow
def test_a_million_rows(tmp_path):
    problems = [Problem(({"role": "user", "content": str(i)},), str(i)) for i in range(PROMPTS)]
    keys = [(problem.prompt_id, index) for problem in problems for index in range(SAMPLES)]
    with PoolWriter(tmp_path, problems, SAMPLES, {}) as writer:
        for start in range(0, len(keys), SHARD):
            part = keys[start : start + SHARD]
            writer.commit([Sample(k, i, i, (5, 2), "x", "stop", 2, "correct", float(i < 4)) for k, i in part])
    began = time.perf_counter()
    pool = ReferencePool.open(tmp_path)
    assert pool.is_complete
    opened = time.perf_counter()
    values = pool.values(0.5)
    valued = time.perf_counter()
    with PoolWriter(tmp_path, problems, SAMPLES, {}) as writer:
        assert writer.present.all()
    resumed = time.perf_counter()
    seconds = {"open": opened - began, "values": valued - opened, "resume": resumed - valued}
    print(seconds)
    assert len(values) == PROMPTS
    assert np.isclose(next(iter(values.values())), 0.5 * np.log((np.exp(2) + 1) / 2))
    assert seconds["open"] < 2
    assert seconds["values"] < 2
    assert seconds["resume"] < 5
