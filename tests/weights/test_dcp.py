"""Folders of torch.distributed.checkpoint: one that FSDP2 wrote on two processes, and damaged ones.

`recorded/fsdp2_dcp` holds a Qwen2.5-VL of transformers in bfloat16 under `model`, a moment under `optimizer` and a
counter; each parameter is drawn from a generator seeded by the CRC of its name.
"""

import shutil
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.weights.mapping import mapping_of, read_config
from mindvl_jax.weights.mindspeed.convert import published_shapes
from mindvl_jax.weights.mindspeed.dcp import Dcp

FOLDER = Path(__file__).parent / "recorded" / "fsdp2_dcp"


def values(name, shape):
    drawn = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return torch.from_numpy(drawn).bfloat16()


def opened(folder, **options):
    config = read_config(FOLDER)
    return Dcp(folder, published_shapes(config), mapping_of(config), **options)


def test_shards_of_two_processes_become_a_folder_that_transformers_opens(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    assert main(["convert", "dcp", "--from", str(FOLDER), "--to", str(tmp_path / "hf"), "--like", str(FOLDER)]) == 0
    assert "45 tensors under 'model.'; 3 other keys are not converted" in capsys.readouterr().out
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, values(name, value.shape)), name
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="numpy") as file:
        assert len(list(file.keys())) == 45


def test_what_is_missing_unexpected_or_misshapen_is_listed_at_once(tmp_path):
    config = read_config(FOLDER)
    shapes = published_shapes(config)
    some, other = list(shapes)[:2]
    wrong = {**shapes, some: (3, *shapes[some][1:]), "model.norm2.weight": (16,)}
    del wrong[other]
    with pytest.raises(UserError) as error:
        Dcp(FOLDER, wrong, mapping_of(config))
    assert all(word in str(error.value) for word in ("missing    model.model.norm2", "unexpected", "misshapen"))


@pytest.fixture(scope="module")
def state():
    """The recorded model's tensors, by published name."""
    source = opened(FOLDER)
    return {name: source.tensor(name) for name in published_shapes(read_config(FOLDER))}


def as_torch(array):
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def test_a_folder_with_two_models_asks_which(state, tmp_path):
    first = {name: as_torch(value) for name, value in state.items()}
    dcp.save(
        {"model": first, "ema": {name: value + 1 for name, value in first.items()}}, checkpoint_id=tmp_path / "two"
    )
    with pytest.raises(UserError, match="holds the model 2 times, under 'ema.', 'model.'; say which with --prefix"):
        opened(tmp_path / "two")
    name = next(iter(state))
    found = opened(tmp_path / "two", prefix="ema.").tensor(name)
    assert np.array_equal(found, (as_torch(state[name]) + 1).view(torch.int16).numpy().view(ml_dtypes.bfloat16))


def test_a_folder_that_is_damaged_or_hostile_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder of torch.distributed.checkpoint"):
        opened(tmp_path)
    for name, change, message in (
        (
            "pickle",
            lambda folder: (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch x'\ntR."),
            "not the metadata",
        ),
        (
            "cut",
            lambda folder: (folder / ".metadata").write_bytes((FOLDER / ".metadata").read_bytes()[:999]),
            "damaged",
        ),
        ("file", lambda folder: (folder / "__1_0.distcp").unlink(), "is no file of the folder"),
    ):
        folder = tmp_path / name
        shutil.copytree(FOLDER, folder)
        change(folder)
        with pytest.raises(UserError, match=message):
            opened(folder)
    outside = tmp_path / "outside"
    shutil.copytree(FOLDER, outside)
    content = (outside / ".metadata").read_bytes()
    (outside / ".metadata").write_bytes(content.replace(b"__1_0.distcp", b"../0_.distcp"))
    (tmp_path / "0_.distcp").write_bytes((FOLDER / "__1_0.distcp").read_bytes())
    with pytest.raises(UserError, match="is no file of the folder"):
        opened(outside)
    short = tmp_path / "short"
    shutil.copytree(FOLDER, short)
    (short / "__1_0.distcp").write_bytes((FOLDER / "__1_0.distcp").read_bytes()[:5000])
    source = opened(short)
    with pytest.raises(UserError, match="not a zip file|damaged"):
        for name in published_shapes(read_config(FOLDER)):
            source.tensor(name)
