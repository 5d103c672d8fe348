"""M-RoPE indices as integers written out by hand, ours and transformers' beside them; Ascend's own unit tests hold the
same cases.

T tokens of a sample.
"""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.vision_language.collate import collate, shape_for
from mindvl_jax.models.vision_language.example import Example
from mindvl_jax.models.vision_language.positions import rotary_positions

IMAGE, VIDEO = 1, 2


@pytest.fixture(scope="module")
def published():
    """transformers' own index; it reads the configuration only."""
    with torch.device("meta"):
        return Qwen2_5_VLModel(
            Qwen2_5_VLConfig(
                vision_config=dict(
                    depth=1,
                    hidden_size=32,
                    num_heads=2,
                    intermediate_size=32,
                    fullatt_block_indexes=[0],
                    out_hidden_size=32,
                    tokens_per_second=2,
                ),
                text_config=dict(
                    num_hidden_layers=1,
                    hidden_size=32,
                    intermediate_size=32,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    vocab_size=64,
                    rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3]),
                ),
            )
        )


def theirs(published, kinds, mask=None, images=None, videos=None, seconds=None):
    """(3, B, T) positions and the (B, 1) deltas that generation goes on with."""
    kinds = torch.tensor(kinds)

    def grids(value):
        return None if value is None else torch.tensor(value)

    return published.get_rope_index(
        torch.zeros_like(kinds),
        kinds,
        grids(images),
        grids(videos),
        second_per_grid_ts=grids(seconds),
        attention_mask=grids(mask),
    )


def ours(length, spans):
    positions = rotary_positions(length, spans, merge=2, tokens_per_second=2, mrope=True)
    return positions, int(positions.max()) + 1 - length


def test_a_video_of_two_frame_pairs_with_a_clock_of_its_own(published):
    """Grid 2 x 4 x 6 is 2 x 2 x 3 tokens; 1.0147 s at 2 a second are 2 steps: the second pair stands at 7, not 6."""
    want = np.array([
        [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7, 7, 8, 9],
        [0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 6, 5, 5, 5, 6, 6, 6, 8, 9],
        [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 7, 8, 9],
    ])  # fmt: skip
    positions, delta = ours(19, [(5, (2, 4, 6), 1.0147)])
    there, deltas = theirs(published, [[0] * 5 + [VIDEO] * 12 + [0] * 2], videos=[[2, 4, 6]], seconds=[1.0147])
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(there[:, 0].numpy(), want)
    assert delta == deltas.item() == -9


def test_a_picture_stands_at_one_moment(published):
    want = np.array([
        [0, 1, 2, 2, 2, 2, 2, 2, 4 + 1],
        [0, 1, 2, 2, 2, 3, 3, 3, 4 + 1],
        [0, 1, 2, 3, 4, 2, 3, 4, 4 + 1],
    ])  # fmt: skip
    positions, delta = ours(9, [(2, (1, 4, 6), None)])
    there, deltas = theirs(published, [[0, 0, *[IMAGE] * 6, 0]], images=[[1, 4, 6]])
    np.testing.assert_array_equal(positions, want)
    np.testing.assert_array_equal(there[:, 0].numpy(), want)
    assert delta == deltas.item() == -3


def test_text_counts_on_through_all_three_rows(published):
    positions, delta = ours(6, [])
    there, deltas = theirs(published, [[0] * 6])
    np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 4, 5]] * 3)
    np.testing.assert_array_equal(there[:, 0].numpy(), positions)
    assert delta == deltas.item() == 0


def test_padded_text_has_the_deltas_zero_and_minus_one(published):
    """Two texts side by side, the second one place shorter.

    The deltas count from the row's end, as Ascend's tests and transformers 4 have it; transformers 5 counts from the
    last real token, where they are nought.
    """
    there, deltas = theirs(published, [[0] * 5, [0] * 5], mask=[[1] * 5, [1] * 4 + [0]])
    assert deltas.flatten().tolist() == [0, 0]
    assert there[:, 1, :4].tolist() == [[0, 1, 2, 3]] * 3
    batch = collate(
        [[text_example(5)], [text_example(4)]],
        shape_for(MODEL.vision, rows=2, tokens=5, patches=4, samples=1),
        pad_id=0,
        vision=MODEL.vision,
    ).batch
    real = batch.segment_ids > 0
    assert [int(batch.positions[row].max()) + 1 - 5 for row in (0, 1)] == [0, -1]
    for row in (0, 1):
        np.testing.assert_array_equal(batch.positions[row][:, real[row]], there[:, row].numpy()[:, real[row]])


def test_left_padding_shifts_nothing_that_is_read(published):
    """transformers counts from the first real token; a packed row of ours has no left padding, so the integers are the
    same.
    """
    there, _ = theirs(published, [[0] * 5], mask=[[0, 1, 1, 1, 1]])
    assert there[0, 0, 1:].tolist() == ours(4, [])[0][0].tolist() == [0, 1, 2, 3]


MODEL = MindVLConfig(
    vision=VisionConfig(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, fullatt_block_indexes=(0,)),
    text=TextConfig(
        family="qwen3",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        rope="mrope",
        mrope_section=(1, 1, 2),
    ),
    image_token_id=60,
    video_token_id=61,
    vision_start_token_id=62,
    vision_end_token_id=63,
)


def text_example(length):
    """Text without media as the encoder hands it over."""
    none = np.zeros(0, np.int32)
    return Example(
        id="x",
        origin="",
        tokens=np.arange(length, dtype=np.int32),
        targets=np.zeros(length, np.int32),
        loss_weights=np.ones(length, np.float32),
        positions=ours(length, [])[0],
        visual_index=np.full(length, -1, np.int32),
        visuals=(),
        patch_positions=none.reshape(0, 2),
        image_lengths=none,
        window_lengths=none,
        pixels=(),
    )
