"""A whole run of each family on XLA: samples read, packed and learned for a few steps, text alone with them."""

import json

import numpy as np
import pytest

from mindvl_jax.config import loader
from mindvl_jax.training.trainer import train
from tests.training.conftest import PHASE, SPECIAL, write_data, write_tokenizer

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    tie_word_embeddings=False,
)
VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2)
# Family, model, names of the control tokens in place of Qwen's, room of a row. Pictures have 28 to 56 pixels a side.
FAMILIES = {
    "qwen3_vl": (
        dict(
            vision=dict(VISION, patch_size=14, table_side=6, deepstack_blocks=[0]),
            text=dict(TEXT, family="qwen3", rope="mrope", mrope_section=[2, 1, 1], mrope_interleaved=True),
        ),
        {},
        64,
    ),
    "internvl": (
        dict(vision=dict(VISION, image_side=28, patch_size=7, max_tiles=4), text=dict(TEXT, family="qwen2", rope="1d")),
        {"<|vision_start|>": "<img>", "<|vision_end|>": "</img>", "<|image_pad|>": "<IMG_CONTEXT>"},
        160,
    ),
    "llava": (
        dict(vision=dict(VISION, image_side=28, patch_size=7), text=dict(TEXT, family="llama", rope="1d")),
        {"<|im_start|>": "<s>", "<|im_end|>": "</s>", "<|image_pad|>": "<image>"},
        64,
    ),
    "janus": (
        dict(vision=dict(VISION, image_side=28, patch_size=7), text=dict(TEXT, family="llama", rope="1d")),
        {
            "<|im_start|>": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
            "<|im_end|>": "<\uff5cend\u2581of\u2581sentence\uff5c>",
            "<|vision_start|>": "<begin_of_image>",
            "<|vision_end|>": "<end_of_image>",
            "<|image_pad|>": "<image_placeholder>",
        },
        64,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_reads_packs_and_learns(tmp_path, family):
    model, renamed, patches = FAMILIES[family]
    write_tokenizer(tmp_path)
    write_data(tmp_path, count=32)
    file = tmp_path / "tokenizer.json"
    text = file.read_text()
    for ours, theirs in renamed.items():
        text = text.replace(ours, theirs)
    file.write_text(text)
    names = [renamed.get(name, name) for name in SPECIAL]
    token = {name: 256 + number for number, name in enumerate(names)}
    if family in ("llava", "janus"):
        special = {"eos_token": renamed["<|im_end|>"], "pad_token": "<|endoftext|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    ids = dict(image_token_id=token[renamed.get("<|image_pad|>", "<|image_pad|>")])
    if family != "llava":
        borders = (renamed.get(f"<|vision_{end}|>", f"<|vision_{end}|>") for end in ("start", "end"))
        ids |= dict(
            zip(("vision_start_token_id", "vision_end_token_id"), (token[name] for name in borders), strict=True)
        )
    if family in ("qwen3_vl", "internvl"):
        ids["video_token_id"] = token["<|video_pad|>"] if family == "qwen3_vl" else ids["image_token_id"]
    model = dict(model, text=dict(model["text"], vocab_size=256 + len(SPECIAL)))
    # LLaVA's system text takes 137 bytes of each sample, Janus' 218.
    length = 512 if family == "janus" else 256
    phase = dict(PHASE, name="all", steps=5, patches_per_row=patches, sequence_length=length, rows=2)
    config = loader.from_mapping(
        {
            "run": {"dir": str(tmp_path / "run"), "seed": 1},
            "model": {"family": family, "compute_dtype": "float32", **ids, **model},
            "tokenizer": {"path": str(file)},
            "data": {"sources": {"squares": {"path": str(tmp_path / "squares.parquet"), "format": "parquet"}}},
            "training": {"phases": [phase]},
            "logging": {"tensorboard": False},
            "mesh": {"data": 1},
        }
    )
    assert train(config).finished
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and np.isfinite(losses).all() and losses[-1] < 0.95 * losses[0], losses
    assert sum(line["patches"] for line in lines if "patches" in line) > 0  # a step may have texts alone
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
