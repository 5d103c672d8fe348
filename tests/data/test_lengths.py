"""Length index on disk: same batches as without, only the samples of own rows encoded, stale indexes refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import yaml
from data_toys import config, encoded, picture, write_mllm

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.encoding import InlineEncoder
from mindvl_jax.models.loading import make_loader


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty samples, three of them bad in ways that their records or headers show."""
    path = write_mllm(tmp_path_factory.mktemp("data"), 60)
    records = json.loads(path.read_text())
    records[7]["messages"][0]["role"] = "narrator"
    records[9]["images"] = ["missing.png"]
    records[21]["messages"].pop()
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def indexed(data, tmp_path_factory):
    """Settings of a run whose lengths are on disk; written by the command."""
    folder = tmp_path_factory.mktemp("indexed")
    settings = config(folder, data, data__max_error_rate=0.5, data__length_index=str(folder / "lengths"))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert main(["data", "index", "--config", str(folder / "config.yaml")]) == 0
    return settings


def changed(settings, **data):
    return settings.model_copy(update=dict(data=settings.data.model_copy(update=data)))


def run_in(settings, folder):
    return settings.model_copy(update=dict(run=settings.run.model_copy(update=dict(dir=str(folder)))))


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def test_batches_counts_and_refusals_are_those_without_an_index_and_a_process_encodes_its_own_rows_alone(
    indexed, tmp_path, monkeypatch
):
    plain = make_loader(run_in(changed(indexed, length_index=None), tmp_path / "plain"), 0)
    expected = take(plain, 6)
    encoded_there = []
    real = InlineEncoder.encode
    monkeypatch.setattr(
        InlineEncoder, "encode", lambda self, position: encoded_there.append(position) or real(self, position)
    )
    halves = [
        make_loader(run_in(indexed, tmp_path / f"half{index}"), 0, process_index=index, process_count=2)
        for index in range(2)
    ]
    parts = []
    for loader in halves:
        encoded_there.clear()
        parts.append(take(loader, 6))
        own = {identifier for packed in parts[-1] for row in packed.sample_ids for identifier in row}
        # Batches prepared ahead count too: two in the queue, one on its way in.
        assert len(own) <= len(encoded_there) <= len(own) * 9 // 6 + 8, "a process encodes what it decodes, no more"
        assert loader.counters["plan_fingerprint"] == plain.counters["plan_fingerprint"]
        assert loader.counters["quarantined_by_reason"] == plain.counters["quarantined_by_reason"]
    for step, whole in enumerate(expected):
        assert parts[0][step].sample_ids + parts[1][step].sample_ids == whole.sample_ids
        for name, values in whole.batch.fields().items():
            np.testing.assert_array_equal(
                values, np.concatenate([getattr(part[step].batch, name) for part in parts]), err_msg=name
            )
    listed = [
        sorted(json.loads(line)["id"] for line in open(tmp_path / name / "quarantine.jsonl"))
        for name in ("plain", "half0")
    ]
    assert listed[0] == listed[1]


def test_a_run_that_began_without_an_index_goes_on_with_one(indexed, tmp_path):
    loader = make_loader(run_in(changed(indexed, length_index=None), tmp_path / "run"), 0)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    expected = take(loader, 2)
    resumed = make_loader(run_in(indexed, tmp_path / "run"), 0)
    resumed.restore(state)
    for one, other in zip(expected, take(resumed, 2), strict=True):
        assert one.sample_ids == other.sample_ids
        np.testing.assert_array_equal(one.batch.patches, other.batch.patches)


def test_an_index_of_other_data_or_settings_is_not_believed(indexed, data, tmp_path):
    with pytest.raises(
        UserError, match="does not exist; a-.* is of other data or other settings. Write it with `mindvl data index"
    ):
        make_loader(changed(indexed, train_on="all"), 0)
    os.utime(data, ns=(1, 1))
    with pytest.raises(UserError, match="is of other data"):
        make_loader(indexed, 0)
    with pytest.raises(UserError, match="does not exist. Write it"):
        make_loader(changed(indexed, length_index=str(tmp_path)), 0)


def test_a_picture_that_changed_its_size_since_stops_the_run_and_a_cut_index_is_refused(tmp_path):
    path = write_mllm(tmp_path / "data", 24)
    settings = config(tmp_path, path, data__length_index=str(tmp_path / "lengths"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert main(["data", "index", "--config", str(tmp_path / "config.yaml")]) == 0
    for file in (tmp_path / "data").glob("*.png"):
        file.write_bytes(encoded(picture(0, 200, 30)))
    loader = make_loader(settings, 0)
    with pytest.raises(UserError, match="its media were changed after `mindvl data index`"):
        take(loader, 4)
    loader.close()
    index = next((tmp_path / "lengths").iterdir())
    index.write_bytes(index.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read .*delete it and write it again"):
        make_loader(settings, 0)


def test_the_command_asks_for_a_folder(data, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path, data).model_dump(mode="json")))
    assert main(["data", "index", "--config", str(tmp_path / "config.yaml")]) == 2
    assert "names no folder" in capsys.readouterr().err
