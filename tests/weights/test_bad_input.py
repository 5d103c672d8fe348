"""Damaged, hostile and contradicting folders are refused with a message that names what was found, all problems at
once.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindvl_jax.weights import WeightsError, load_parameters, open_model
from mindvl_jax.weights.folder import INDEX


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published("qwen2.5-vl", False, "float32", True), tmp_path / "model")


@pytest.fixture
def single(published, tmp_path):
    return shutil.copytree(published("qwen2.5-vl"), tmp_path / "single")


def refusal(folder):
    with pytest.raises(WeightsError) as caught:
        open_model(folder)
    return str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(content))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_truncated_file_is_named(folder):
    path = sorted(folder.glob("model-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in (message := refusal(folder)) and "not a whole safetensors file" in message


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"PK\x03\x04 not safetensors at all",
        (2**40).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"{{{{",
    ],
)
def test_a_wrong_header_is_refused(single, head):
    (single / "model.safetensors").write_bytes(head)
    assert "not a whole safetensors file" in refusal(single)


def test_every_missing_shard_is_listed_at_once(folder):
    removed = sorted(folder.glob("model-*.safetensors"))[:2]
    for path in removed:
        path.unlink()
    message = refusal(folder)
    assert all(path.name in message for path in removed) and "missing; the index places" in message


def test_an_index_that_names_an_absent_file_is_refused(folder):
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = "model-00099-of-00099.safetensors"
    (folder / INDEX).write_text(json.dumps(content))
    assert "model-00099-of-00099.safetensors: missing" in refusal(folder)


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "/etc/outside.safetensors", "inner/../../outside.safetensors"]
)
def test_an_index_that_climbs_out_of_the_folder_is_refused(folder, path):
    save_file({"lm_head.weight": np.zeros((96, 32), np.float32)}, folder.parent / "outside.safetensors")
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = path
    (folder / INDEX).write_text(json.dumps(content))
    assert "lies outside the folder" in refusal(folder)


def test_an_index_that_points_at_the_wrong_file_is_refused(folder):
    content = json.loads((folder / INDEX).read_text())
    places = content["weight_map"]
    name, right = next((name, file) for name, file in places.items() if list(places.values()).count(file) > 1)
    wrong = next(file for file in places.values() if file != right)
    places[name] = wrong
    (folder / INDEX).write_text(json.dumps(content))
    assert f"places {name} in {wrong}, but it is in {right}" in refusal(folder)


def test_missing_misshapen_and_extra_tensors_come_in_one_error(single):
    def change(tensors):
        tensors["visual.merger.mlp.7.weight"] = np.zeros((3, 3), np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["visual.blocks.0.attn.qkv.bias"]

    edit_weights(single, change)
    message = refusal(single)
    assert "4 tensors" in message
    for part in (
        "missing     model.layers.1.mlp.up_proj.weight: expected shape [48, 32]",
        "missing     visual.blocks.0.attn.qkv.bias",
        "misshapen   model.norm.weight: shape [31]",
        "unexpected  visual.merger.mlp.7.weight",
    ):
        assert part in message


def test_integer_weights_are_refused_by_dtype(single):
    edit_weights(single, lambda tensors: tensors.update({"model.norm.weight": np.zeros(32, np.int8)}))
    assert "model.norm.weight has dtype I8" in refusal(single)


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(text_config__num_hidden_layers=3), "missing     model.layers.2."),
        (dict(text_config__num_hidden_layers=1), "unexpected  model.layers.1."),
        (
            dict(text_config__vocab_size=97),
            "misshapen   model.embed_tokens.weight: shape [96, 32] in model.safetensors, but config.json "
            "asks for [97, 32]",
        ),
        (dict(vision_config__out_hidden_size=64), "out_hidden_size is 64"),
        (dict(text_config__hidden_act="gelu"), "text_config.hidden_act is 'gelu'"),
        (
            dict(text_config__rope_parameters=dict(rope_type="yarn", factor=4.0, mrope_section=[1, 1, 2])),
            "rope type is 'yarn'",
        ),
        (
            dict(text_config__rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 1])),
            "must sum to head_dim / 2",
        ),
        (dict(text_config__use_sliding_window=True), "use_sliding_window is True"),
        (dict(text_config__num_key_value_heads=3), "must be a multiple of num_kv_heads"),
        (dict(text_config__hidden_size=None), "hidden_size"),
        (dict(tie_word_embeddings=True), "ties the word embeddings, but lm_head.weight differs"),
    ],
)
def test_a_config_that_contradicts_the_weights_or_asks_for_what_is_not_built_is_refused(single, changes, part):
    edit_config(single, **changes)
    assert part in refusal(single)


def test_several_config_problems_come_in_one_error(single):
    edit_config(single, text_config__hidden_act="gelu", vision_config__hidden_act="relu", vision_config__depth=0)
    message = refusal(single)
    assert (
        "3 problems" in message
        and "text_config.hidden_act" in message
        and "vision_config.hidden_act" in message
        and "vision_config.depth" in message
    )


def test_an_unknown_model_type_is_answered_with_the_supported_ones(single):
    edit_config(single, model_type="mamba")
    message = refusal(single)
    assert (
        "'mamba', which is not supported" in message
        and "qwen2_5_vl" in message
        and "qwen3" in message
        and "mindvl" in message
    )


def test_pickles_are_refused_and_never_opened(single):
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    message = refusal(single)
    assert "pickle can run any code" in message and "pytorch_model.bin" in message


def test_an_index_that_names_a_pickle_is_refused(folder):
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = "pytorch_model.bin"
    (folder / INDEX).write_text(json.dumps(content))
    assert "not a safetensors file; refused" in refusal(folder)


def test_folders_without_model_or_config_say_what_was_expected(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    assert "is not JSON" in refusal(tmp_path)


def test_a_config_without_weights_says_so(single):
    (single / "model.safetensors").unlink()
    assert "no weights; expected model.safetensors" in refusal(single)


def test_a_tied_folder_may_repeat_the_table_as_head(published, tmp_path):
    folder = shutil.copytree(published("qwen2.5-vl", True), tmp_path / "tied")
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "language/head/kernel" not in load_parameters(folder)


def test_names_of_newer_and_older_releases_are_understood(published, tmp_path):
    folder = shutil.copytree(published("qwen2.5-vl"), tmp_path / "renamed")
    expected = load_parameters(folder)

    def rename(tensors):
        for name in list(tensors):
            new = {"model.": "model.language_model.", "visual.": "model.visual."}
            prefix = next((p for p in new if name.startswith(p)), None)
            if prefix:
                tensors[new[prefix] + name.removeprefix(prefix)] = tensors.pop(name)
        tensors["model.language_model.rotary_emb.inv_freq"] = np.zeros(4, np.float32)

    edit_weights(folder, rename)
    found = load_parameters(folder)
    assert expected.keys() == found.keys()
    assert all((expected[path] == found[path]).all() for path in expected)
