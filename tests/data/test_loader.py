"""The loader: exact resume, any number of processes, mixtures and epochs, errors recorded, no sample lost."""

from __future__ import annotations

import collections
import json
import os

import numpy as np
import pytest
from data_toys import config, encoded, picture, record, write_mllm

from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.sources.readers import Source
from mindvl_jax.models.loading import make_loader


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_mllm(tmp_path_factory.mktemp("data"), 60)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def assert_same(first, second):
    assert first.sample_ids == second.sample_ids
    for name, values in first.batch.fields().items():
        np.testing.assert_array_equal(values, getattr(second.batch, name), err_msg=name)


@pytest.mark.parametrize("stop", [0, 5])
def test_a_resumed_loader_gives_the_same_batches_bit_for_bit(tmp_path, data, stop):
    settings = config(tmp_path, data)
    whole = make_loader(settings, 0)
    batches, counters = [], []
    for _ in range(9):
        batches.append(next(whole))
        counters.append(whole.counters)
    whole.close()
    loader = make_loader(settings, 0)
    for _ in range(stop):
        next(loader)
    state = json.loads(json.dumps(loader.state()))  # what a checkpoint keeps
    loader.close()
    resumed = make_loader(settings, 0)
    resumed.restore(state)
    for expected, counted in zip(batches[stop:], counters[stop:], strict=True):
        assert_same(expected, next(resumed))
        assert resumed.counters == counted
    resumed.close()


def test_a_loader_can_be_set_back_while_it_prepares_batches(tmp_path, data):
    loader = make_loader(config(tmp_path, data), 0)
    next(loader)
    state = loader.state()
    expected = [next(loader) for _ in range(4)]
    loader.restore(state)
    for batch in expected:
        assert_same(batch, next(loader))
    loader.close()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_hold_neighbouring_rows_of_the_same_global_batch(tmp_path, data, processes):
    settings = config(tmp_path, data)
    whole = take(make_loader(settings, 0), 3)
    loaders = [make_loader(settings, 0, process_index=index, process_count=processes) for index in range(processes)]
    parts = [take(loader, 3) for loader in loaders]
    assert len({loader.counters["plan_fingerprint"] for loader in loaders}) == 1
    for step, expected in enumerate(whole):
        for name, values in expected.batch.fields().items():
            joined = np.concatenate([getattr(part[step].batch, name) for part in parts])
            np.testing.assert_array_equal(values, joined, err_msg=name)


def test_a_run_resumed_on_another_number_of_processes_sees_every_sample_once(tmp_path, data):
    settings = config(tmp_path, data)
    whole = [packed.sample_ids for packed in take(make_loader(settings, 0), 8)]
    loader = make_loader(settings, 0, process_index=1, process_count=2)
    for _ in range(3):
        next(loader)
    state = loader.state()
    loader.close()
    rest: list[list[tuple[str, ...]]] = [[] for _ in range(5)]
    for index in range(4):
        part = make_loader(settings, 0, process_index=index, process_count=4)
        part.restore(state)
        for step, packed in enumerate(take(part, 5)):
            rest[step].extend(packed.sample_ids)
    assert [tuple(rows) for rows in rest] == whole[3:]


def test_every_sample_comes_once_an_epoch_in_another_order_each_time(tmp_path, data):
    loader = make_loader(config(tmp_path, data), 0)
    seen: list[str] = []
    while loader.counters["epochs"] < 4:
        seen += [identifier for row in next(loader).sample_ids for identifier in row]
    counters = loader.counters
    loader.close()
    counts = collections.Counter(seen)
    assert len(counts) == 60 and counters["samples"] == len(seen)
    # Drawn four times and a little more, less what still waits.
    assert sum(counts.values()) == round(loader.counters["epochs"] * 60), "samples that wait for a row do not count"
    assert set(counts.values()) <= {2, 3, 4, 5}
    assert seen[:40] != seen[60:100]


def test_a_mixture_keeps_its_proportions_from_the_start(tmp_path):
    paths = {name: {"path": str(write_mllm(tmp_path / name, 40, name=f"{name}.json"))} for name in ("a", "b")}
    for folder in paths:
        records = json.loads((tmp_path / folder / f"{folder}.json").read_text())
        for index, entry in enumerate(records):
            entry["id"] = f"{folder}{index}"
        (tmp_path / folder / f"{folder}.json").write_text(json.dumps(records))
    settings = config(tmp_path, paths, phase__mixture=[{"source": "a", "weight": 3}, {"source": "b", "weight": 1}])
    loader = make_loader(settings, 0)
    names = [identifier[0] for packed in take(loader, 12) for row in packed.sample_ids for identifier in row]
    share = names.count("a") / len(names)
    assert abs(share - 0.75) < 0.06, share
    epochs = loader.counters["epochs_by_source"]
    assert {name: round(share * 40) for name, share in epochs.items()} == collections.Counter(names), (
        "samples trained, not samples read ahead"
    )


def test_phases_and_seeds_order_the_data_differently(tmp_path, data):
    first = take(make_loader(config(tmp_path, data), 0), 2)
    other = take(make_loader(config(tmp_path, data, run__seed=1), 0), 2)
    same = take(make_loader(config(tmp_path, data), 0), 2)
    assert [p.sample_ids for p in first] == [p.sample_ids for p in same] != [p.sample_ids for p in other]


def test_cached_samples_give_the_same_batches(tmp_path, data):
    plain = take(make_loader(config(tmp_path, data), 0), 12)
    cached = take(make_loader(config(tmp_path, data, data__cache_examples=True), 0), 12)
    warm = take(make_loader(config(tmp_path, data, data__cache_examples=True), 0), 12)
    for a, b, c in zip(plain, cached, warm, strict=True):
        assert_same(a, b)
        assert_same(a, c)


def test_rows_must_divide_among_processes(tmp_path, data):
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        make_loader(config(tmp_path, data), 0, process_index=0, process_count=3)


def test_a_state_of_other_data_is_refused(tmp_path, data):
    loader = make_loader(config(tmp_path, data), 0)
    next(loader)
    state = loader.state()
    loader.close()
    fewer = make_loader(config(tmp_path, {"a": {"path": str(data), "max_samples": 50}}), 0)
    with pytest.raises(UserError, match="data has changed"):
        fewer.restore(state)
    other = make_loader(config(tmp_path, data, run__seed=5), 0)
    with pytest.raises(UserError, match="seed"):
        other.restore(state)


# --- bad samples ---


def damaged(tmp_path, bad_every: int = 10, count: int = 60):
    """A file in which every `bad_every`-th sample is bad, each in another way."""
    folder = tmp_path / "damaged data 图"
    path = write_mllm(folder, count)
    records = json.loads(path.read_text())
    ways = [
        lambda entry: entry.update(
            images=["missing.png"],
            messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}],
        ),
        lambda entry: entry.update(
            images=["../outside.png"],
            messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}],
        ),
        lambda entry: entry.update(messages=[{"role": "narrator", "content": "x"}]),
        lambda entry: entry.update(messages=[{"role": "user", "content": "x"}]),
        lambda entry: entry.update(
            images=["cut.jpg"], messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
        ),
        lambda entry: entry.update(
            images=[], messages=[{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
        ),
    ]
    (tmp_path / "outside.png").write_bytes(encoded(picture(0)))
    (folder / "cut.jpg").write_bytes(encoded(picture(0, 200, 200), "JPEG")[:900])  # its header is whole
    bad = []
    for number, index in enumerate(range(0, count, bad_every)):
        ways[number % len(ways)](records[index])
        bad.append(records[index]["id"])
    path.write_text(json.dumps(records))
    return path, bad


def test_bad_samples_are_written_down_with_reasons_and_the_rest_is_used(tmp_path):
    path, bad = damaged(tmp_path)
    settings = config(tmp_path, path, data__max_error_rate=0.5)
    loader = make_loader(settings, 0)
    seen: set[str] = set()
    while loader.counters["epochs"] < 2.2:
        seen |= {identifier for row in next(loader).sample_ids for identifier in row}
    loader.close()
    listed = [json.loads(line) for line in open(os.path.join(settings.run.dir, "quarantine.jsonl"), encoding="utf-8")]
    assert {entry["id"] for entry in listed} == set(bad) and len(listed) == len(bad), "each once, whatever the epochs"
    assert seen == {f"s{index}" for index in range(60)} - set(bad)
    assert {entry["reason"] for entry in listed} == {
        "missing_media",
        "outside_root",
        "unknown_role",
        "no_answer",
        "undecodable",
        "media_mismatch",
    }
    assert loader.counters["quarantined"] >= 2 * len(bad) - 2
    assert all(entry["message"] and "data.json element" in entry["where"] for entry in listed)


def test_batches_with_bad_samples_resume_exactly_too(tmp_path):
    path, _ = damaged(tmp_path)
    settings = config(tmp_path, path, data__max_error_rate=0.5)
    whole = make_loader(settings, 0)
    batches = [next(whole) for _ in range(8)]
    final = whole.counters
    whole.close()
    loader = make_loader(settings, 0)
    for _ in range(3):
        next(loader)
    resumed = make_loader(settings, 0)
    resumed.restore(loader.state())
    loader.close()
    for expected in batches[3:]:
        assert_same(expected, next(resumed))
    assert resumed.counters == final
    resumed.close()


def test_the_raise_policy_stops_at_the_first_bad_sample_with_its_id(tmp_path):
    path, bad = damaged(tmp_path, bad_every=30)
    loader = make_loader(config(tmp_path, path, data__on_error="raise"), 0)
    with pytest.raises(UserError, match="|".join(f"'{name}'" for name in bad)):
        for _ in range(20):
            next(loader)
    with pytest.raises(UserError):
        next(loader)  # a second call raises the same error and does not hang
    loader.close()


def test_too_many_bad_samples_stop_the_run(tmp_path):
    path, _ = damaged(tmp_path, bad_every=5)
    loader = make_loader(config(tmp_path, path, data__max_error_rate=0.05), 0)
    with pytest.raises(UserError, match="max_error_rate 0.05"):
        for _ in range(60):
            next(loader)
    loader.close()


def test_a_data_set_of_nothing_but_bad_samples_stops_instead_of_searching_for_ever(tmp_path):
    path, _ = damaged(tmp_path, bad_every=1, count=12)
    loader = make_loader(config(tmp_path, path, data__max_error_rate=1.0), 0)
    with pytest.raises(UserError, match="nothing to train on"):
        for _ in range(100):
            next(loader)
    loader.close()


# --- sources that cannot be opened ---


def test_a_malformed_line_is_quarantined_with_its_number(tmp_path):
    lines = [json.dumps(record(index)) for index in range(30)]
    lines[6] = '{"id": "broken", "messages": ['
    lines.insert(3, "")  # blank lines carry no sample but count as lines
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    settings = config(tmp_path, tmp_path / "d.jsonl", data__max_error_rate=0.5)
    take(make_loader(settings, 0), 2)
    listed = [json.loads(line) for line in open(os.path.join(settings.run.dir, "quarantine.jsonl"))]
    assert len(listed) == 1 and listed[0]["where"].endswith("d.jsonl line 8") and listed[0]["reason"] == "malformed"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", '[{"a": 1},\n{"b": }]', "line 2 column 7"),
        ("d.json", '{"a": 1}', "expected a list"),
        ("d.json", "[]", "no samples"),
        ("d.json", "[" * 100000, "nested too deeply|line 1"),
        ("d.parquet", "not parquet", "not a readable parquet"),
        ("d.tar", "not a tar at all" * 100, "not a readable tar"),
        ("d.bin", "x", "does not tell the format"),
    ],
)
def test_unreadable_files_are_refused_before_training(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make_loader(config(tmp_path, tmp_path / name), 0)


def test_missing_files_of_all_sources_are_named_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        make_loader(config(tmp_path, {"one": {"path": "no/such"}, "two": {"path": "*.nothing"}}), 0)
    assert "sources.one" in str(caught.value) and "sources.two" in str(caught.value)


def test_a_symlink_out_of_the_data_root_is_refused(tmp_path):
    from mindvl_jax.data.media.image import image_size
    from mindvl_jax.data.sample import SampleError

    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(picture(0)))
    os.symlink(tmp_path / "secret.png", tmp_path / "data" / "inside.png")
    (tmp_path / "data" / "d.json").write_text(json.dumps([record(0, media=["inside.png"])]))
    sample = Source("a", config(tmp_path, tmp_path / "data" / "d.json").data.sources["a"])[0]
    with pytest.raises(SampleError) as caught:
        image_size(sample.images[0])
    assert caught.value.reason == "outside_root"


def test_a_file_of_another_shape_is_refused_with_lines_that_are_accepted(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": f"{number}"} for number in range(60)]))
    loader = make_loader(config(tmp_path, path), 0)
    with pytest.raises(UserError) as refused:
        next(loader)
    loader.close()
    message = str(refused.value)
    assert "there is nothing to train on" in message and "Lines that are accepted:" in message
    shown = [json.loads(line) for line in message.splitlines() if line.startswith("  {")]
    assert len(shown) == 3
    path.write_text(json.dumps(shown))
    for sample in Source("s", SourceConfig(path=str(path))):
        assert sample.messages[-1].content == "A cat.", "what the message shows is read"
