"""Published files of InternVL in transformers' layout (the `-hf` folders). Imports no jax.

Folders of the original layout (`internvl_chat`) are not read. The ids of `<img>` and `</img>` stand in no config.json:
they are the two before `<IMG_CONTEXT>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Pixels, Reshaped, Rule, flatten, linear, norm
from mindvl_jax.models.internvl.config import InternVLConfig, VisionConfig
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.layers.config import IMAGENET_MEAN, IMAGENET_STD

_CONTEXT = "<IMG_CONTEXT>"
_MAX_TILES = 12
_BLOCK = "vision_tower.encoder.layer.{layer}"
_ALIASES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_PARTS = {
    "vision block {layer}": ("model." + _BLOCK,),
    "projector": ("model.multi_modal_projector",),
    **decoder_hf.PARTS,
}
# The processor writes the borders and as many placeholders as the picture has.
_TEMPLATE = decoder_hf.CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", _CONTEXT).replace(
    "<|vision_start|><|video_pad|><|vision_end|>", "<video>"
)


def nested(name: str) -> str:
    """The published spelling of a decoder's tensor, from that of a language model alone."""
    return f"language_model.{name}"


def in_memory(name: str) -> str:
    """Published name -> name in transformers' model."""
    name = name.replace("language_model.model.", "language_model.", 1)
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else f"model.{name}"


def rules(config: InternVLConfig) -> list[Rule]:
    vision, ours, embeddings = config.vision, "vision/blocks", "vision_tower.embeddings"
    width, with_bias = vision.hidden_size, vision.norm == "layer"
    patch = linear(f"{embeddings}.patch_embeddings.projection", "vision/patch_embed", bias=True)
    kernel = flatten(vision.in_channels, vision.patch_size, vision.patch_size)
    text = decoder_hf.text_rules(config.text)
    found = [
        dataclasses.replace(patch[0], form=kernel),
        patch[1],
        Rule(f"{embeddings}.cls_token", ("vision/class_token",), Reshaped((1, 1, width))),
        Rule(f"{embeddings}.position_embeddings", ("vision/positions",), Reshaped((1, vision.view_patches + 1, width))),
        Rule(f"{_BLOCK}.lambda_1", (f"{ours}/scale1",)),
        Rule(f"{_BLOCK}.lambda_2", (f"{ours}/scale2",)),
        *norm(f"{_BLOCK}.layernorm_before", f"{ours}/norm1", bias=with_bias),
        *norm(f"{_BLOCK}.layernorm_after", f"{ours}/norm2", bias=with_bias),
        *(
            rule
            for short, part in (("q", "query"), ("k", "key"), ("v", "value"))
            for rule in linear(
                f"{_BLOCK}.attention.{short}_proj", f"{ours}/attention/{part}", bias=vision.attention_bias
            )
        ),
        *linear(f"{_BLOCK}.attention.projection_layer", f"{ours}/attention/output", bias=True),
        *linear(f"{_BLOCK}.mlp.fc1", f"{ours}/mlp/up", bias=True),
        *linear(f"{_BLOCK}.mlp.fc2", f"{ours}/mlp/down", bias=True),
        *norm("multi_modal_projector.layer_norm", "projector/norm", bias=True),
        *linear("multi_modal_projector.linear_1", "projector/linear1", bias=True),
        *linear("multi_modal_projector.linear_2", "projector/linear2", bias=True),
        *decoder_hf.spelled(text, nested),
    ]
    if vision.qk_norm:
        found += norm(f"{_BLOCK}.attention.q_norm", f"{ours}/attention/query_norm")
        found += norm(f"{_BLOCK}.attention.k_norm", f"{ours}/attention/key_norm")
    return found


def _side(reader: ConfigReader, vision: Mapping[str, Any], key: str, default: int) -> int | None:
    """A size that the files give twice, for height and width."""
    value = vision.get(key, default)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            reader.problems.append(f"vision_config.{key} is {value}; supported are squares")
        value = value[0] if value else None
    return value


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> InternVLConfig | None:
    vision = content.get("vision_config")
    if not isinstance(vision, dict) or not isinstance(content.get("text_config"), dict):
        reader.problems.append("vision_config or text_config is missing")
        return None
    for key, value in (("hidden_act", "gelu"), ("use_mask_token", False), ("use_absolute_position_embeddings", True)):
        reader.expect(vision, key, (value,), value, "vision_config.")
    reader.expect(vision, "use_mean_pooling", (True,), True, "vision_config.")  # else a norm after the last block
    reader.expect(vision, "norm_type", ("layer_norm", "rms_norm"), "layer_norm", "vision_config.")
    for key, value in (
        ("downsample_ratio", 0.5),
        ("projector_hidden_act", "gelu"),
        ("vision_feature_layer", -1),
        ("vision_feature_select_strategy", "default"),
    ):
        reader.expect(content, key, (value,), value)
    tower = reader.build(
        VisionConfig,
        dict(
            depth=vision.get("num_hidden_layers", 24),
            hidden_size=vision.get("hidden_size", 1024),
            intermediate_size=vision.get("intermediate_size", 4096),
            num_heads=vision.get("num_attention_heads", 16),
            norm="rms" if vision.get("norm_type") == "rms_norm" else "layer",
            qk_norm=bool(vision.get("use_qk_norm", False)),
            attention_bias=bool(vision.get("attention_bias", False)),
            image_side=_side(reader, vision, "image_size", 448),
            patch_size=_side(reader, vision, "patch_size", 14),
            in_channels=vision.get("num_channels", 3),
            layer_norm_eps=vision.get("layer_norm_eps", 1e-6),
            max_tiles=content.get("max_dynamic_patch", _MAX_TILES),
        ),
        "vision_config.",
    )
    text_content, where = decoder_hf.nested_text(content)
    reader.expect(text_content, "model_type", ("qwen2", "qwen3"), "qwen2", where)
    family = text_content.get("model_type", "qwen2")
    text = None
    if family in ("qwen2", "qwen3"):
        text = decoder_hf.read_text(reader, text_content, family, where, dynamic=True)
    image = content.get("image_token_id", 151667)
    if tower is None or text is None or not isinstance(image, int):
        return None
    ids = dict(
        image_token_id=image, video_token_id=image, vision_start_token_id=image - 2, vision_end_token_id=image - 1
    )
    return reader.build(InternVLConfig, dict(vision=tower, text=text, **ids))


def write_config(config: InternVLConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = config.vision, config.text
    side = [vision.image_side] * 2
    content = {
        "model_type": "internvl",
        **common,
        "tie_word_embeddings": text.tie_word_embeddings,
        "image_token_id": config.image_token_id,
        "image_seq_length": vision.view_patches // vision.merge_unit,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "text_config": {"model_type": text.family, **common, **decoder_hf.write_text(text)},
        "vision_config": dict(
            model_type="internvl_vision",
            num_hidden_layers=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_attention_heads=vision.num_heads,
            norm_type="rms_norm" if vision.norm == "rms" else "layer_norm",
            use_qk_norm=vision.qk_norm,
            attention_bias=vision.attention_bias,
            image_size=side,
            patch_size=[vision.patch_size] * 2,
            num_channels=vision.in_channels,
            layer_norm_eps=vision.layer_norm_eps,
            hidden_act="gelu",
            use_mask_token=False,
            use_absolute_position_embeddings=True,
            use_mean_pooling=True,
        ),
    }
    if vision.max_tiles != _MAX_TILES:
        content["max_dynamic_patch"] = vision.max_tiles
    return content


def companions(config: InternVLConfig, pixels: Pixels) -> dict[str, Any]:
    """Settings of transformers' image processor. Areas do not count: every tile has one size."""
    side = config.vision.image_side
    return {
        "preprocessor_config.json": dict(
            image_processor_type="GotOcr2ImageProcessor",
            processor_class="InternVLProcessor",
            size=dict(height=side, width=side),
            crop_to_patches=True,
            min_patches=1,
            max_patches=config.vision.max_tiles,
            do_resize=True,
            do_rescale=True,
            do_normalize=True,
            do_convert_rgb=True,
            rescale_factor=1 / 255,
            resample=3,
            image_mean=list(IMAGENET_MEAN),
            image_std=list(IMAGENET_STD),
        )
    }


MAPPING = HFMapping(
    model_types={"internvl": ModelType("InternVL", "InternVLForConditionalGeneration")},
    rules=rules,
    read_config=read_config,
    write_config=write_config,
    companions=companions,
    chat_template=_TEMPLATE,
    aliases=_ALIASES,
    in_memory=in_memory,
    tied=decoder_hf.tied_as(nested),
    reference_parts=_PARTS,
)
