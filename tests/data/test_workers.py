"""Decoding in other processes changes nothing but the time it takes."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from data_toys import config, encoded, picture, write_mllm

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.loading import make_loader


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 samples; number 7 is cut off behind its header, number 20 has no answer."""
    path = write_mllm(tmp_path_factory.mktemp("data"), 60)
    records = json.loads(path.read_text())
    (path.parent / "cut.jpg").write_bytes(encoded(picture(0, 200, 200), "JPEG")[:900])
    records[7].update(
        images=["cut.jpg"], messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
    )
    records[20].update(messages=[{"role": "user", "content": "x"}])
    path.write_text(json.dumps(records))
    return path


def collect(loader, count):
    found = []
    for _ in range(count):
        packed = next(loader)
        found.append(
            (
                packed.sample_ids,
                {name: np.array(values) for name, values in packed.batch.fields().items()},
                loader.counters,
            )
        )
    return found


def test_batches_counters_and_resume_equal_those_of_one_process(tmp_path, data):
    alone = make_loader(config(tmp_path / "alone", data, data__max_error_rate=0.5), 0)
    expected = collect(alone, 9)
    alone.close()
    pooled = make_loader(config(tmp_path / "pooled", data, data__max_error_rate=0.5, data__workers=2), 0)
    first = collect(pooled, 3)
    state = json.loads(json.dumps(pooled.state()))
    pooled.restore(state)  # throws away what was prepared; the processes stay
    found = first + collect(pooled, 6)
    pooled.close()
    for (ids, arrays, counters), (other_ids, other_arrays, other_counters) in zip(expected, found, strict=True):
        assert ids == other_ids and counters == other_counters
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, other_arrays[name], err_msg=name)

    def listed(run):
        return sorted(
            (entry["id"], entry["reason"])
            for entry in map(json.loads, open(tmp_path / run / "run" / "quarantine.jsonl"))
        )

    assert listed("pooled") == listed("alone") == [("s20", "no_answer"), ("s7", "undecodable")]


def test_a_decoding_process_that_dies_stops_the_run_with_advice(tmp_path, data):
    loader = make_loader(config(tmp_path, data, data__max_error_rate=0.5, data__workers=1), 0)
    next(loader)
    (process,) = loader._encoder._pool._pool._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="ended by itself"):
        for _ in range(30):
            next(loader)
    loader.close()


def test_workers_and_the_cache_exclude_each_other(tmp_path, data):
    with pytest.raises(UserError, match="set one of them"):
        make_loader(config(tmp_path, data, data__workers=1, data__cache_examples=True), 0)
