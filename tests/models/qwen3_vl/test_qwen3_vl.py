"""Qwen3-VL against transformers on tiny models whose parameters are all random: logits, gradients, positions, words
of a video, pixels, answers, files.
"""

import types
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mindvl_jax.config import families, loader
from mindvl_jax.data.media.image import patchify
from mindvl_jax.data.sample import Media, Message
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.models.qwen3_vl.hf import read_config as read
from mindvl_jax.models.qwen3_vl.model import MEAN, STD
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from mindvl_jax.weights import open_model
from tests.models import against_transformers as against

VISION = dict(
    depth=4,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=8,
    num_position_embeddings=36,
    deepstack_visual_indexes=[0, 2],
    out_hidden_size=64,
)
TOKENS = dict(image_token_id=92, video_token_id=93, vision_start_token_id=90, vision_end_token_id=91)


def published(folder, tokens=TOKENS, vocabulary=96, *, tied=False, seed=0):
    text = dict(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=tied,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True),
    )
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=tied, **tokens)
    return against.publish(transformers.Qwen3VLForConditionalGeneration(config), folder, seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return against.opened(published(tmp_path_factory.mktemp("qwen3-vl")))


@pytest.fixture(scope="module")
def compared(made):
    shapes = [
        (3, ("image", (1, 6, 10)), 5),
        (("image", (1, 2, 2)), 2, ("image", (1, 8, 6)), 1, ("image", (1, 4, 4)), 3),
        (2, ("video", (3, 4, 6), 1.5), 4, ("image", (1, 4, 2)), 2),
        (12,),
    ]
    return against.compare(made, shapes, [[0, 3], [1, 2]], tokens=96, patches=168)


def test_logits_of_packed_images_videos_and_text_equal_those_of_transformers(compared):
    compared.check_logits()


def test_the_gradient_of_every_parameter_equals_that_of_transformers(made, compared):
    compared.check_gradients(made)


def test_a_few_steps_through_the_bridge_equal_those_of_xla(made, compared):
    compared.check_bridge(made)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_comes_back_with_the_same_bytes_and_opens_in_transformers(tmp_path, tied):
    folder = published(tmp_path / "in", tied=tied)
    against.check_round_trip(folder, tmp_path / "out", "qwen3_vl")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size["longest_edge"] == 100352 and list(processor.image_mean) == list(MEAN)
    assert "Qwen3VLVideoProcessor" in (tmp_path / "out" / "video_preprocessor_config.json").read_text()


def test_an_adapter_of_peft_in_every_part_works_as_there(made, tmp_path):
    against.check_adapter(made, tmp_path, (2, ("image", (1, 4, 6)), 3), ["qkv", "linear_fc2", "q_proj", "down_proj"])


@pytest.mark.parametrize("change, problem", [
    (("vision_config", "hidden_act", "silu"), "vision_config.hidden_act is 'silu'; supported: 'gelu_pytorch_tanh'"),
    (("vision_config", "out_hidden_size", 8), "vision_config.out_hidden_size is 8; supported: 64"),
    (("text_config", "rope_parameters", dict(rope_type="yarn", mrope_section=[4, 2, 2])),
     "text_config.rope type is 'yarn'; supported: 'default', 'mrope' (frequencies are not rescaled)"),
    (("vision_config", "deepstack_visual_indexes", [2, 9]),
     "vision_config.: Value error, deepstack_blocks (2, 9) go beyond a tower of 4 blocks"),
])  # fmt: skip
def test_what_would_change_the_mathematics_is_refused(made, change, problem):
    against.check_refused(made, change, read, problem)


def test_mindvl_parity_finds_the_same_mathematics_part_by_part(made, tmp_path, capsys):
    against.check_parity_command(made.folder, tmp_path, capsys, "vision block", "deepstack", "mlp")


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """(generator, folder, reference, tokenizer) of a model over bytes."""
    root = tmp_path_factory.mktemp("talking")
    (root / "tokenizer").mkdir()
    tokenizer = against.fixtures().byte_tokenizer(root / "tokenizer")
    names = dict(
        image_token_id="image_pad",
        video_token_id="video_pad",
        vision_start_token_id="vision_start",
        vision_end_token_id="vision_end",
    )
    ids = {key: tokenizer.token_id(f"<|{name}|>") for key, name in names.items()}
    folder = published(root / "model", ids, tokenizer.vocab_size, seed=4)
    (folder / "tokenizer.json").write_bytes(Path(tokenizer._file).read_bytes())
    return Generator(open_model(folder), slots=3, context=256), folder, against.load_reference(folder), tokenizer


def test_greedy_answers_about_images_are_those_of_transformers(talking):
    """Prompts without, with one and with two images, answered together; there one by one."""
    generator, _, reference, tokenizer = talking
    drawn, low, high = iter(against.fixtures().pictures(9, seed=9, largest=84)), 16 * 16, 16 * 16 * 12
    images = {str(number): [next(drawn) for _ in range(number % 3)] for number in range(6)}
    requests = [
        Request.from_prompt(
            f"what is number {number}?",
            shown,
            id=number,
            sampling=Sampling(max_new_tokens=5 + int(number) % 3),
            min_pixels=low,
            max_pixels=high,
        )
        for number, shown in images.items()
    ]
    processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=8, image_mean=MEAN, image_std=STD
    )

    def inputs_of(request, ids):
        inputs = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == tokenizer.token_id("<|image_pad|>")).int(),
        )
        shown = images[request.id]
        return inputs | (dict(processor(images=shown, return_tensors="pt")) if shown else {})

    against.check_greedy(generator, requests, reference, inputs_of, list(generator.eos_ids))


def test_each_frame_pair_of_a_video_stands_behind_its_time_as_in_transformers(talking, tmp_path):
    """Words and positions: the time is encoded together with the text before it."""
    _, folder, reference, tokenizer = talking
    model = open_model(folder).model.config
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for value in range(20):
            picture = np.full((32, 48, 3), 12 * value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    limits = EncodeLimits(min_pixels=256, max_pixels=32 * 48, video_fps=1.5, video_max_frames=6)
    example = ExampleEncoder(model, tokenizer, limits).encode_prompt(
        [Message("user", "see: <video>?")], (), [Media(data=(tmp_path / "clip.mp4").read_bytes())]
    )
    (item,) = example.visuals
    assert item.layout.grid == (3, 4, 6) and len(item.frames) == 6
    # transformers' own processor, its tokenizer left out: it needs the names of the tokens alone.
    maker = transformers.Qwen3VLProcessor.__new__(transformers.Qwen3VLProcessor)
    maker.video_token, maker.vision_start_token, maker.vision_end_token = (
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    )
    maker.video_processor = types.SimpleNamespace(merge_size=2, temporal_patch_size=2)
    metadata = types.SimpleNamespace(fps=5.0, frames_indices=list(item.frames))
    words = maker.replace_video_token(
        dict(video_grid_thw=torch.tensor([item.layout.grid]), video_metadata=[metadata]), 0
    )
    text = f"<|im_start|>user\nsee: {words}?<|im_end|>\n<|im_start|>assistant\n"
    assert example.tokens.tolist() == tokenizer.encode(text, allow_special=True)
    ids = torch.tensor(example.tokens)[None]
    want = reference.model.get_rope_index(
        ids, mm_token_type_ids=2 * (ids == model.video_token_id).int(), video_grid_thw=torch.tensor([item.layout.grid])
    )[0][:, 0]
    np.testing.assert_array_equal(example.positions, want.numpy())
    assert example.visual_index[example.visual_index >= 0].tolist() == list(range(18))


def test_pixels_of_odd_sizes_equal_those_of_transformers(made):
    generator, vision = np.random.default_rng(3), made.config.vision
    processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 1024, "longest_edge": 8192}, patch_size=8, image_mean=MEAN, image_std=STD
    )
    for size in [(17, 90), (200, 31), *generator.integers(16, 260, (20, 2)).tolist()]:
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))
        want = processor(images=[image], return_tensors="np")
        ours = patchify(image, vision, 1024, 8192)
        assert list(ours.layout.grid) == want["image_grid_thw"][0].tolist()
        # Back to whole levels, which is what is kept until the device.
        np.testing.assert_array_equal(ours.patches, np.round((want["pixel_values"] * 0.5 + 0.5) * 255))


# Written out from the published sizes: width, feed-forward, layers, heads, tied; tower: width, feed-forward, blocks.
@pytest.mark.parametrize("name, sizes, tower", [
    ("qwen3-vl-2b", (2048, 6144, 28, 16, True), (1024, 4096, 24)),
    ("qwen3-vl-4b", (2560, 9728, 36, 32, True), (1024, 4096, 24)),
    ("qwen3-vl-8b", (4096, 12288, 36, 32, False), (1152, 4304, 27)),
    ("qwen3-vl-32b", (5120, 25600, 64, 64, False), (1152, 4304, 27)),
])  # fmt: skip
def test_presets_have_the_published_number_of_parameters(name, sizes, tower):
    (D, F, L, N, tied), (W, M, B) = sizes, tower
    layer = 2 * D * N * 128 + 2 * D * 8 * 128 + 3 * D * F + 2 * D + 2 * 128
    decoder = 151936 * D * (1 if tied else 2) + L * layer + D
    block = 4 * W * W + 4 * W + 2 * W * M + M + W + 4 * W
    merger = (4 * W) ** 2 + 4 * W + 4 * W * D + D
    vision = 3 * 2 * 16 * 16 * W + W + 48 * 48 * W + B * block + (merger + 2 * W) + 3 * (merger + 2 * 4 * W)
    found = against.parameters_of(families.preset(name))
    assert found == decoder + vision, f"{name}: {found:,} against {decoder + vision:,}"
    text = dict(vocab_size=151936, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
                num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied)  # fmt: skip
    theirs = transformers.Qwen3VLConfig(
        text_config=text,
        tie_word_embeddings=tied,
        vision_config=dict(depth=B, hidden_size=W, intermediate_size=M, out_hidden_size=D),
    )
    assert found == against.parameters_in(transformers.Qwen3VLForConditionalGeneration, theirs)


def test_the_shipped_recipe_loads():
    config = loader.load(against.ROOT / "configs" / "qwen3-vl-8b.yaml")
    wanted = families.preset("qwen3-vl-8b")
    assert config.model == wanted.model_copy(update=dict(preset="qwen3-vl-8b", remat=config.model.remat))
