"""Exported folders: transformers loads all of them but MindVL's own pairing, which loads back here."""

import json

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

from mindvl_jax.cli.main import main
from mindvl_jax.data.text.tokenizer import Tokenizer
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.weights import load_parameters, open_model
from mindvl_jax.weights.companions import write_companions


def test_an_exported_folder_is_whole_for_transformers(speaking, tmp_path, capsys):
    assert (
        main(["export", "--run", str(speaking("qwen2.5-vl")), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
        == 0
    )
    assert "qwen2_5_vl" in capsys.readouterr().out
    out = tmp_path / "out"
    model = transformers.AutoModelForImageTextToText.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = open_model(out).tokenizer
    assert tokenizer("the cat").input_ids == ours.encode("the cat")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ours.eos_id, ours.pad_id)
    assert model.generation_config.eos_token_id == [ours.eos_id, ours.pad_id]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    values = transformers.AutoImageProcessor.from_pretrained(out)(picture, return_tensors="np")
    assert values["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_the_chat_template_writes_what_training_saw(speaking, tmp_path):
    main(["export", "--run", str(speaking("qwen2.5-vl")), "--out", str(tmp_path / "out")])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the"}]},
        {"role": "assistant", "content": "a"},
    ]
    written = tokenizer.apply_chat_template(turns, tokenize=False)
    assert (
        written == "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>the<|im_end|>\n"
        "<|im_start|>assistant\na<|im_end|>\n"
    )
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_compact_vocabulary_keeps_its_ids_in_transformers(tokenizer_file, speaking, tmp_path):
    full = Tokenizer(tokenizer_file)
    table = sorted({*full.encode("the cat sat"), *full.special.values()}, reverse=True)
    compact = Tokenizer(tokenizer_file, id_table=table)
    config = open_model(speaking("qwen3")).config
    write_companions(
        tmp_path,
        config.model_copy(update=dict(text=config.text.model_copy(update=dict(vocab_size=len(table))))),
        compact,
        1,
        1,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>the cat sat<|im_end|>"
    assert theirs(text).input_ids == compact.encode(text, allow_special=True)
    assert theirs.decode(theirs(text).input_ids) == text
    assert min(theirs("dog").input_ids) >= len(table), "a token that the model lacks must not get one of its ids"
    again = Tokenizer(tmp_path / "tokenizer.json", id_table=json.loads((tmp_path / "mindvl_id_table.json").read_text()))
    assert again.encode("the cat") == compact.encode("the cat") and again.vocab_size == len(table)


@pytest.mark.parametrize("positions", ["mrope", "1d"])
def test_a_tower_and_a_decoder_become_a_mindvl_that_loads_back(speaking, tmp_path, positions, capsys):
    vision, language = speaking("qwen2.5-vl"), speaking("qwen3")
    out = tmp_path / "mindvl"
    assert (
        main(
            [
                "export",
                "--vision",
                str(vision),
                "--language",
                str(language),
                "--positions",
                positions,
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert "mindvl" in capsys.readouterr().out
    opened = open_model(out)
    assert (
        isinstance(opened.config, MindVLConfig)
        and opened.config.text.family == "qwen3"
        and opened.config.text.rope == positions
    )
    tower, decoder, whole = load_parameters(vision), load_parameters(language), opened.parameters()
    for path, value in whole.items():
        if not path.startswith("projector/"):
            np.testing.assert_array_equal(value, (tower if path.startswith("vision/") else decoder)[path], err_msg=path)
    assert (
        whole["projector/linear2/kernel"].shape == (64, 32) and float(np.std(whole["projector/linear2/kernel"])) > 0.01
    )
    content = json.loads((out / "config.json").read_text())
    assert content["model_type"] == "mindvl" and content["text_config"]["model_type"] == "qwen3"
    # Once more through the door: nothing moves.
    assert main(["export", "--run", str(out), "--out", str(tmp_path / "again")]) == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert (out / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--run", "nowhere"], "no such folder"),
        ([], "give either --run"),
        (["--vision", "x"], "give either --run"),
    ],
)
def test_export_says_what_is_wrong(tmp_path, capsys, arguments, part):
    assert main(["export", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err


def test_export_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("x")
    assert main(["export", "--run", "anything", "--out", str(tmp_path)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_pairing_with_the_wrong_folders_is_refused(speaking, tmp_path, capsys):
    vision, language = str(speaking("qwen2.5-vl")), str(speaking("qwen3"))
    assert main(["export", "--vision", language, "--language", language, "--out", str(tmp_path / "a")]) == 2
    assert "without a vision tower" in capsys.readouterr().err
    assert main(["export", "--vision", vision, "--language", vision, "--out", str(tmp_path / "b")]) == 2
    assert "expected Qwen3 or Qwen2.5" in capsys.readouterr().err


def test_assembling_on_a_mesh_gives_the_same_values(speaking):
    from mindvl_jax.config.schema import MeshConfig
    from mindvl_jax.parallel.mesh import make_mesh
    from mindvl_jax.weights.assemble import assemble

    _, one = assemble(speaking("qwen2.5-vl"), speaking("qwen3"))
    _, spread = assemble(speaking("qwen2.5-vl"), speaking("qwen3"), mesh=make_mesh(MeshConfig(fsdp=2, tensor=2)))
    for path, value in one.items():
        np.testing.assert_array_equal(jax.device_get(value), jax.device_get(spread[path]), err_msg=path)


def test_a_question_about_pictures_becomes_the_ids_and_pixels_that_transformers_own_parts_give(speaking, tmp_path):
    """The exported template and tokenizer, and the Pillow image processor; the processor that joins them wants
    torchvision, so the one thing it adds is written out: a placeholder for every merged patch. docs/weights.md tells of
    the whole one.
    """
    from mindvl_jax.data.sample import Media, Message
    from mindvl_jax.models.mindvl.vision import IMAGE_MEAN, IMAGE_STD
    from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder

    assert main(["export", "--run", str(speaking("qwen2.5-vl")), "--out", str(tmp_path / "out")]) == 0
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)) for size in ((60, 90), (31, 57), (200, 40))
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    values = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")(pictures, return_tensors="np")
    turns = [
        {"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": "the cat?"}]},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "and\n\nthe others"},
    ]
    head, *rest = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).split(
        "<|image_pad|>"
    )
    written = head + "".join(
        "<|image_pad|>" * int(np.prod(grid) // 4) + text
        for grid, text in zip(values["image_grid_thw"], rest, strict=True)
    )
    opened = open_model(tmp_path / "out")
    encoder = ExampleEncoder(
        opened.config, opened.tokenizer, EncodeLimits(min_pixels=opened.min_pixels, max_pixels=opened.max_pixels)
    )
    messages = [
        Message("user", "<image><image><image>the cat?"),
        Message("assistant", "a"),
        Message("user", "and\n\nthe others"),
    ]
    ours = encoder.encode_prompt(messages, [Media(data=picture) for picture in pictures]).with_pixels(
        opened.config.vision, "bicubic"
    )
    assert ours.tokens.tolist() == tokenizer(written).input_ids
    theirs = iter(np.split(values["pixel_values"], np.cumsum(values["image_grid_thw"].prod(-1))[:-1]))
    for item, pixels, grid in zip(ours.visuals, ours.pixels, values["image_grid_thw"], strict=True):
        assert item.layout.grid == tuple(grid)
        groups = next(theirs).reshape(-1, 4, 3, 2, 196)[item.layout.merged_order]
        normalised = (
            pixels.reshape(-1, 4, 3, 1, 196) / np.float32(255) - np.reshape(IMAGE_MEAN, (3, 1, 1))
        ) / np.reshape(IMAGE_STD, (3, 1, 1))
        difference = np.abs(groups - normalised).max()
        assert difference < 1e-6, (
            f"pixel values differ by up to {difference}"
        )  # one unit in the last place of values up to 3
