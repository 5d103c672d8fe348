"""FP8 folders of DeepSeek-V3 against torch's own float8 and the formula; to bfloat16 and back in equal bytes."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.weights import fp8

SHAPES = {"model.layers.0.self_attn.o_proj": (256, 300), "model.layers.1.mlp.experts.0.up_proj": (130, 128)}
PLAIN = {"model.norm.weight": (64,), "model.layers.0.mlp.gate.weight": (8, 64)}
MTP = "model.layers.2.eh_proj.weight"


def quantised(shape, seed):
    """By torch: a block's scale is its largest magnitude over 448."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    rows, columns = (-(-size // 128) for size in shape)
    scales, codes = torch.empty(rows, columns), torch.empty(shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = block.abs().max() / 448
            codes[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = (block / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


@pytest.fixture
def folder(tmp_path):
    """Two files; the scales of the second file's matrix lie in the first, as in the published folder now and then."""
    source = tmp_path / "fp8"
    source.mkdir()
    files = {"a.safetensors": {}, "b.safetensors": {}}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        codes, scales = quantised(shape, seed)
        files["b.safetensors"][f"{name}.weight"] = codes
        files["ba"[seed] + ".safetensors"][f"{name}.weight_scale_inv"] = scales
    for name, shape in PLAIN.items():
        files["a.safetensors"][name] = torch.randn(shape).bfloat16()
    files["a.safetensors"][MTP] = torch.randn(4, 8).bfloat16()
    for name, tensors in files.items():
        save_file(tensors, source / name, metadata={"format": "pt"})
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "quantization_config": fp8.QUANTIZATION}
    (source / "config.json").write_text(json.dumps(config))
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (source / fp8.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (source / "tokenizer.json").write_text("{}")
    return source


def all_tensors(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_values_are_those_of_the_formula_in_torch(folder, tmp_path):
    assert main(["convert", "fp8", "--from", str(folder), "--to", str(tmp_path / "plain")]) == 0
    before, after = all_tensors(folder), all_tensors(tmp_path / "plain")
    for name, shape in SHAPES.items():
        scales = before[f"{name}.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        want = (before[f"{name}.weight"].float() * scales[: shape[0], : shape[1]]).bfloat16()
        assert torch.equal(after[f"{name}.weight"], want)
    assert all(torch.equal(after[name], before[name]) for name in PLAIN)
    assert set(after) == {f"{name}.weight" for name in SHAPES} | set(PLAIN) | {MTP}
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    index = json.loads((tmp_path / "plain" / fp8.INDEX).read_text())["weight_map"]
    assert set(index) == set(after) and (tmp_path / "plain" / "tokenizer.json").is_file()


def test_an_untouched_folder_comes_back_in_equal_bytes(folder, tmp_path, capsys):
    plain, back = tmp_path / "plain", tmp_path / "back"
    assert main(["convert", "fp8", "--from", str(folder), "--to", str(plain)]) == 0
    assert main(["convert", "fp8", "--from", str(plain), "--to", str(back), "--like", str(folder)]) == 0
    assert "2 matrices in FP8, 0 of 8 blocks with a new scale" in capsys.readouterr().out
    before, after = all_tensors(folder), all_tensors(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    assert json.loads((back / "config.json").read_text())["quantization_config"] == fp8.QUANTIZATION


def test_weights_that_grew_get_a_scale_of_their_own_and_stay_within_rounding():
    codes, scales = (x.numpy() if x.dtype == torch.float32 else x for x in quantised((256, 256), 3))
    weight = fp8.dequantize(codes.view(torch.uint8).numpy().view(fp8.FLOAT8), scales).astype(np.float32)
    weight[:128, :128] *= 3
    found, own, changed = fp8.quantize(weight, scales)
    assert changed == 1 and np.array_equal(own.reshape(-1)[1:], scales.reshape(-1)[1:])
    assert own[0, 0] == np.abs(weight[:128, :128]).max() / np.float32(448)
    want = torch.from_numpy(weight[:128, :128] / own[0, 0]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(found[:128, :128].view(np.uint8), want)
    error = np.abs(found.astype(np.float32) * fp8._spread(own, weight.shape) - weight)
    assert (error <= 2.0**-4 * np.abs(weight) + 2.0**-10 * fp8._spread(own, weight.shape)).all()


def test_the_mtp_layer_is_left_out_when_asked_and_said(folder, tmp_path, capsys):
    assert main(["convert", "fp8", "--from", str(folder), "--to", str(tmp_path / "plain"), "--without-mtp"]) == 0
    assert "1 tensors of MTP layers left out" in capsys.readouterr().out
    assert MTP not in all_tensors(tmp_path / "plain")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("scale", "has no model.layers.0.self_attn.o_proj.weight_scale_inv"),
        ("shape", "in blocks of 128 x 128"),
        ("config", "expected quant_method fp8 and weight_block_size"),
        ("truncated", "not a whole safetensors file"),
    ],
)
def test_what_does_not_belong_together_is_refused_before_anything_is_written(folder, tmp_path, damage, message):
    path, name = folder / "b.safetensors", "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tensors = load_file(path)
    if damage == "scale":
        del tensors[name]
    if damage == "shape":
        tensors[name] = tensors[name][:1]
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    if damage == "config":
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=message):
        fp8.dequantize_folder(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_memory_holds_one_tensor_in_both_forms_however_large_the_folder(tmp_path):
    source, count, shape = tmp_path / "large", 12, (512, 1024)
    source.mkdir()
    one = np.ones(shape, ml_dtypes.float8_e4m3fn)
    outlines = {}
    for number in range(count):
        outlines[f"model.layers.{number}.x.weight"] = (fp8.FLOAT8, shape)
        outlines[f"model.layers.{number}.x.weight_scale_inv"] = (np.dtype("float32"), fp8.scale_shape(shape))
    fp8._write(
        source / "model.safetensors",
        outlines,
        lambda name: one if name.endswith("weight") else np.ones(fp8.scale_shape(shape), np.float32),
    )
    (source / "config.json").write_text(json.dumps({"quantization_config": fp8.QUANTIZATION}))
    tracemalloc.start()
    assert fp8.dequantize_folder(source, tmp_path / "plain") == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # float8, its scales and itself in float32 (twice, the product), bfloat16: 1 + 3 x 4 + 2 bytes a weight.
    assert peak < 16 * one.size < count * one.size * 2, f"{peak / one.size:.1f} bytes a weight of one tensor"
