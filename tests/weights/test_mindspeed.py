"""MindSpeed-MM's weight folders: every layout out and back in equal bytes, against a packing written out by hand, and
hostile files.
"""

import argparse
import itertools
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mindvl_jax.cli.main import main
from mindvl_jax.core.errors import UserError
from mindvl_jax.weights.mindspeed import torch_zip
from mindvl_jax.weights.mindspeed.convert import (
    FILE,
    TRACKER,
    HuggingFace,
    Megatron,
    iteration_folder,
    sizes_of,
    write_huggingface,
    write_megatron,
)
from mindvl_jax.weights.mindspeed.layout import VIT_HEADS, VIT_ROWS, MegatronLayout, even_layout

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(tied) -> a Qwen2.5-VL of 12 + 4 layers in bfloat16, in several files, written by transformers."""
    made = {}

    def build(tied=False):
        if tied not in made:
            torch.manual_seed(1)
            text = dict(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=16,
                num_hidden_layers=12,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=64,
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
                tie_word_embeddings=tied,
            )
            vision = dict(
                depth=4,
                hidden_size=16,
                intermediate_size=24,
                num_heads=4,
                out_hidden_size=64,
                window_size=56,
                fullatt_block_indexes=[1],
            )
            config = transformers.Qwen2_5_VLConfig(
                text_config=text,
                vision_config=vision,
                tie_word_embeddings=tied,
                image_token_id=60,
                video_token_id=61,
                vision_start_token_id=62,
                vision_end_token_id=63,
            )
            model = transformers.Qwen2_5_VLForConditionalGeneration(config).bfloat16()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter)
            made[tied] = tmp_path_factory.mktemp("published")
            model.save_pretrained(made[tied], max_shard_size="60KB")
        return made[tied]

    return build


def export(base, out, layout):
    with HuggingFace(base) as source:
        sizes = sizes_of(base)
        source.check(sizes)
        write_megatron(out, source, sizes, layout)
    return sizes


GRID = [
    (tp, pp, vpp, canonical)
    for tp, pp, vpp, canonical in itertools.product((1, 2, 4), (1, 2, 4), (1, 3), (False, True))
    if pp > 1 or vpp == 1
]


@pytest.mark.parametrize(("tp", "pp", "vpp", "canonical"), GRID)
def test_a_folder_comes_back_from_every_layout_in_equal_bytes(folders, tmp_path, tp, pp, vpp, canonical):
    base = folders(tied=pp == 2)
    sizes = sizes_of(base)
    layout = even_layout(tp, pp, vpp, sizes.depth, canonical=canonical)
    export(base, tmp_path / "mm", layout)
    source = Megatron(tmp_path / "mm", sizes, vit_qkv=VIT_ROWS if canonical else None)
    assert source.layout == layout
    write_huggingface(tmp_path / "hf", source, sizes.shapes, base)
    for path in sorted(base.iterdir()):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


def test_their_published_virtual_stages_and_a_resplit_without_hugging_face(folders, tmp_path):
    """The tower over four stages of the first virtual stage, the language model behind it, as in their example; then
    another layout.
    """
    base = folders()
    first = MegatronLayout(2, ((1, 1, 1, 1), (0, 0, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 1), (2, 2, 1, 1), (2, 1, 1, 1)))
    sizes = export(base, tmp_path / "one", first)
    second = MegatronLayout(4, ((4, 0),), ((5, 7),), canonical=True, vit_qkv=VIT_HEADS)
    write_megatron(tmp_path / "two", Megatron(tmp_path / "one", sizes), sizes, second)
    write_huggingface(tmp_path / "hf", Megatron(tmp_path / "two", sizes, vit_qkv=VIT_HEADS), sizes.shapes, base)
    for path in base.glob("*.safetensors"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name


def test_torch_reads_what_we_write_and_the_packing_is_theirs(folders, tmp_path):
    """Spelled out for TP 2: query heads beside their key/value head, gate and up of a rank together, columns of the
    output products.
    """
    base = folders()
    export(base, tmp_path / "mm", even_layout(2, 2, 1, {"vision": 4, "text": 12}))
    assert (tmp_path / "mm" / TRACKER).read_text() == "release"
    hf = {}
    for path in base.glob("*.safetensors"):
        hf |= {
            name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
            for name, value in load_file(path).items()
        }
    rank = {
        (t, p): torch.load(tmp_path / f"mm/release/mp_rank_{t:02d}_{p:03d}/{FILE}", weights_only=True, mmap=True)
        for t in range(2)
        for p in range(2)
    }
    assert rank[0, 0]["checkpoint_version"] == 3.0
    q, k, v = (hf[f"model.layers.7.self_attn.{name}_proj.weight"] for name in "qkv")
    expected = torch.cat(
        [
            part
            for group in (2, 3)
            for part in (q[group * 16 : group * 16 + 16], k[group * 8 : group * 8 + 8], v[group * 8 : group * 8 + 8])
        ]
    )
    found = rank[1, 1]["model"]["text_decoder.decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(found, expected)
    gate, up = (hf[f"model.layers.7.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(
        rank[1, 1]["model"]["text_decoder.decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate[8:], up[8:]])
    )
    assert torch.equal(
        rank[1, 1]["model"]["text_decoder.decoder.layers.1.mlp.linear_fc2.weight"],
        hf["model.layers.7.mlp.down_proj.weight"][:, 8:],
    )
    qkv = hf["visual.blocks.3.attn.qkv.bias"]
    assert torch.equal(
        rank[1, 0]["model"]["image_encoder.encoder.blocks.layers.3.self_attention.linear_qkv.bias"],
        torch.cat([qkv[part * 16 + head * 4 : part * 16 + head * 4 + 4] for head in (2, 3) for part in range(3)]),
    )
    assert (
        "text_decoder.output_layer.weight" in rank[0, 1]["model"]
        and "text_decoder.output_layer.weight" not in rank[0, 0]["model"]
    )


def test_a_checkpoint_of_their_training_is_read_with_its_arguments_and_extra_states(folders, tmp_path):
    """`iter_0000123` as torch.save writes it: a Namespace, an enum of a foreign class, optimizer and random states,
    empty extra states.
    """
    base = folders()
    sizes = export(base, tmp_path / "mm", even_layout(1, 1, 1, {"vision": 4, "text": 12}))
    model = torch.load(tmp_path / f"mm/release/mp_rank_00/{FILE}", weights_only=True)["model"]
    model["text_decoder.decoder.layers.0.self_attention.core_attention._extra_state"] = None
    place = tmp_path / "trained/iter_0000123/mp_rank_00"
    place.mkdir(parents=True)
    (tmp_path / "trained" / TRACKER).write_text("123")
    torch.save(
        {
            "model": model,
            "args": argparse.Namespace(kind=argparse.HelpFormatter, lr=1e-5),
            "iteration": 123,
            "rng_state": [{"np": np.random.get_state()}],
            "optimizer": {"state": {0: torch.zeros(3)}},
        },
        place / FILE,
    )
    write_huggingface(tmp_path / "hf", Megatron(tmp_path / "trained", sizes), sizes.shapes, base)
    for path in base.glob("*.safetensors"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(UserError, match="no iter_0000007/mp_rank_.*there are iter_0000123"):
        iteration_folder(tmp_path / "trained", 7)


def test_missing_and_strange_tensors_and_layouts_are_listed(folders, tmp_path):
    base = folders()
    sizes = export(base, tmp_path / "mm", even_layout(2, 1, 1, {"vision": 4, "text": 12}))
    path = tmp_path / f"mm/release/mp_rank_01/{FILE}"
    content = torch.load(path, weights_only=True)
    kept = content["model"].pop("text_decoder.decoder.layers.3.mlp.linear_fc2.weight")
    content["model"]["text_decoder.decoder.layers.3.mlp.fc9"] = kept
    torch.save(content, path)
    with pytest.raises(
        UserError,
        match=r"(?s)2 problems.*missing    text_decoder.decoder.layers.3.mlp.linear_fc2.weight in chunk 0 of "
        r"tensor rank 1.*unexpected .*fc9",
    ):
        Megatron(tmp_path / "mm", sizes)
    content["model"]["text_decoder.decoder.layers.3.mlp.linear_fc2.weight"] = content["model"].pop(
        "text_decoder.decoder.layers.3.mlp.fc9"
    )
    content["model"]["text_decoder.decoder.final_layernorm.weight"] += 1
    torch.save(content, path)
    with pytest.raises(UserError, match="final_layernorm.weight in chunk 0 is not split, yet differs"):
        Megatron(tmp_path / "mm", sizes)
    with pytest.raises(UserError, match=r"tensor parallelism 3 does not divide the key/value heads \(4\)"):
        export(base, tmp_path / "no", even_layout(3, 1, 1, sizes.depth))
    with pytest.raises(UserError, match="holds 11 layers, the model has 12"):
        export(base, tmp_path / "no", MegatronLayout(1, ((4, 0),), ((5, 6),)))
    export(base, tmp_path / "canonical", even_layout(2, 1, 1, sizes.depth, canonical=True))
    with pytest.raises(UserError, match="--vit-qkv rows or --vit-qkv heads"):
        Megatron(tmp_path / "canonical", sizes)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch EVIL",)


def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "args": Evil()}, tmp_path / "evil.pt")
    content = torch_zip.read(tmp_path / "evil.pt")
    assert isinstance(content["args"], torch_zip.Inert)
    assert np.array_equal(content["model"]["w"].array(), np.ones(2))
    assert not (tmp_path / "EVIL").exists()
    (tmp_path / "old.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="not a zip file"):
        torch_zip.read(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "evil.pt") as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info)[: 4 if info.filename.endswith("data/0") else None])
    with pytest.raises(UserError, match="reaches past its storage"):
        torch_zip.read(tmp_path / "short.pt")


def test_the_command_finds_the_layout_and_writes_it_anew(folders, tmp_path, capsys):
    base = folders()
    to_theirs = [
        "convert",
        "mindspeed",
        "--from",
        str(base),
        "--to",
        str(tmp_path / "mm"),
        "--tp",
        "2",
        "--llm-pp-layers",
        "[[5,7]]",
        "--vit-pp-layers",
        "[[4,0]]",
    ]
    assert main(to_theirs) == 0
    assert (
        main(
            ["convert", "mindspeed", "--from", str(tmp_path / "mm"), "--to", str(tmp_path / "hf"), "--like", str(base)]
        )
        == 0
    )
    assert "tp 2, pp 2, vpp 1, fused, llm_pp_layers [[5, 7]], vit_pp_layers [[4, 0]]" in capsys.readouterr().out
    assert all((tmp_path / "hf" / path.name).read_bytes() == path.read_bytes() for path in base.iterdir())
    assert main(["convert", "mindspeed", "--from", str(tmp_path / "mm"), "--to", str(tmp_path / "other")]) == 2
    assert "how many heads" in capsys.readouterr().err
