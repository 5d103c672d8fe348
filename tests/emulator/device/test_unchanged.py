"""Code not written for the emulator: a transformers Qwen2.5-VL with random weights, trained the usual way."""

import copy

import pytest
import torch
import torch_npu  # noqa: F401  (a broken installation fails here; nothing is skipped)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import npu_bridge.emulator as emulator

VOCABULARY, IMAGE, START, END, GRID = 160, 155, 156, 157, (1, 4, 6)


def tiny(attention):
    torch.manual_seed(0)
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        window_size=56,
        fullatt_block_indexes=[1],
        in_channels=3,
    )
    text = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_scaling=dict(type="mrope", mrope_section=[2, 2, 2]),
        max_position_embeddings=128,
    )
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=158,
    )
    config._attn_implementation = attention
    return Qwen2_5_VLForConditionalGeneration(config)


def inputs():
    """Two rows: an image of 24 patches (6 visual tokens) and text, the second row shorter and padded."""
    generator = torch.Generator().manual_seed(1)

    def row(n):
        return [START, *[IMAGE] * 6, END, *torch.randint(0, 150, (n,), generator=generator).tolist()]

    ids = torch.tensor([row(10), row(7) + [0, 0, 0]])
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill((mask == 0) | (ids >= 150), -100)
    return dict(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.randn(48, 3 * 2 * 14 * 14, generator=generator),
        image_grid_thw=torch.tensor([GRID, GRID]),
    )


def train(model, device, steps=3):
    model = copy.deepcopy(model).to(device).train()
    batch = {name: value.to(device) for name, value in inputs().items()}
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        loss = model(**batch).loss
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_qwen2_5_vl_of_transformers_trains_as_on_the_cpu(attention, record_property):
    model = tiny(attention)
    wanted = train(model, "cpu")
    with emulator.count() as counts:
        got = train(model, "npu")
    # float32 on both sides; Adam divides by small second moments, which widens roundings of the first step's gradients.
    worst = max(max(abs(a - b) / b, abs(n - m) / m / 10) for (a, n), (b, m) in zip(got, wanted))
    record_property("difference", f"{worst:.1e}")
    record_property("kernels of three steps", sum(counts.kernels.values()))
    assert worst <= 1e-5, f"losses or a tenth of gradient norms differ by {worst:.2e}: {got} and {wanted}"
