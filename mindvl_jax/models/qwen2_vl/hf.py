"""Published files of Qwen2-VL. Imports no jax.

The names of two sizes differ from Qwen2.5-VL: `vision_config.embed_dim` is the tower's width and `hidden_size` the
language model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Pixels, Rule, flatten, linear, norm
from mindvl_jax.models.layers import decoder_hf, qwen_vl_hf
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig

_EPS = 1e-6  # of every LayerNorm; not in the published file
# transformers' defaults of the decoder's keys, which its own files may leave out.
_TEXT_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6}


def rules(config: Qwen2VLConfig) -> list[Rule]:
    vision, block, ours = config.vision, "visual.blocks.{layer}", "vision/blocks"
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return [
        Rule("visual.patch_embed.proj.weight", ("vision/patch_embed/kernel",), flatten(*kernel)),
        *norm(f"{block}.norm1", f"{ours}/norm1", bias=True),
        *norm(f"{block}.norm2", f"{ours}/norm2", bias=True),
        *qwen_vl_hf.attention_rules(block, ours),
        *linear(f"{block}.mlp.fc1", f"{ours}/mlp/up", bias=True),
        *linear(f"{block}.mlp.fc2", f"{ours}/mlp/down", bias=True),
        *norm("visual.merger.ln_q", "projector/norm", bias=True),
        *qwen_vl_hf.merger_rules("visual"),
        *decoder_hf.text_rules(config.text),
    ]


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> Qwen2VLConfig | None:
    text_content, where = decoder_hf.nested_text(content)
    vision = content.get("vision_config")
    if not isinstance(vision, dict):
        reader.problems.append("vision_config is missing")
        return None
    reader.expect(vision, "hidden_act", ("quick_gelu",), "quick_gelu", "vision_config.")
    width, ratio = vision.get("embed_dim", 1280), vision.get("mlp_ratio", 4)
    rope = vision.get("rope_parameters") or {}
    values = dict(
        depth=vision.get("depth", 32),
        hidden_size=width,
        num_heads=vision.get("num_heads", 16),
        patch_size=vision.get("patch_size", vision.get("spatial_patch_size", 14)),
        intermediate_size=int(width * ratio) if isinstance(width, int) and isinstance(ratio, (int, float)) else None,
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        spatial_merge_size=vision.get("spatial_merge_size", 2),
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        rope_theta=rope.get("rope_theta", 10000.0),
        layer_norm_eps=_EPS,
    )
    tower = reader.build(VisionConfig, values, "vision_config.")
    text = decoder_hf.read_text(reader, {**_TEXT_DEFAULTS, **text_content}, "qwen2", where, mrope=True)
    if tower is None or text is None:
        return None
    out = vision.get("hidden_size", text.hidden_size)
    if out != text.hidden_size:
        reader.problems.append(
            f"vision_config.hidden_size is {out}, but the language model's hidden_size is {text.hidden_size}"
        )
    return reader.build(Qwen2VLConfig, dict(vision=tower, text=text, **qwen_vl_hf.read_tokens(content)))


def write_config(config: Qwen2VLConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    vision = config.vision
    return {
        "model_type": "qwen2_vl",
        **common,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **{key: getattr(config, key) for key in qwen_vl_hf.TOKENS},
        "text_config": {"model_type": "qwen2_vl_text", **common, **decoder_hf.write_text(config.text)},
        "vision_config": dict(
            model_type="qwen2_vl_vision",
            depth=vision.depth,
            embed_dim=vision.hidden_size,
            hidden_size=config.text.hidden_size,
            hidden_act="quick_gelu",
            mlp_ratio=_ratio(vision),
            num_heads=vision.num_heads,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            rope_parameters={"rope_type": "axial", "rope_theta": vision.rope_theta},
        ),
    }


def _ratio(vision: VisionConfig) -> int | float:
    ratio = vision.intermediate_size / vision.hidden_size
    return int(ratio) if ratio.is_integer() else ratio


def companions(config: Qwen2VLConfig, pixels: Pixels) -> dict[str, Any]:
    return qwen_vl_hf.processor_files(config.vision, pixels, "Qwen2VLProcessor", CLIP_MEAN, CLIP_STD)


MAPPING = HFMapping(
    model_types={"qwen2_vl": ModelType("Qwen2-VL", "Qwen2VLForConditionalGeneration")},
    rules=rules,
    read_config=read_config,
    write_config=write_config,
    companions=companions,
    chat_template=decoder_hf.CHAT_TEMPLATE,
    aliases=qwen_vl_hf.ALIASES,
    in_memory=qwen_vl_hf.in_memory,
    tied=decoder_hf.tied,
    reference_parts=qwen_vl_hf.PARTS,
)
