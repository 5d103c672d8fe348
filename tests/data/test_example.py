"""Encoding of conversations: ids and positions against transformers, loss masks, truncation, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_toys import encoded, model_config, picture, tokenizer
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from mindvl_jax.data.sample import Media, Message, Sample, SampleError
from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
from mindvl_jax.models.vision_language.positions import rotary_positions

MODEL = model_config()
START, END, PAD, VISION_START, VISION_END = 151644, 151645, 151655, 151652, 151653


def encoder(**limits) -> ExampleEncoder:
    return ExampleEncoder(MODEL, tokenizer(), EncodeLimits(**{"min_pixels": 784, "max_pixels": 12544, **limits}))


def sample(*turns: tuple[str, str], images: int = 0, size: tuple[int, int] = (56, 84)) -> Sample:
    media = tuple(Media(data=encoded(picture(k, *size))) for k in range(images))
    return Sample("s", tuple(Message(*turn) for turn in turns), media)


def ids_of(text: str) -> list[int]:
    """The whole text at once, control tokens recognised: how the published processor tokenizes a rendered template."""
    return tokenizer().encode(text, allow_special=True)


def test_ids_equal_the_rendered_template_encoded_at_once():
    conversation = sample(
        ("system", "Be brief."),
        ("user", "<image>\n  Name it.\n"),
        ("assistant", "Two ships,\n\nfar away."),
        ("user", "\nAnd <image> this? <image>"),
        ("assistant", "图 café 12345"),
        images=3,
    )
    picture_text = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{picture_text}\n  Name it.\n<|im_end|>\n<|im_start|>assistant\nTwo ships,\n\nfar "
        "away.<|im_end|>\n"
        f"<|im_start|>user\n\nAnd {picture_text} this? {picture_text}<|im_end|>\n<|im_start|>assistant\n图 "
        "café 12345<|im_end|>"
    )
    assert encoder().encode(conversation).tokens.tolist() == ids_of(rendered)


def test_no_system_turn_is_added():
    assert encoder().encode(sample(("user", "Hi"), ("assistant", "Ho"))).tokens.tolist() == ids_of(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"
    )


def test_tool_results_stand_in_one_user_turn_as_published():
    example = encoder().encode(
        sample(("user", "Weather?"), ("assistant", "calling"), ("tool", "rain"), ("tool", "wind"), ("assistant", "wet"))
    )
    rendered = (
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response><|im_end|>\n"
    )
    assert rendered in tokenizer().decode(example.tokens.tolist(), skip_special=False)
    tokens, expected = example.tokens.tolist(), ids_of(rendered)
    assert any(tokens[start : start + len(expected)] == expected for start in range(len(tokens)))


def learned_text(example) -> str:
    return tokenizer().decode(example.targets[example.loss_weights > 0].tolist(), skip_special=False)


TURNS = (
    ("system", "S."),
    ("user", "One? <image>"),
    ("assistant", "First answer"),
    ("user", "Two?"),
    ("assistant", "Second answer"),
)


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("answers", "First answer<|im_end|>Second answer<|im_end|>"),
        ("last_answer", "Second answer<|im_end|>"),
    ],
)
def test_answers_and_their_closing_token_are_learned(train_on, expected):
    assert learned_text(encoder(train_on=train_on).encode(sample(*TURNS, images=1))) == expected


def test_training_on_all_learns_everything_but_the_placeholders():
    example = encoder(train_on="all").encode(sample(*TURNS, images=1))
    unlearned = example.targets[:-1][example.loss_weights[:-1] == 0]
    assert unlearned.tolist() == [PAD] * 6
    np.testing.assert_array_equal(example.targets[:-1], example.tokens[1:])
    assert example.loss_weights[-1] == 0 and example.targets[-1] == 0


def test_control_tokens_that_a_user_writes_stay_text():
    spelled = "a <|im_end|> b <|image_pad|> <|vision_start|> <|endoftext|>"
    example = encoder().encode(sample(("user", spelled), ("assistant", "<|im_start|>user")))
    special = set(tokenizer().special.values())
    assert [token for token in example.tokens.tolist() if token in special] == [START, END, START, END]
    assert spelled in tokenizer().decode(example.tokens.tolist(), skip_special=False)


def test_a_placeholder_lies_where_its_merged_patches_are():
    example = encoder(max_pixels=100000).encode(
        sample(("user", "<image> and <image>"), ("assistant", "x"), images=2, size=(200, 260))
    )
    places = np.flatnonzero(example.tokens == PAD)
    np.testing.assert_array_equal(np.flatnonzero(example.visual_index >= 0), places)
    merged_position = example.patch_positions[::4] // 2  # (height, width) of each merged group, in window order
    first = len(places) // 2
    rows, columns = 7, 9
    raster = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    for half, expected_groups in ((places[:first], range(first)), (places[first:], range(first, 2 * first))):
        index = example.visual_index[half]
        assert sorted(index) == list(expected_groups)
        np.testing.assert_array_equal(merged_position[index], raster)


# --- rotary positions ---


@pytest.fixture(scope="module")
def published():
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 32,
            "tokens_per_second": 2,
        },
        text_config={
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
    )
    return Qwen2_5_VLModel(config)


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [("image", (1, 4, 6))],
        [("image", (1, 8, 4)), ("image", (1, 2, 20))],
        [("video", (2, 4, 6), 1.0147)],
        [("image", (1, 6, 6)), ("video", (5, 4, 4), 0.333333), ("image", (1, 2, 2)), ("video", (7, 2, 8), 2.9)],
        [("video", (40, 2, 2), 0.1), ("video", (3, 6, 2), 1.0)],
    ],
)
def test_positions_are_the_published_integers(published, spans):
    kinds, ours, at = [0] * 3, [], 3
    for kind, grid, *seconds in spans:
        count = grid[0] * grid[1] * grid[2] // 4
        ours.append((at, grid, seconds[0] if seconds else None))
        kinds += [1 if kind == "image" else 2] * count + [0] * 4
        at += count + 4
    ids = torch.zeros((1, len(kinds)), dtype=torch.long)

    def grids(kind):
        return (
            torch.tensor([span[1] for span in spans if span[0] == kind])
            if any(span[0] == kind for span in spans)
            else None
        )

    seconds = (
        torch.tensor([span[2] for span in spans if span[0] == "video"])
        if any(span[0] == "video" for span in spans)
        else None
    )
    expected, _ = published.get_rope_index(
        ids, torch.tensor([kinds]), grids("image"), grids("video"), second_per_grid_ts=seconds
    )
    found = rotary_positions(len(kinds), ours, merge=2, tokens_per_second=2, mrope=True)
    np.testing.assert_array_equal(found, expected[:, 0].numpy())


def test_one_dimensional_positions_count_through_everything():
    found = rotary_positions(9, [(2, (1, 4, 4), None)], merge=2, tokens_per_second=2, mrope=False)
    np.testing.assert_array_equal(found, np.tile(np.arange(9), (3, 1)))


# --- limits ---


def test_truncation_leaves_out_whole_turns_and_their_media():
    turns = [
        ("user", "<image> first"),
        ("assistant", "yes"),
        ("user", "<image> second"),
        ("assistant", "no"),
        ("user", "third <image>"),
        ("assistant", "maybe"),
    ]
    whole = encoder().encode(sample(*turns, images=3))
    for limit in range(30, whole.length + 1):
        try:
            short = encoder(max_tokens=limit).encode(sample(*turns, images=3))
        except SampleError as error:
            assert error.reason == "too_long" and limit < 20
            continue
        assert short.length <= limit
        assert short.tokens[-1] == END
        np.testing.assert_array_equal(short.tokens, whole.tokens[: short.length])
        assert (short.tokens == PAD).sum() == 6 * len(short.visuals) == short.patches // 4
        assert short.truncated == 6 - 2 * len(short.visuals)


def test_patches_over_the_budget_leave_out_turns_too():
    turns = [("user", "<image> a"), ("assistant", "b"), ("user", "<image> c"), ("assistant", "d")]
    short = encoder(max_patches=24).encode(sample(*turns, images=2))
    assert len(short.visuals) == 1 and short.truncated == 2


@pytest.mark.parametrize(
    ("turns", "images", "limits", "reason"),
    [
        ((("user", "hello"),), 0, {}, "no_answer"),
        ((), 0, {}, "no_answer"),
        ((("user", "hello"), ("assistant", "  ")), 0, {}, "empty_answer"),
        ((("assistant", "hello"),), 0, {}, "malformed"),
        (
            (("user", "a"), ("assistant", "b"), ("system", "late"), ("user", "c"), ("assistant", "d")),
            0,
            {},
            "malformed",
        ),
        ((("user", "<image>"), ("assistant", "b")), 2, {}, "media_mismatch"),
        ((("user", "<image> <image>"), ("assistant", "b")), 1, {}, "media_mismatch"),
        ((("user", "<video>"), ("assistant", "b")), 1, {}, "media_mismatch"),
        ((("user", "word " * 50), ("assistant", "b")), 0, {"max_tokens": 20}, "too_long"),
        ((("user", "<image>"), ("assistant", "b")), 1, {"max_patches": 8}, "too_many_patches"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_with_its_reason(turns, images, limits, reason):
    with pytest.raises(SampleError) as caught:
        encoder(**limits).encode(sample(*turns, images=images))
    assert caught.value.reason == reason, str(caught.value)


def test_a_prompt_ends_with_an_opened_answer_and_teaches_nothing():
    example = encoder().encode_prompt([Message("user", "What is it?")], [Media(data=encoded(picture(0)))])
    expected = ids_of(
        "<|im_start|>user\n<|vision_start|>"
        + "<|image_pad|>" * 4
        + "<|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.tokens.tolist() == expected and not example.loss_weights.any()


def test_media_tokens_that_disagree_with_the_tokenizer_are_refused():
    wrong = MODEL.model_copy(update={"image_token_id": 151656})
    with pytest.raises(
        ValueError, match="image_token_id is 151656 but the tokenizer's <|image_pad|> is 151655".replace("|", r"\|")
    ):
        ExampleEncoder(wrong, tokenizer(), EncodeLimits(min_pixels=784, max_pixels=12544))
