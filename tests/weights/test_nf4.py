"""NF4 against bitsandbytes 0.50.2: its codes and its own dequantised values are recorded (quantize_4bit,
dequantize_4bit on random matrices).
"""

import json
from pathlib import Path
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.models.layers.nf4 import TABLE, quantize
from mindvl_jax.models.layers.nf4 import dequantize as on_device
from mindvl_jax.weights.nf4 import INDEX, SIBLINGS, STATE, dequantize, dequantize_folder

RECORDED = load_file(Path(__file__).parent / "recorded" / "nf4_bitsandbytes_0_50_2.safetensors")
NAMES = sorted(name.removesuffix(STATE) for name in RECORDED if name.endswith(STATE))


@pytest.mark.parametrize("name", NAMES)
def test_values_have_the_bits_of_bitsandbytes(name):
    found = dequantize(
        RECORDED[name], {suffix: RECORDED[name + suffix] for suffix in SIBLINGS if name + suffix in RECORDED}
    )
    expected = RECORDED[f"expected.{name}"]
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


def test_the_table_is_the_normal_distributions_of_the_paper():
    """arXiv 2305.14314, appendix E: 8 quantiles above zero, 7 below, zero itself, over the largest."""
    ends, normal = 0.9677083, NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(ends, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(ends, 0.5, 8)[:-1]]
    np.testing.assert_allclose(TABLE, np.sort([*above, 0, *below]) / max(above), atol=2e-7)
    assert all(np.array_equal(RECORDED[f"{name}.quant_map"], TABLE) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_quantising_on_the_device_gives_the_bytes_of_bitsandbytes(name):
    expected = jnp.asarray(RECORDED[f"expected.{name}"])
    matrix = quantize(expected.T)
    assert np.asarray(matrix.codes).tobytes() == RECORDED[name].tobytes()
    if f"{name}.nested_absmax" not in RECORDED:
        assert np.asarray(matrix.absmax).tobytes() == RECORDED[f"{name}.absmax"].tobytes()
        assert np.asarray(on_device(matrix, expected.dtype)).tobytes() == RECORDED[f"expected.{name}"].tobytes()


def test_each_weight_gets_the_nearest_value_of_the_table_in_its_block_of_the_published_order():
    published = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)  # blocks reach into the next row
    published.reshape(-1)[64:128] = 0
    matrix = quantize(jnp.asarray(published.T))
    blocks = published.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    nearest = np.abs(blocks[..., None] / np.where(absmax == 0, 1, absmax)[:, None, None] - TABLE).argmin(-1)
    codes = nearest.reshape(8, 12, 2)
    assert np.array_equal(np.asarray(matrix.codes), codes[..., 0] * 16 + codes[..., 1])
    values = (TABLE[nearest] * absmax[:, None]).reshape(8, 24)
    assert np.array_equal(np.asarray(on_device(matrix, jnp.float32)), values)


@pytest.fixture
def quantised(tmp_path):
    folder = tmp_path / "nf4"
    folder.mkdir()
    save_file(
        {name: value for name, value in RECORDED.items() if not name.startswith("expected.")}
        | {"norm.weight": np.ones(3, np.float32)},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(RECORDED, "model.safetensors")}))
    return folder


def test_a_folder_becomes_a_plain_one(quantised, tmp_path, capsys):
    assert main(["convert", "nf4", "--from", str(quantised), "--to", str(tmp_path / "plain")]) == 0
    assert "6 matrices dequantised" in capsys.readouterr().out
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert (
        set(found) == {*NAMES, "norm.weight"} == set(json.loads((tmp_path / "plain" / INDEX).read_text())["weight_map"])
    )
    assert all(
        np.array_equal(found[name].view(np.uint8), RECORDED[f"expected.{name}"].view(np.uint8)) for name in NAMES
    )
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == {"model_type": "qwen2_5_vl"}


def test_other_quantisations_and_damage_are_refused(quantised, tmp_path):
    file = quantised / "model.safetensors"
    tensors = load_file(file)
    broken = {name: value for name, value in tensors.items() if name != f"{NAMES[0]}.quant_map"}
    for changed, message in (
        (tensors | {"a.SCB": np.ones(2, np.float32)}, "another quantisation"),
        (broken, f"{NAMES[0]} cannot be dequantised"),
        (tensors | {NAMES[0]: tensors[NAMES[0]][:-1]}, "287 bytes and 9 blocks"),
        ({"norm.weight": np.ones(3, np.float32)}, "no weights in NF4"),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=message):
            dequantize_folder(quantised, tmp_path / "out")
