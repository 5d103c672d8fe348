"""Janus-Pro's understanding half against transformers, every parameter random: logits, gradients, pixels, words,
answers, files.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from mindvl_jax.config import families, loader
from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.media.image import patchify
from mindvl_jax.data.sample import Media, Message, Sample
from mindvl_jax.data.text.tokenizer import load_tokenizer
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.models.janus.config import BEGIN, END, SYSTEM
from mindvl_jax.models.janus.hf import read_config as read
from mindvl_jax.models.layers.config import HALF
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from mindvl_jax.parity.reference import load_reference
from mindvl_jax.weights import load_parameters, open_model, save_parameters
from mindvl_jax.weights.companions import write_companions
from mindvl_jax.weights.mapping import read_config
from tests.models import against_transformers as against

SIDE = 32
KEY_BIAS = "vision/blocks/attention/key/bias"
LIMITS = EncodeLimits(min_pixels=1, max_pixels=10**6)
CODES = dict(
    embed_dim=4,
    num_embeddings=8,
    latent_channels=32,
    base_channels=32,
    channel_multiplier=[1, 1],
    num_res_blocks=1,
    projection_dim=48,
    image_token_embed_dim=48,
)
DRAWING = ("model.vqmodel.", "model.generation_")


def published(folder, image_token=92, borders=(90, 91), vocabulary=96, *, seed=0):
    text = dict(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    vision = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=1.5,
        image_size=SIDE,
        patch_size=8,
        num_image_tokens=16,
        projection_dim=48,
    )
    config = transformers.JanusConfig(
        text_config=text, vision_config=vision, vq_config=CODES, image_token_id=image_token, tie_word_embeddings=False
    )
    config.vision_start_token_id, config.vision_end_token_id = borders
    return against.publish(transformers.JanusForConditionalGeneration(config), folder, seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return against.opened(published(tmp_path_factory.mktemp("janus")))


@pytest.fixture(scope="module")
def compared(made):
    """Places of a row that are no multiple of a picture's, as prompts have them."""
    shapes = [(3, ("image", (1, 4, 4)), 5), (("image", (1, 4, 4)), 2, ("image", (1, 4, 4)), 3), (9,)]
    return against.compare(made, shapes, [[0, 2], [1]], tokens=52, patches=37)


def test_logits_of_packed_pictures_and_text_equal_those_of_transformers(compared):
    compared.check_logits()


def test_the_gradient_of_every_parameter_equals_that_of_transformers(made, compared):
    compared.check_gradients(made, zero=KEY_BIAS)


def test_a_few_steps_through_the_bridge_equal_those_of_xla(made, compared):
    compared.check_bridge(made)


def test_the_understanding_half_comes_back_with_the_same_bytes_and_opens_in_transformers(made, tmp_path):
    save_parameters(tmp_path, made.config, load_parameters(made.folder, made.config))
    write_companions(tmp_path, made.config, None, 3136, 100352)
    before, after = (load_file(path / "model.safetensors") for path in (made.folder, tmp_path))
    kept = {name: tensor for name, tensor in before.items() if not name.startswith(DRAWING)}
    assert len(kept) < len(before) and set(kept) == set(after)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in after.items())
    assert read_config(tmp_path) == made.config.model_copy(update=dict(compute_dtype="bfloat16"))
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content["vq_config"] |= CODES  # the published size has 70 M parameters of random numbers
    file.write_text(json.dumps(content))
    theirs = load_reference(tmp_path).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in kept.items())


def test_an_adapter_of_peft_in_every_part_works_as_there(made, tmp_path):
    targets = ["q_proj", "mlp.fc1", "aligner.hidden_layers.0", "down_proj"]
    against.check_adapter(made, tmp_path, (2, ("image", (1, 4, 4)), 3), targets)


@pytest.mark.parametrize("change, problem", [
    (("vision_config", "hidden_act", "relu"), "vision_config.hidden_act is 'relu'; supported: 'gelu'"),
    (("vision_config", "use_qk_norm", True), "vision_config.use_qk_norm is True; supported: False"),
    (("vision_config", "depth", 3), "vision_config.depth is 3; supported: 2"),
    (("vision_config", "projection_dim", 64), "vision_config.projection_dim is 64; supported: 48"),
    (("text_config", "model_type", "mistral"), "text_config.model_type is 'mistral'; supported: 'llama'"),
])  # fmt: skip
def test_what_would_change_the_mathematics_is_refused(made, change, problem):
    against.check_refused(made, change, read, problem)


def test_mindvl_parity_finds_the_same_mathematics_part_by_part(made, tmp_path, capsys):
    against.check_parity_command(made.folder, tmp_path, capsys, "vision block", "projector", "mlp")


def processor():
    return transformers.models.janus.image_processing_pil_janus.JanusImageProcessorPil(
        size=dict(height=SIDE, width=SIDE), image_mean=HALF, image_std=HALF
    )


def test_pixels_of_odd_sizes_equal_those_of_transformers(made):
    generator, theirs = np.random.default_rng(3), processor()
    for size in [(32, 32), (33, 32), (3, 120), (120, 3), *generator.integers(5, 200, (196, 2)).tolist()]:
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))
        want = theirs(images=[image], return_tensors="np")["pixel_values"]
        ours = patchify(image, made.config.vision, 1, 10**6).patches.reshape(4, 4, 3, 8, 8).transpose(2, 0, 3, 1, 4)
        np.testing.assert_array_equal(ours.reshape(1, 3, SIDE, SIDE), np.round((want * 0.5 + 0.5) * 255), str(size))


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """(generator, reference, tokenizer) of a model over bytes."""
    root = tmp_path_factory.mktemp("talking")
    file = Path(against.fixtures().byte_tokenizer(root).file)
    text = file.read_text()
    names = dict(
        image_pad="<image_placeholder>",
        vision_start="<begin_of_image>",
        vision_end="<end_of_image>",
        im_start=BEGIN,
        im_end=END,
    )
    for ours, theirs in names.items():
        assert f"<|{ours}|>" in text
        text = text.replace(f"<|{ours}|>", theirs)
    file.write_text(text)
    special = {"eos_token": END, "pad_token": "<|endoftext|>"}
    (root / "tokenizer_config.json").write_text(json.dumps(special))
    tokenizer = load_tokenizer(TokenizerConfig(path=str(file)))
    image, *borders = (tokenizer.token_id(names[key]) for key in ("image_pad", "vision_start", "vision_end"))
    folder = published(root / "model", image, borders, tokenizer.vocab_size, seed=4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((root / name).read_bytes())
    return Generator(open_model(folder), slots=3, context=448), against.load_reference(folder), tokenizer


def test_greedy_answers_about_images_are_those_of_transformers(talking):
    """Prompts without, with one and with two images, answered together; there one by one."""
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
        return inputs | (dict(processor()(images=shown, return_tensors="pt")) if shown else {})

    against.check_greedy(generator, requests, reference, inputs_of, list(generator.eos_ids))


def test_a_conversation_is_written_in_the_published_format(talking):
    generator, _, tokenizer = talking
    file = io.BytesIO()
    Image.new("RGB", (40, 32)).save(file, "png")
    media = (Media(data=file.getvalue()),)
    turns = (
        Message("user", "<image>\nwhat?"),
        Message("assistant", "this"),
        Message("user", "and?"),
        Message("assistant", "that"),
    )
    encoder = ExampleEncoder(generator.model.config, tokenizer, LIMITS)
    example = encoder.encode(Sample("a", turns, media))
    picture = f"<begin_of_image>{'<image_placeholder>' * 16}<end_of_image>"
    asked = f"{BEGIN}{SYSTEM}\n\n<|User|>: {picture}\nwhat?\n\n<|Assistant|>: this{END}<|User|>: and?\n\n<|Assistant|>:"
    assert example.tokens.tolist() == tokenizer.encode(f"{asked} that{END}", allow_special=True)
    learned = [token for token, weight in zip(example.targets, example.loss_weights, strict=True) if weight]
    assert tokenizer.decode(learned, skip_special=False) == f" this{END} that{END}"
    assert encoder.encode_prompt(turns[:3], media).tokens.tolist() == tokenizer.encode(asked, allow_special=True)


# Written out from the sizes: width, feed-forward, layers, heads.
@pytest.mark.parametrize(
    "name, sizes", [("janus-pro-1b", (2048, 5632, 24, 16)), ("janus-pro-7b", (4096, 11008, 30, 32))]
)
def test_presets_have_the_number_of_parameters_of_transformers(name, sizes):
    D, F, L, N = sizes
    text = dict(
        model_type="llama",
        vocab_size=102400,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=N,
    )
    config = transformers.JanusConfig(text_config=text, vision_config=dict(projection_dim=D), tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.JanusForConditionalGeneration(config)
    theirs = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(DRAWING))
    assert against.parameters_of(families.preset(name)) == theirs


def test_the_shipped_recipe_loads():
    config = loader.load(against.ROOT / "configs" / "janus-pro-7b.yaml")
    wanted = families.preset("janus-pro-7b")
    assert config.model == wanted.model_copy(update=dict(preset="janus-pro-7b", remat=config.model.remat))
