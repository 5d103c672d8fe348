"""Qwen3-VL with a routed decoder against transformers: what differs from the dense sizes."""

import pytest
import transformers
from safetensors.torch import load_file, save_file

from mindvl_jax.config import families
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    text = dict(
        vocab_size=96,
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
        tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True),
    )
    tokens = dict(image_token_id=92, video_token_id=93, vision_start_token_id=90, vision_end_token_id=91)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=VISION, tie_word_embeddings=False, **tokens)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    folder = against.publish(model, tmp_path_factory.mktemp("qwen3-vl-moe"))
    # transformers 5 writes experts outputs first and reads both orders; the released files hold inputs first.
    file = folder / "model.safetensors"
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return against.opened(folder)


def test_logits_and_gradients_of_packed_images_and_videos_equal_those_of_transformers(made):
    shapes = [(3, ("image", (1, 4, 6)), 5), (2, ("video", (2, 4, 4), 1.5), 4), (7,)]
    compared = against.compare(made, shapes, [[0, 2], [1]], tokens=48, patches=36)
    compared.check_logits()
    compared.check_gradients(made)


def test_a_folder_comes_back_with_the_same_bytes_and_opens_in_transformers(made, tmp_path):
    against.check_round_trip(made.folder, tmp_path / "out", "qwen3_vl_moe")


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
