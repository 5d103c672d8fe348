"""LLaVA-1.5 against transformers, every parameter random: logits, gradients, pixels, words, answers, files."""

import io
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from mindvl_jax.config import families, loader
from mindvl_jax.config.schema import TokenizerConfig
from mindvl_jax.data.media.image import patchify
from mindvl_jax.data.sample import Media, Message, Sample, SampleError
from mindvl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.llava.config import SYSTEM
from mindvl_jax.models.llava.hf import read_config as read
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from mindvl_jax.weights import open_model
from tests.models import against_transformers as against

SIDE = 32
KEY_BIAS = "vision/blocks/attention/key/bias"
LIMITS = EncodeLimits(min_pixels=1, max_pixels=10**6)


def published(folder, image_token=92, vocabulary=96, *, seed=0):
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
        model_type="clip_vision_model",
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIDE,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_token, image_seq_length=16
    )
    return against.publish(transformers.LlavaForConditionalGeneration(config), folder, seed)


def name_of(published_name: str) -> str:
    if published_name.startswith("language_model.lm_head."):
        return published_name.removeprefix("language_model.")
    name = published_name.replace("language_model.model.", "language_model.")
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return against.opened(published(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def compared(made):
    """Places of a row that are no multiple of a picture's, as prompts have them."""
    shapes = [(3, ("image", (1, 4, 4)), 5), (("image", (1, 4, 4)), 2, ("image", (1, 4, 4)), 3), (9,)]
    return against.compare(made, shapes, [[0, 2], [1]], tokens=48, patches=37)


def test_logits_of_packed_pictures_and_text_equal_those_of_transformers(compared):
    compared.check_logits()


def test_the_gradient_of_every_parameter_equals_that_of_transformers(made, compared):
    """The last block and the norm after it are kept and never run."""
    unused = tuple(
        slot.name
        for slot in against.slots(made.config, {path: value.shape for path, value in compared.grads.items()})
        if "encoder.layers.2." in slot.name or "post_layernorm" in slot.name
    )
    assert len(unused) == 18
    compared.check_gradients(made, name_of, never=unused, zero=KEY_BIAS)


def test_a_few_steps_through_the_bridge_equal_those_of_xla(made, compared):
    compared.check_bridge(made)


def test_a_folder_comes_back_with_the_same_bytes_and_opens_in_transformers(made, tmp_path):
    against.check_round_trip(made.folder, tmp_path / "out", "llava")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    assert processor.crop_size["height"] == SIDE and processor.size["shortest_edge"] == SIDE and not processor.do_pad


def test_an_adapter_of_peft_in_every_part_works_as_there(made, tmp_path):
    against.check_adapter(made, tmp_path, (2, ("image", (1, 4, 4)), 3), ["q_proj", "fc1", "linear_2", "down_proj"])


@pytest.mark.parametrize("change, problem", [
    (("vision_config", "hidden_act", "gelu"), "vision_config.hidden_act is 'gelu'; supported: 'quick_gelu'"),
    (("vision_config", "model_type", "siglip_vision_model"),
     "vision_config.model_type is 'siglip_vision_model'; supported: 'clip_vision_model'"),
    (("text_config", "model_type", "mistral"), "text_config.model_type is 'mistral'; supported: 'llama'"),
    ((None, "projector_hidden_act", "relu"), "projector_hidden_act is 'relu'; supported: 'gelu'"),
])  # fmt: skip
def test_what_would_change_the_mathematics_is_refused(made, change, problem):
    against.check_refused(made, change, read, problem)


def test_mindvl_parity_finds_the_same_mathematics_part_by_part(made, tmp_path, capsys):
    against.check_parity_command(made.folder, tmp_path, capsys, "vision block", "projector", "mlp")


def processor(**options):
    return transformers.models.llava.LlavaImageProcessorPil(
        size=dict(shortest_edge=SIDE), crop_size=dict(height=SIDE, width=SIDE), **options
    )


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pixels_of_odd_sizes_equal_those_of_transformers(made, fit):
    generator = np.random.default_rng(3)
    vision = made.config.vision.model_copy(update=dict(fit=fit))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    theirs = processor(do_pad=fit == "pad")
    for size in [(32, 32), (33, 32), (3, 120), (120, 3), *generator.integers(5, 200, (40, 2)).tolist()]:
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8))
        want = theirs(images=[image], return_tensors="np")["pixel_values"]
        ours = patchify(image, vision, 1, 10**6).patches.reshape(4, 4, 3, 8, 8).transpose(2, 0, 3, 1, 4)
        np.testing.assert_array_equal(ours.reshape(1, 3, SIDE, SIDE), np.round((want * std + mean) * 255), str(size))


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """(generator, reference, tokenizer) of a model over bytes."""
    root = tmp_path_factory.mktemp("talking")
    file = Path(against.fixtures().byte_tokenizer(root).file)
    text = file.read_text()
    for ours, theirs in (("image_pad", "<image>"), ("im_start", "<s>"), ("im_end", "</s>")):
        text = text.replace(f"<|{ours}|>", theirs)
    file.write_text(text)
    (root / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<|endoftext|>"}')
    tokenizer = load_tokenizer(TokenizerConfig(path=str(file)))
    folder = published(root / "model", tokenizer.token_id("<image>"), tokenizer.vocab_size, seed=4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((root / name).read_bytes())
    return Generator(open_model(folder), slots=3, context=320), against.load_reference(folder), tokenizer


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


def png() -> Media:
    file = io.BytesIO()
    Image.new("RGB", (40, 32)).save(file, "png")
    return Media(data=file.getvalue())


def test_a_conversation_is_written_in_the_published_format(talking):
    generator, _, tokenizer = talking
    config = generator.model.config
    turns = (
        Message("user", "<image>\nwhat?"),
        Message("assistant", "this"),
        Message("user", "and?"),
        Message("assistant", "that"),
    )
    example = ExampleEncoder(config, tokenizer, LIMITS).encode(Sample("a", turns, (png(),)))
    text = f"<s>{SYSTEM} USER: {'<image>' * 16}\nwhat? ASSISTANT: this</s>USER: and? ASSISTANT: that</s>"
    assert example.tokens.tolist() == tokenizer.encode(text, allow_special=True)
    learned = [token for token, weight in zip(example.targets, example.loss_weights, strict=True) if weight]
    assert tokenizer.decode(learned, skip_special=False) == " this</s> that</s>"
    prompt = ExampleEncoder(config, tokenizer, LIMITS).encode_prompt(turns[:3], (png(),))
    assert prompt.tokens.tolist() == tokenizer.encode(text.removesuffix(" that</s>"), allow_special=True)
    with pytest.raises(SampleError, match="llava has no place for videos"):
        ExampleEncoder(config, tokenizer, LIMITS).encode_prompt([Message("user", "<video>")], (), [png()])


def test_pieces_of_a_conversation_have_the_tokens_of_the_whole_where_every_text_gets_a_space(made, tmp_path):
    """Llama's tokenizer puts a space before whatever it is given."""
    characters = sorted({*(SYSTEM + "USERASSISTANT:what?thisand.\n"), "\u2581"} - {" "})
    words = ["<unk>", "<s>", "</s>", "<image>", "<|endoftext|>", *characters, "\u2581t", "\u2581th", "\u2581A"]
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581", "A")]
    raw = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: id for id, word in enumerate(words)}, merges, unk_token="<unk>")
    )
    raw.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    raw.add_special_tokens(words[1:5])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", eos_token="</s>")
    config = made.config.model_copy(update=dict(image_token_id=tokenizer.token_id("<image>")))
    turns = (
        Message("user", "what?"),
        Message("assistant", "this"),
        Message("user", "and that?"),
        Message("assistant", "that"),
    )
    example = ExampleEncoder(config, tokenizer, LIMITS).encode(Sample("a", turns))
    text = f"<s>{SYSTEM} USER: what? ASSISTANT: this</s>USER: and that? ASSISTANT: that</s>"
    assert example.tokens.tolist() == tokenizer.encode(text, allow_special=True)
    prompt = ExampleEncoder(config, tokenizer, LIMITS).encode_prompt(turns[:1])
    assert prompt.tokens.tolist() == tokenizer.encode(f"<s>{SYSTEM} USER: what? ASSISTANT:", allow_special=True)


# Written out from the published sizes: width, feed-forward, layers, heads.
@pytest.mark.parametrize(
    "name, sizes", [("llava-1.5-7b", (4096, 11008, 32, 32)), ("llava-1.5-13b", (5120, 13824, 40, 40))]
)
def test_presets_have_the_published_number_of_parameters(name, sizes):
    D, F, L, N = sizes
    text = dict(
        model_type="llama",
        vocab_size=32064,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=N,
    )
    found = against.parameters_of(families.preset(name))
    config = transformers.LlavaConfig(text_config=text)
    assert found == against.parameters_in(transformers.LlavaForConditionalGeneration, config)


def test_the_shipped_recipe_loads():
    config = loader.load(against.ROOT / "configs" / "llava-1.5-7b.yaml")
    wanted = families.preset("llava-1.5-7b")
    assert config.model == wanted.model_copy(update=dict(preset="llava-1.5-7b", remat=config.model.remat))
