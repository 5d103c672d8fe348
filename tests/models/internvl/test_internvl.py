"""InternVL against transformers on tiny models, every parameter random: logits, gradients, tiles, answers, files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mindvl_jax.config import families, loader
from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.media.image import patchify
from mindvl_jax.data.sample import Media, Message, Sample
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.models.internvl.hf import read_config as read
from mindvl_jax.models.layers.config import IMAGENET_MEAN, IMAGENET_STD
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from mindvl_jax.weights import open_model
from tests.models import against_transformers as against

SIDE = 32
KEY_BIAS = "vision/blocks/attention/key/bias"
SMALL = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=[SIDE, SIDE],
    patch_size=[8, 8],
    attention_bias=True,
)
LARGE = dict(SMALL, attention_bias=False, use_qk_norm=True, norm_type="rms_norm")


def published(folder, image_token=92, vocabulary=96, *, vision=SMALL, family="qwen2", seed=0):
    text = dict(
        model_type=family,
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    text |= dict(head_dim=16) if family == "qwen3" else {}
    config = transformers.InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_token,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return against.publish(transformers.InternVLForConditionalGeneration(config), folder, seed)


def name_of(published_name: str) -> str:
    if published_name.startswith("language_model.lm_head."):
        return published_name.removeprefix("language_model.")
    return "model." + published_name.replace("language_model.model.", "language_model.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return against.opened(published(tmp_path_factory.mktemp("internvl")))


@pytest.fixture(scope="module")
def compared(made):
    """Patches of a row that are no multiple of a square's, as prompts have them."""
    shapes = [(3, ("image", (1, 4, 4)), 5), (("image", (3, 4, 4)), 2, ("image", (1, 4, 4)), 3), (9,)]
    return against.compare(made, shapes, [[0, 2], [1]], tokens=48, patches=72)


def test_logits_of_packed_tiles_and_text_equal_those_of_transformers(compared):
    compared.check_logits()


def test_the_gradient_of_every_parameter_equals_that_of_transformers(made, compared):
    compared.check_gradients(made, name_of, zero=KEY_BIAS)


def test_a_few_steps_through_the_bridge_equal_those_of_xla(made, compared):
    compared.check_bridge(made)


def test_the_large_tower_under_qwen3_equals_that_of_transformers(tmp_path):
    """RMSNorms, norms of queries and keys over the whole width, no biases there."""
    made = against.opened(published(tmp_path, vision=LARGE, family="qwen3"))
    compared = against.compare(made, [(3, ("image", (2, 4, 4)), 5)], [[0]], tokens=24, patches=32)
    compared.check_logits()
    compared.check_gradients(made, name_of)


def test_a_folder_comes_back_with_the_same_bytes_and_opens_in_transformers(made, tmp_path):
    against.check_round_trip(made.folder, tmp_path / "out", "internvl")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    assert processor.crop_to_patches and processor.size["height"] == SIDE and processor.max_patches == 12


def test_an_adapter_of_peft_in_every_part_works_as_there(made, tmp_path):
    against.check_adapter(made, tmp_path, (2, ("image", (2, 4, 4)), 3), ["q_proj", "fc1", "linear_2", "down_proj"])


@pytest.mark.parametrize("change, problem", [
    (("vision_config", "use_mean_pooling", False), "vision_config.use_mean_pooling is False; supported: True"),
    (("vision_config", "image_size", [32, 64]), "vision_config.image_size is [32, 64]; supported are squares"),
    (("text_config", "model_type", "llama"), "text_config.model_type is 'llama'; supported: 'qwen2', 'qwen3'"),
    ((None, "downsample_ratio", 0.25), "downsample_ratio is 0.25; supported: 0.5"),
])  # fmt: skip
def test_what_would_change_the_mathematics_is_refused(made, change, problem):
    against.check_refused(made, change, read, problem)


def test_mindvl_parity_finds_the_same_mathematics_part_by_part(made, tmp_path, capsys):
    against.check_parity_command(made.folder, tmp_path, capsys, "vision block", "projector", "mlp")


def processor(**options):
    return transformers.models.got_ocr2.GotOcr2ImageProcessorPil(
        size=dict(height=SIDE, width=SIDE),
        crop_to_patches=True,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        **options,
    )


def squares(ours, vision):
    """Patches back to (squares, channels, side, side)."""
    grid = ours.patches.reshape(-1, 2, 2, 2, 2, 3, vision.patch_size, vision.patch_size)
    return grid.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, SIDE, SIDE)


def test_tiles_of_odd_sizes_equal_those_of_transformers(made):
    generator, vision = np.random.default_rng(3), made.config.vision
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    theirs, counts = processor(), set()
    # Ties between grids of one shape: 32x32 and 64x64 pixels, just over and under half of a larger grid's.
    for size in [
        (32, 32),
        (64, 64),
        (46, 46),
        (45, 46),
        (3, 400),
        (400, 3),
        *generator.integers(5, 200, (40, 2)).tolist(),
    ]:
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))
        want = theirs(images=[image], return_tensors="np")
        ours = patchify(image, vision, 1, 10**6)
        assert ours.layout.grid == (int(want["num_patches"][0]), 4, 4), size
        np.testing.assert_array_equal(squares(ours, vision), np.round((want["pixel_values"] * std + mean) * 255))
        counts.add(ours.layout.grid[0])
    assert len(counts) > 6


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """(generator, reference, tokenizer) of a model over bytes."""
    root = tmp_path_factory.mktemp("talking")
    file = Path(against.fixtures().byte_tokenizer(root).file)
    text = file.read_text()
    for ours, theirs in (("vision_start", "<img>"), ("vision_end", "</img>"), ("image_pad", "<IMG_CONTEXT>")):
        text = text.replace(f"<|{ours}|>", theirs)
    file.write_text(text)
    tokenizer = load_tokenizer(TokenizerConfig(path=str(file)))
    first = tokenizer.token_id("<img>")
    assert [tokenizer.token_id(name) - first for name in ("</img>", "<IMG_CONTEXT>")] == [1, 2]
    folder = published(root / "model", first + 2, tokenizer.vocab_size, seed=4)
    (folder / "tokenizer.json").write_bytes(file.read_bytes())
    return Generator(open_model(folder), slots=3, context=320), against.load_reference(folder), tokenizer


def test_greedy_answers_about_images_are_those_of_transformers(talking):
    """Prompts without, with one and with two images of several tiles, answered together; there one by one."""
    generator, reference, _ = talking
    drawn = iter(against.fixtures().pictures(9, seed=9, largest=84))
    images = {str(number): [next(drawn) for _ in range(number % 3)] for number in range(6)}
    requests = [
        Request.from_prompt(
            f"what is number {number}?", shown, id=number, sampling=Sampling(max_new_tokens=5 + int(number) % 3)
        )
        for number, shown in images.items()
    ]

    def inputs_of(request, ids):
        shown = images[request.id]
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        return inputs | (
            dict(pixel_values=processor()(images=shown, return_tensors="pt")["pixel_values"]) if shown else {}
        )

    against.check_greedy(generator, requests, reference, inputs_of, list(generator.eos_ids))


def test_a_prompt_and_what_is_learned_are_the_published_ones(talking):
    """Borders around all tiles of a picture; while learning, pictures of a sample share the most tiles."""
    generator, _, tokenizer = talking
    config, media = generator.model.config, [png(64, 32), png(32, 32)]
    content = "<image>\n<image>\nwhat?"
    limits = EncodeLimits(min_pixels=1, max_pixels=10**6)
    example = ExampleEncoder(config, tokenizer, limits).encode_prompt([Message("user", content)], media)

    def written(tiles, answer):
        pictures = "".join(f"<img>{'<IMG_CONTEXT>' * 4 * count}</img>\n" for count in tiles)
        text = f"<|im_start|>user\n{pictures}what?<|im_end|>\n<|im_start|>assistant\n{answer}"
        return tokenizer.encode(text, allow_special=True)

    assert example.tokens.tolist() == written((3, 1), "")
    np.testing.assert_array_equal(example.positions[0], np.arange(len(example.tokens)))
    config = config.model_copy(update=dict(vision=config.vision.model_copy(update=dict(max_tiles=3))))
    sample = Sample("a", (Message("user", content), Message("assistant", "this")), tuple(media))
    learned = ExampleEncoder(config, tokenizer, limits).encode(sample)
    assert learned.tokens.tolist() == written((1, 1), "this<|im_end|>")
    assert int(learned.loss_weights.sum()) == len("this") + 1


def png(width, height) -> Media:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return Media(data=file.getvalue())


# Written out from the published sizes of the decoder: width, feed-forward, layers, heads, kv heads, head dim.
@pytest.mark.parametrize("name, family, sizes, large", [
    ("internvl2.5-4b", "qwen2", (2048, 11008, 36, 16, 2, 128), False),
    ("internvl2.5-78b", "qwen2", (8192, 29568, 80, 64, 8, 128), True),
    ("internvl3-1b", "qwen2", (896, 4864, 24, 14, 2, 64), False),
    ("internvl3-8b", "qwen2", (3584, 18944, 28, 28, 4, 128), False),
    ("internvl3.5-8b", "qwen3", (4096, 12288, 36, 32, 8, 128), False),
    ("internvl3.5-38b", "qwen3", (5120, 25600, 64, 64, 8, 128), True),
])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, family, sizes, large):
    D, F, L, N, K, H = sizes
    text = dict(
        model_type=family,
        vocab_size=151674 if family == "qwen2" else 151936,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        tie_word_embeddings=False,
    )
    vision = dict(attention_bias=True)
    if large:
        vision = dict(
            hidden_size=3200,
            num_hidden_layers=45,
            num_attention_heads=25,
            intermediate_size=12800,
            norm_type="rms_norm",
            use_qk_norm=True,
        )
    config = transformers.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    found = against.parameters_of(families.preset(name))
    assert found == against.parameters_in(transformers.InternVLForConditionalGeneration, config)


def test_the_shipped_recipe_loads():
    config = loader.load(against.ROOT / "configs" / "internvl3-8b.yaml")
    wanted = families.preset("internvl3-8b")
    assert config.model == wanted.model_copy(update=dict(preset="internvl3-8b", remat=config.model.remat))


def test_rows_hold_whole_squares_and_samples_no_more_than_the_published_positions():
    config = loader.load(against.ROOT / "configs" / "internvl3-8b.yaml")
    phase = config.training.phases[0]
    problems = config.model.phase_problems(phase.model_copy(update=dict(patches_per_row=1000)))
    assert problems == {"patches_per_row": "must be a multiple of 1024 (patches of one square of 448)"}
    problems = config.model.phase_problems(phase.model_copy(update=dict(max_sample_length=40000)))
    assert "at most 32768" in problems["max_sample_length"]
