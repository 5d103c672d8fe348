"""Shared by the published files of the Qwen-VL line: media tokens, image processor settings, names of the merger.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.models.hf import Pixels, Rule, linear
from mindvl_jax.models.layers import decoder_hf

TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
"""Published ids, which some config.json leave out."""
ALIASES = (("model.visual.", "visual."), *decoder_hf.ALIASES)

TOWERS = ("model.visual", "visual")
PARTS: dict[str, tuple[str, ...]] = {
    "vision patch_embed": tuple(f"{path}.patch_embed" for path in TOWERS),
    "vision block {layer}": tuple(f"{path}.blocks.{{layer}}" for path in TOWERS),
    "projector": tuple(f"{path}.merger" for path in TOWERS),
    **decoder_hf.PARTS,
}


def in_memory(name: str) -> str:
    """Published name of a module -> its name in transformers' model."""
    if name.startswith("visual."):
        return "model." + name
    return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name


def attention_rules(block: str, ours: str) -> list[Rule]:
    """Attention of a tower block: q, k and v in one tensor, one after another."""
    qkv = tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value"))
    rules = linear(f"{block}.attn.qkv", "", bias=True)
    kernel, bias = (Rule(rule.published, tuple(f"{part}{rule.ours[0]}" for part in qkv), rule.form) for rule in rules)
    return [kernel, bias, *linear(f"{block}.attn.proj", f"{ours}/attention/output", bias=True)]


def merger_rules(prefix: str) -> list[Rule]:
    """The two linear layers of the merger, our projector."""
    return [
        *linear(f"{prefix}.merger.mlp.0", "projector/linear1", bias=True),
        *linear(f"{prefix}.merger.mlp.2", "projector/linear2", bias=True),
    ]


def read_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    return {key: content.get(key, default) for key, default in TOKENS.items()}


def processor_files(
    vision: PatchGeometry,
    pixels: Pixels,
    processor: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    video: str = "Qwen2VLVideoProcessor",
) -> dict[str, Any]:
    """Settings of transformers' image and video processors.

    Args:
      processor: transformers' processor class of the family. video: its class for videos.
    """
    shared = dict(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=True,
        rescale_factor=1 / 255,
        image_mean=list(mean),
        image_std=list(std),
        resample=3,
        size={"shortest_edge": pixels.low, "longest_edge": pixels.high},
    )
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": processor,
            **shared,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": video,
            "processor_class": processor,
            **shared,
        },
    }
