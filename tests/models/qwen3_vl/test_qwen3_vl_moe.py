"""Qwen3-VL with a routed decoder against transformers: what differs from the dense sizes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mindvl_jax.config import families
from mindvl_jax.data.marks import MEDIA_TOKENS
from mindvl_jax.inference import Generator, Request, Sampling
from mindvl_jax.weights import open_model
from tests.models import against_transformers as against

VISION = dict(
    depth=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    patch_size=4,
    num_position_embeddings=16,
    deepstack_visual_indexes=[1, 2],
    out_hidden_size=48,
)

TOKENS = dict(image_token_id=92, video_token_id=93, vision_start_token_id=90, vision_end_token_id=91)


def published(folder, tokens=TOKENS, vocabulary=96):
    text = dict(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True),
    )
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **tokens)
    against.publish(transformers.Qwen3VLMoeForConditionalGeneration(config), folder)
    # transformers 5 writes experts outputs first and reads both orders; the released files hold inputs first.
    file = folder / "model.safetensors"
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return against.opened(published(tmp_path_factory.mktemp("qwen3-vl-moe")))


def test_logits_and_gradients_of_packed_images_and_videos_equal_those_of_transformers(made):
    shapes = [(3, ("image", (1, 4, 6)), 5), (2, ("video", (2, 4, 4), 1.5), 4), (7,)]
    compared = against.compare(made, shapes, [[0, 2], [1]], tokens=48, patches=36)
    compared.check_logits()
    compared.check_gradients(made)


def test_a_folder_comes_back_with_the_same_bytes_and_opens_in_transformers(made, tmp_path):
    against.check_round_trip(made.folder, tmp_path / "out", "qwen3_vl_moe")


def test_an_adapter_of_peft_in_the_tower_and_the_attention_works_as_there(made, tmp_path):
    against.check_adapter(made, tmp_path, (2, ("image", (1, 4, 6)), 3), ["qkv", "linear_fc2", "q_proj", "o_proj"])


def test_greedy_answers_about_images_are_those_of_transformers(tmp_path):
    """Prompts without, with one and with two images, answered together; there one by one."""
    tokenizer = against.fixtures().byte_tokenizer(tmp_path)
    tokens = {key: tokenizer.token_id(name) for key, name in MEDIA_TOKENS.items()}
    folder = published(tmp_path / "model", tokens, tokenizer.vocab_size)
    (folder / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_bytes())
    reference, generator = against.load_reference(folder), Generator(open_model(folder), slots=3, context=128)
    drawn, low, high = iter(against.fixtures().pictures(6, seed=9, largest=48)), 8 * 8, 8 * 8 * 12
    images = {str(number): [next(drawn) for _ in range(number % 3)] for number in range(5)}
    requests = [
        Request.from_prompt(
            "what is this? " * (1 + int(number) % 2),
            shown,
            id=number,
            sampling=Sampling(max_new_tokens=4 + int(number)),
            min_pixels=low,
            max_pixels=high,
        )
        for number, shown in images.items()
    ]
    half = [0.5] * 3
    processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
        size={"shortest_edge": low, "longest_edge": high}, patch_size=4, image_mean=half, image_std=half
    )

    def inputs_of(request, ids):
        inputs = dict(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == tokens["image_token_id"]).int(),
        )
        shown = images[request.id]
        return inputs | (dict(processor(images=shown, return_tensors="pt")) if shown else {})

    against.check_greedy(generator, requests, reference, inputs_of, list(generator.eos_ids))


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("qwen3-vl-30b-a3b", (2048, 48, 32, 768)),
        ("qwen3-vl-235b-a22b", (4096, 94, 64, 1536)),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, sizes):
    D, L, N, F = sizes
    text = dict(
        vocab_size=151936,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        moe_intermediate_size=F,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, tie_word_embeddings=False, vision_config=dict(out_hidden_size=D)
    )
    found = against.parameters_of(families.preset(name))
    assert found == against.parameters_in(transformers.Qwen3VLMoeForConditionalGeneration, config)
