"""Published files of Qwen3-VL. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Pixels, Rule, flatten, linear, norm
from mindvl_jax.models.layers import decoder_hf, qwen_vl_hf
from mindvl_jax.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig

_STATISTICS = (0.5, 0.5, 0.5)
# transformers' defaults of the decoder's keys, which its own files may leave out.
TEXT_DEFAULTS = {"rope_theta": 5e5, "max_position_embeddings": 128000}
SECTIONS = (24, 20, 20)
# Spellings without the outer model, and of language models saved alone.
ALIASES = (
    ("visual.", "model.visual."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
PARTS = {
    **qwen_vl_hf.PARTS,
    "projector deepstack {layer}": tuple(f"{tower}.deepstack_merger_list.{{layer}}" for tower in qwen_vl_hf.TOWERS),
}


def nested(name: str) -> str:
    """The published spelling of a decoder's tensor, from that of a language model alone."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def vision_rules(vision: VisionConfig) -> list[Rule]:
    tower, block, ours = "model.visual", "model.visual.blocks.{layer}", "vision/blocks"
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    patch = linear(f"{tower}.patch_embed.proj", "vision/patch_embed", bias=True)
    deep = (f"{tower}.deepstack_merger_list.{{layer}}", "projector/deepstack")
    return [
        dataclasses.replace(patch[0], form=flatten(*kernel)),
        patch[1],
        Rule(f"{tower}.pos_embed.weight", ("vision/position_table/embedding",)),
        *norm(f"{block}.norm1", f"{ours}/norm1", bias=True),
        *norm(f"{block}.norm2", f"{ours}/norm2", bias=True),
        *qwen_vl_hf.attention_rules(block, ours),
        *linear(f"{block}.mlp.linear_fc1", f"{ours}/mlp/up", bias=True),
        *linear(f"{block}.mlp.linear_fc2", f"{ours}/mlp/down", bias=True),
        *(
            rule
            for published, projector in ((f"{tower}.merger", "projector"), deep)
            for rule in (
                *norm(f"{published}.norm", f"{projector}/norm", bias=True),
                *linear(f"{published}.linear_fc1", f"{projector}/linear1", bias=True),
                *linear(f"{published}.linear_fc2", f"{projector}/linear2", bias=True),
            )
        ),
    ]


def with_vision(vision: VisionConfig, text: Sequence[Rule]) -> list[Rule]:
    """Rules of the whole model, from those of a language model alone."""
    return [*vision_rules(vision), *decoder_hf.spelled(text, nested)]


def read_vision(content: Mapping[str, Any], reader: ConfigReader, out: int | None) -> VisionConfig | None:
    """The tower of config.json. `out` is the language model's width."""
    vision = content.get("vision_config")
    if not isinstance(vision, dict):
        reader.problems.append("vision_config is missing")
        return None
    reader.expect(vision, "hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh", "vision_config.")
    if out is not None:
        reader.expect(vision, "out_hidden_size", (out,), 3584, "vision_config.")
    places = vision.get("num_position_embeddings", 2304)
    side = math.isqrt(places)
    if side * side != places:
        reader.problems.append(f"vision_config.num_position_embeddings is {places}, which is no square")
    rope = vision.get("rope_parameters") or {}
    values = dict(
        depth=vision.get("depth", 27),
        hidden_size=vision.get("hidden_size", 1152),
        intermediate_size=vision.get("intermediate_size", 4304),
        num_heads=vision.get("num_heads", 16),
        table_side=side,
        deepstack_blocks=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))),
        rope_theta=rope.get("rope_theta", 10000.0),
    )
    shape = dict(patch_size=16, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
    values |= {key: vision.get(key, default) for key, default in shape.items()}
    return reader.build(VisionConfig, values, "vision_config.")


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> Qwen3VLConfig | None:
    text_content, where = decoder_hf.nested_text(content)
    text_content = {**TEXT_DEFAULTS, **text_content}
    text = decoder_hf.read_text(reader, text_content, "qwen3", where, mrope=True, sections=SECTIONS, interleaved=True)
    vision = read_vision(content, reader, text and text.hidden_size)
    if vision is None or text is None:
        return None
    return reader.build(Qwen3VLConfig, dict(vision=vision, text=text, **qwen_vl_hf.read_tokens(content)))


def write_parts(config: Qwen3VLConfig, kind: str, common: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json. `kind` is its model_type, `text` the decoder's keys."""
    vision = config.vision
    return {
        "model_type": kind,
        **common,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **{key: getattr(config, key) for key in qwen_vl_hf.TOKENS},
        "text_config": {"model_type": f"{kind}_text", **common, **text},
        "vision_config": dict(
            model_type=f"{kind}_vision",
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            out_hidden_size=config.text.hidden_size,
            intermediate_size=vision.intermediate_size,
            hidden_act="gelu_pytorch_tanh",
            num_heads=vision.num_heads,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            num_position_embeddings=vision.table_side**2,
            deepstack_visual_indexes=list(vision.deepstack_blocks),
            rope_parameters={"rope_type": "axial", "rope_theta": vision.rope_theta},
        ),
    }


def write_config(config: Qwen3VLConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    return write_parts(config, "qwen3_vl", common, decoder_hf.write_text(config.text))


def companions(config: Qwen3VLConfig, pixels: Pixels) -> dict[str, Any]:
    """A video's areas are of all its frames together in transformers; ours are of one frame."""
    return qwen_vl_hf.processor_files(
        config.vision, pixels, "Qwen3VLProcessor", _STATISTICS, _STATISTICS, video="Qwen3VLVideoProcessor"
    )


MAPPING = HFMapping(
    model_types={"qwen3_vl": ModelType("Qwen3-VL", "Qwen3VLForConditionalGeneration")},
    rules=lambda config: with_vision(config.vision, decoder_hf.text_rules(config.text)),
    read_config=read_config,
    write_config=write_config,
    companions=companions,
    chat_template=decoder_hf.CHAT_TEMPLATE,
    aliases=ALIASES,
    tied=decoder_hf.tied_as(nested),
    reference_parts=PARTS,
)
