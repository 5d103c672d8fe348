"""Folders of weights that are meant to harm, or damaged in one place: each is refused in a short message, in bounded
time and memory, and nothing of them is run.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindvl_jax.core.errors import UserError
from mindvl_jax.weights import open_model
from mindvl_jax.weights.assemble import assemble
from mindvl_jax.weights.folder import INDEX
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.merge import merge_folder
from mindvl_jax.weights.nf4 import STATE, dequantize_folder

WEIGHTS = "model.safetensors"


def refused(act) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        act()
    assert time.monotonic() - start < 20 and len(str(error.value)) < 20_000
    return str(error.value)


@pytest.fixture
def folder(speaking, tmp_path):
    return shutil.copytree(speaking("qwen2.5-vl"), tmp_path / "model")


@pytest.fixture
def sharded(published, tmp_path):
    return shutil.copytree(published("qwen2.5-vl", False, "float32", True), tmp_path / "sharded")


# --- values ----------------------------------------------------------------------------------------------------------


def poison(folder, value=np.nan, *, names=None, every=True, dtype=None):
    tensors = load_file(folder / WEIGHTS)
    for name in names or tensors:
        changed = np.array(tensors[name])
        changed.reshape(-1)[slice(None) if every else slice(1)] = value
        tensors[name] = changed
    if dtype is not None:
        tensors = {name: np.asarray(tensor).astype(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


VALUES = {
    "all NaN": {},
    "one NaN in one tensor": dict(names=["model.norm.weight"], every=False),
    "infinity": dict(value=np.inf),
    "minus infinity in the vision tower": dict(value=-np.inf, names=["visual.patch_embed.proj.weight"], every=False),
    "NaN in bfloat16": dict(dtype=jnp.bfloat16),
    "NaN in float16": dict(dtype=np.float16),
    "NaN in float64": dict(dtype=np.float64),
    "a number too large for float16": dict(value=1e30, dtype=np.float16, every=False),
}


@pytest.mark.parametrize("name", VALUES)
def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(folder, name):
    poison(folder, **VALUES[name])
    assert "NaN or infinite" in refused(lambda: open_model(folder))
    assert "NaN or infinite" in refused(lambda: load_parameters(folder))


def test_a_model_is_not_joined_from_a_tower_that_is_not_finite(folder, speaking):
    poison(folder, names=["visual.patch_embed.proj.weight"])
    assert "NaN or infinite" in refused(lambda: assemble(folder, speaking("qwen3")))


# --- headers ---------------------------------------------------------------------------------------------------------


def header(content, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a length without end": header({}, length=2**63),
    "a length past the file": header({}, length=1000),
    "a length of nothing": header(b""),
    "no JSON": header(b"{{{{"),
    "a list": header([]),
    "a number": header(b"5"),
    "null": header(b"null"),
    "no UTF-8": header(b'{"\xff": 1}'),
    "deep brackets": header(b"[" * 100_000),
    "no tensors": header({}, b""),
    "metadata alone": header({"__metadata__": {"a": "b"}}, b""),
    "metadata of numbers": header({"__metadata__": {"a": 1}}, b""),
    "an end past the file": header({"a": tensor([64], 0, 256)}),
    "an end before the start": header({"a": tensor([16], 64, 0)}),
    "a negative start": header({"a": tensor([16], -64, 0)}),
    "overlapping": header({"a": tensor([16], 0, 64), "b": tensor([16], 0, 64)}),
    "a hole": header({"a": tensor([8], 0, 32), "b": tensor([4], 48, 64)}),
    "a shape of another size": header({"a": tensor([1000], 0, 64)}),
    "a negative shape": header({"a": tensor([-16], 0, 64)}),
    "a shape that overflows": header({"a": tensor([2**62, 2**62], 0, 64)}),
    "an unknown dtype": header({"a": tensor([16], 0, 64, "F7")}),
    "integers": header({"a": tensor([16], 0, 64, "I32")}),
    "float8": header({"a": tensor([64], 0, 64, "F8_E4M3")}),
    "booleans": header({"a": tensor([64], 0, 64, "BOOL")}),
    "offsets of text": header({"a": {"dtype": "F32", "shape": [16], "data_offsets": ["0", "64"]}}),
    "no offsets": header({"a": {"dtype": "F32", "shape": [16]}}),
    "a name twice": header(
        b'{"a": {"dtype":"F32","shape":[8],"data_offsets":[0,32]}, '
        b'"a": {"dtype":"F32","shape":[8],"data_offsets":[32,64]}}'
    ),
    "trailing bytes": header({"a": tensor([8], 0, 32)}),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "a pickle": b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",
    "an HTML page": b"<!DOCTYPE html><html>404</html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "a long name": header({"n" * 2_000_000: tensor([16], 0, 64)}),
    "a name that steers terminals": header({"\x1b[2J\x07": tensor([16], 0, 64)}),
    "many names": header({f"t{i}": tensor([0], 0, 0) for i in range(20_000)}, b""),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_file_with_a_hostile_header_is_refused(folder, name):
    (folder / WEIGHTS).write_bytes(HEADERS[name])
    refused(lambda: open_model(folder))


# --- folders ---------------------------------------------------------------------------------------------------------


def index(folder, change):
    content = json.loads((folder / INDEX).read_text())
    result = change(content)
    (folder / INDEX).write_text(
        result if isinstance(result, str) else json.dumps(content if result is None else result)
    )


def replace(name):
    return lambda content: content["weight_map"].update({"lm_head.weight": name})


INDEXES = {
    "climbs": replace("../x.safetensors"),
    "absolute": replace("/etc/x.safetensors"),
    "climbs inside": replace("a/../../x.safetensors"),
    "names a pickle": replace("x.bin"),
    "names a folder": replace("."),
    "an empty name": replace(""),
    "a null byte": replace("a\0.safetensors"),
    "a name too long": replace("x" * 5000 + ".safetensors"),
    "a number": replace(5),
    "null": replace(None),
    "a Windows path": replace("..\\x.safetensors"),
    "a URL": replace("http://x/y.safetensors"),
    "no map": lambda content: {},
    "an empty map": lambda content: {"weight_map": {}},
    "a map of lists": lambda content: {"weight_map": []},
    "a list": lambda content: [],
    "no JSON": lambda content: "{",
    "deep": lambda content: "[" * 100_000,
    "long numbers": lambda content: "9" * 5000,
    "tensors that no file has": lambda content: content["weight_map"].update(
        {"model.extra.weight": next(iter(content["weight_map"].values()))}
    ),
    "forgets a tensor": lambda content: content["weight_map"].pop("lm_head.weight") and None,
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_hostile_index_is_refused(sharded, name):
    index(sharded, INDEXES[name])
    refused(lambda: open_model(sharded))


def test_a_tensor_in_two_files_or_under_two_spellings_is_refused(folder, sharded):
    files = sorted(sharded.glob("model-*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, files[1], metadata={"format": "pt"})
    assert name in refused(lambda: open_model(sharded))
    tensors = load_file(folder / WEIGHTS)
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert "twice" in refused(lambda: open_model(folder))


def link(target):
    def make(path):
        path.unlink()
        path.symlink_to(target)

    return make


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def directory(path):
    path.unlink()
    path.mkdir()


KINDS = {
    "a pipe": fifo,
    "a folder": directory,
    "a link to nothing": link("nowhere"),
    "a link to itself": link(WEIGHTS),
    "a device without end": link("/dev/zero"),
    "a link to a password file": link("/etc/passwd"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file",
    [
        WEIGHTS,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ],
)
def test_a_file_of_another_kind_never_hangs(folder, file, kind):
    path = folder / file
    path.exists() or path.write_text("{}")
    KINDS[kind](path)
    start = time.monotonic()
    try:  # side files that are no files count as absent
        open_model(folder)
    except UserError as error:
        assert len(str(error)) < 20_000 and "root:" not in str(error)
    else:
        assert file not in (WEIGHTS, "config.json")
        assert kind != "a link to a password file" or file == "chat_template.jinja"  # any text is a template
    assert time.monotonic() - start < 20


def test_the_files_of_a_download_cache_are_links_and_are_read(folder, tmp_path):
    shutil.move(folder / WEIGHTS, tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    open_model(folder)


SIDE = {
    "auto_map of remote code": ("config.json", lambda c: c.update(auto_map={"AutoModel": "evil--modeling.Evil"})),
    "layers without end": ("config.json", lambda c: c["text_config"].update(num_hidden_layers=10**9)),
    "a vocabulary without end": ("config.json", lambda c: c["text_config"].update(vocab_size=2**60)),
    "a negative width": ("config.json", lambda c: c["text_config"].update(hidden_size=-32)),
    "a width of NaN": ("config.json", lambda c: c["text_config"].update(hidden_size=float("nan"))),
    "an infinite theta": (
        "config.json",
        lambda c: c["text_config"].update(rope_parameters={"rope_theta": float("inf"), "mrope_section": [1, 1, 2]}),
    ),
    "a width of text": ("config.json", lambda c: c["text_config"].update(hidden_size="32")),
    "booleans as sizes": ("config.json", lambda c: c["text_config"].update(num_hidden_layers=True)),
    "patches of nothing": ("config.json", lambda c: c["vision_config"].update(patch_size=0)),
    "a media token beyond the table": ("config.json", lambda c: c.update(image_token_id=10**6)),
    "a negative media token": ("config.json", lambda c: c.update(image_token_id=-1)),
    "other media tokens than the tokenizer's": ("config.json", lambda c: c.update(image_token_id=3)),
    "heads of nothing": ("config.json", lambda c: c["text_config"].update(num_attention_heads=0)),
    "an unknown activation": ("config.json", lambda c: c["text_config"].update(hidden_act="exec('1')")),
    "a quantised model": ("config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
    "a tokenizer with ids beyond the table": ("tokenizer.json", lambda c: c["added_tokens"][-1].update(id=10**6)),
    "a tokenizer without a vocabulary": ("tokenizer.json", lambda c: c["model"].update(vocab={})),
    "a tokenizer of another kind": ("tokenizer.json", lambda c: c["model"].update(type="Exec")),
    "a tokenizer without a model": ("tokenizer.json", lambda c: c.pop("model")),
    "a normalizer without end": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}),
    ),
}
HARMLESS = ("auto_map of remote code", "a normalizer without end", "other media tokens than the tokenizer's")


@pytest.mark.parametrize("name", SIDE)
def test_a_side_file_that_asks_for_the_impossible_is_refused_and_no_code_is_run(folder, name):
    file, change = SIDE[name]
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    (folder / "modeling.py").write_text("raise SystemExit('code of the folder was run')\n")
    if name in HARMLESS:
        open_model(folder)  # nothing but our own code computes; media tokens are compared where a prompt is encoded
    else:
        refused(lambda: open_model(folder))


# --- adapters and four-bit folders -----------------------------------------------------------------------------------


def adapter_of(folder, base, config, tensors) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


PEFT = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "../../etc",
}
KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def lora(value=0.1, rank=2):
    return {
        KEY.format(layer, part): np.full((rank, 32) if part == "A" else (32, rank), value, np.float32)
        for layer in range(2)
        for part in "AB"
    }


ADAPTERS = {
    "NaN": (PEFT, lora(np.nan)),
    "infinite": (PEFT, lora(np.inf)),
    "another rank": (PEFT, lora(rank=3)),
    "a rank without end": ({**PEFT, "r": 10**12}, lora()),
    "a rank of text": ({**PEFT, "r": "2"}, lora()),
    "alpha of NaN": ({**PEFT, "lora_alpha": float("nan")}, lora()),
    "alpha of text": ({**PEFT, "lora_alpha": "x"}, lora()),
    "no JSON": ("{", lora()),
    "a list": ("[]", lora()),
    "another kind": ({**PEFT, "peft_type": "EXEC"}, lora()),
    "no tensors": (PEFT, {"x": np.zeros(1, np.float32)}),
    "one layer of two": (PEFT, dict(list(lora().items())[:2])),
    "patterns that never end": ({**PEFT, "rank_pattern": {"(a+)+$": 3}, "alpha_pattern": 5}, lora()),
    "a base that climbs": ({**PEFT, "modules_to_save": ["../x"]}, lora()),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_refused_before_anything_is_written(folder, tmp_path, name):
    config, tensors = ADAPTERS[name]
    adapter_of(tmp_path / "adapter", folder, config, tensors)
    refused(lambda: merge_folder(folder, tmp_path / "adapter", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_adapters_test_has_a_sound_one(folder, tmp_path):
    adapter_of(tmp_path / "adapter", folder, PEFT, lora())
    assert merge_folder(folder, tmp_path / "adapter", tmp_path / "out") == 2
    poison(folder, names=["model.layers.0.self_attn.q_proj.weight"])
    assert "NaN or infinite" in refused(lambda: merge_folder(folder, tmp_path / "adapter", tmp_path / "again"))


SOUND_STATE = {"quant_type": "nf4", "blocksize": 64, "shape": [8, 8], "dtype": "float32"}
STATES = {
    "a list": b"[]",
    "no JSON": b"{",
    "another kind": {**SOUND_STATE, "quant_type": "fp4"},
    "no shape": {"quant_type": "nf4", "blocksize": 64, "dtype": "float32"},
    "blocks of nothing": {**SOUND_STATE, "blocksize": 0},
    "blocks without end": {**SOUND_STATE, "nested_blocksize": 10**15, "nested_offset": 0.0},
    "another shape": {**SOUND_STATE, "shape": [80, 80]},
    "a shape without end": {**SOUND_STATE, "shape": [2**40, 2**40]},
    "a negative shape": {**SOUND_STATE, "shape": [-8, -8]},
    "a shape of text": {**SOUND_STATE, "shape": "88"},
    "deep": b"[" * 50_000,
}


@pytest.mark.parametrize("name", STATES)
def test_a_hostile_four_bit_state_is_refused(tmp_path, name):
    state = STATES[name]
    text = np.frombuffer(state if isinstance(state, bytes) else json.dumps(state).encode(), np.uint8)
    (tmp_path / "in").mkdir()
    save_file(
        {
            "w": np.zeros((32, 1), np.uint8),
            "w.absmax": np.ones(1, np.float32),
            "w.quant_map": np.zeros(16, np.float32),
            f"w{STATE}": text,
            **(
                {"w.nested_absmax": np.ones(1, np.float32), "w.nested_quant_map": np.ones(256, np.float32)}
                if "nested" in str(state)
                else {}
            ),
        },
        tmp_path / "in" / WEIGHTS,
    )
    refused(lambda: dequantize_folder(tmp_path / "in", tmp_path / "out"))
