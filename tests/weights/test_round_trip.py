"""Published folder -> our parameters on a mesh -> published folder, bit for bit."""

import jax
import numpy as np
import pytest
import transformers
from safetensors import safe_open

from mindvl_jax.config.schema import MeshConfig
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.weights import load_parameters, save_parameters
from mindvl_jax.weights.mapping import read_config


def tensors(folder):
    """name -> (dtype, shape, bytes), and the metadata of the files."""
    found, metadata = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            metadata.append(file.metadata())
            for name in file.keys():  # noqa: SIM118  safe_open yields no iterator
                found[name] = (
                    file.get_slice(name).get_dtype(),
                    tuple(file.get_slice(name).get_shape()),
                    file.get_tensor(name).tobytes(),
                )
    return found, metadata


@pytest.mark.parametrize(
    "family, tied, dtype, sharded",
    [
        ("qwen2.5-vl", False, "bfloat16", True),
        ("qwen2.5-vl", True, "float32", False),
        ("qwen3", True, "float16", False),
        ("qwen3", False, "bfloat16", True),
        ("qwen2.5", False, "float32", True),
    ],
)
def test_a_folder_comes_back_bitwise_after_eight_devices(published, tmp_path, family, tied, dtype, sharded):
    folder = published(family, tied, dtype, sharded)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    config = read_config(folder)
    parameters = load_parameters(folder, mesh=mesh)
    assert {len(value.sharding.device_set) for value in parameters.values()} == {8}
    assert any(not value.sharding.is_fully_replicated for value in parameters.values())
    save_parameters(tmp_path, config, parameters, shard_bytes=20_000 if sharded else 10**9)
    before, metadata = tensors(folder)
    after, metadata_after = tensors(tmp_path)
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"not bitwise equal: {changed}"
    assert metadata[0] == metadata_after[0] and (len(metadata) > 1) == (len(metadata_after) > 1) == sharded
    assert read_config(tmp_path) == config


def test_each_device_holds_only_its_share(published):
    parameters = load_parameters(
        published("qwen2.5-vl", False, "bfloat16", True), mesh=make_mesh(MeshConfig(fsdp=2, tensor=4))
    )
    kernel = parameters["language/layers/mlp/gate/kernel"]
    assert kernel.shape == (2, 32, 48) and {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 12)}


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3", "qwen2.5"])
def test_what_we_write_is_what_transformers_reads(published, tmp_path, family):
    folder = published(family)
    save_parameters(tmp_path, read_config(folder), load_parameters(folder))
    kind = {
        "qwen2.5-vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "qwen3": transformers.Qwen3ForCausalLM,
        "qwen2.5": transformers.Qwen2ForCausalLM,
    }[family]
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    original = kind.from_pretrained(folder)
    for (name, one), (_, other) in zip(theirs.named_parameters(), original.named_parameters(), strict=True):
        assert (one == other).all(), name
    for key in ("rope_parameters", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(theirs.config.get_text_config(), key) == getattr(original.config.get_text_config(), key)


def test_each_matrix_is_the_published_one_turned(published):
    folder = published("qwen2.5-vl")
    ours = load_parameters(folder)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        np.testing.assert_array_equal(
            ours["language/layers/mlp/gate/kernel"][1], file.get_tensor("model.layers.1.mlp.gate_proj.weight").T
        )
        fused = file.get_tensor("visual.blocks.1.attn.qkv.weight")
        np.testing.assert_array_equal(ours["vision/blocks/attention/value/kernel"][1], fused[32:].T)
        np.testing.assert_array_equal(
            ours["vision/patch_embed/kernel"], file.get_tensor("visual.patch_embed.proj.weight").reshape(16, -1).T
        )


def test_a_dtype_that_is_asked_for_is_rounded_once(published):
    folder = published("qwen3")
    exact, rounded = load_parameters(folder), load_parameters(folder, dtype="bfloat16")
    for path, value in exact.items():
        np.testing.assert_array_equal(np.asarray(rounded[path]), np.asarray(value.astype("bfloat16")), err_msg=path)


def test_only_the_asked_parts_are_read(published):
    parameters = load_parameters(published("qwen2.5-vl"), parts=("vision/",))
    assert parameters and all(path.startswith("vision/") for path in parameters)
    assert all(isinstance(value, jax.Array) for value in parameters.values())
