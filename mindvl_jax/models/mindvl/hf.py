"""Published files of MindVL and Qwen2.5-VL. Imports no jax.

MindVL's own layout is Qwen2.5-VL's tower beside its decoder's tensors; `model_type: mindvl` where transformers has no
class for the pairing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Pixels, Rule, flatten, linear, norm
from mindvl_jax.models.layers import decoder_hf, qwen_vl_hf
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD, TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.qwen.config import QwenConfig
from mindvl_jax.models.spec import Named


def vision_rules(vision: VisionConfig, prefix: str = "visual") -> list[Rule]:
    """Vision tower and projector."""
    block, ours = prefix + ".blocks.{layer}", "vision/blocks"
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    return [
        Rule(f"{prefix}.patch_embed.proj.weight", ("vision/patch_embed/kernel",), flatten(*kernel)),
        *norm(f"{block}.norm1", f"{ours}/norm1"),
        *norm(f"{block}.norm2", f"{ours}/norm2"),
        *qwen_vl_hf.attention_rules(block, ours),
        *(
            rule
            for part in ("gate", "up", "down")
            for rule in linear(f"{block}.mlp.{part}_proj", f"{ours}/mlp/{part}", bias=True)
        ),
        *norm(f"{prefix}.merger.ln_q", "projector/norm"),
        *qwen_vl_hf.merger_rules(prefix),
    ]


def _read_vision(reader: ConfigReader, content: Mapping[str, Any]) -> VisionConfig | None:
    where = "vision_config."
    reader.expect(content, "hidden_act", ("silu",), "silu", where)
    rope = content.get("rope_parameters") or {}
    values = dict(
        depth=content.get("depth"),
        hidden_size=content.get("hidden_size"),
        intermediate_size=content.get("intermediate_size"),
        num_heads=content.get("num_heads"),
        patch_size=content.get("patch_size", content.get("spatial_patch_size", 14)),
        temporal_patch_size=content.get("temporal_patch_size", 2),
        spatial_merge_size=content.get("spatial_merge_size", 2),
        in_channels=content.get("in_channels", content.get("in_chans", 3)),
        window_size=content.get("window_size", 112),
        fullatt_block_indexes=tuple(content.get("fullatt_block_indexes", (7, 15, 23, 31))),
        tokens_per_second=content.get("tokens_per_second", 4),
        rope_theta=rope.get("rope_theta", 10000.0),
        rms_norm_eps=content.get("rms_norm_eps", 1e-6),
    )
    return reader.build(VisionConfig, values, where)


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> MindVLConfig | None:
    text_content, where = decoder_hf.nested_text(content)
    if not isinstance(content.get("vision_config"), dict):
        reader.problems.append("vision_config is missing")
        return None
    decoder, mrope = "qwen2", True
    if content["model_type"] == "mindvl":
        decoder = text_content.get("model_type")
        if decoder not in ("qwen2", "qwen3"):
            reader.problems.append(f"text_config.model_type is {decoder!r}; supported: 'qwen2', 'qwen3'")
            return None
        mrope = (text_content.get("rope_parameters") or {}).get("mrope_section") is not None
    vision = _read_vision(reader, content["vision_config"])
    text = decoder_hf.read_text(reader, text_content, decoder, where, mrope=mrope)
    if vision is None or text is None:
        return None
    out = content["vision_config"].get("out_hidden_size", text.hidden_size)
    if out != text.hidden_size:
        reader.problems.append(
            f"vision_config.out_hidden_size is {out}, but the language model's hidden_size is {text.hidden_size}"
        )
    return reader.build(MindVLConfig, dict(vision=vision, text=text, **qwen_vl_hf.read_tokens(content)))


def model_type(config: MindVLConfig) -> str:
    """Transformers' own name where transformers has the model, else `mindvl`."""
    text = config.text
    published = text.family == "qwen2" and text.rope == "mrope" and text.num_heads * text.head_dim == text.hidden_size
    return "qwen2_5_vl" if published else "mindvl"


def write_config(config: MindVLConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    kind, vision = model_type(config), config.vision
    return {
        "model_type": kind,
        **common,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **{key: getattr(config, key) for key in qwen_vl_hf.TOKENS},
        "text_config": {
            "model_type": "qwen2_5_vl_text" if kind == "qwen2_5_vl" else config.text.family,
            **common,
            **decoder_hf.write_text(config.text),
        },
        "vision_config": dict(
            model_type="qwen2_5_vl_vision",
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_heads=vision.num_heads,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            fullatt_block_indexes=list(vision.fullatt_block_indexes),
            tokens_per_second=vision.tokens_per_second,
            out_hidden_size=config.text.hidden_size,
            hidden_act="silu",
            rope_parameters={"rope_type": "axial", "rope_theta": vision.rope_theta},
        ),
    }


def companions(config: MindVLConfig, pixels: Pixels) -> dict[str, Any]:
    return qwen_vl_hf.processor_files(config.vision, pixels, "Qwen2_5_VLProcessor", CLIP_MEAN, CLIP_STD)


_SECTION_SHARES = (16, 24, 24)  # of 64 frequencies: the published split of M-RoPE


def assemble(tower: MindVLConfig, decoder: QwenConfig, *, mrope: bool) -> MindVLConfig:
    """The tower with another decoder.

    Args:
      mrope: whether the decoder counts positions in three sections (as the nearest public pairing does) or in one.

    Raises:
      UserError: a head dim that the published sections cannot be scaled to, or a vocabulary without the tokens that
        mark media.
    """
    text = decoder.text
    largest = max(getattr(tower, key) for key in qwen_vl_hf.TOKENS)
    if largest >= text.vocab_size:
        raise UserError(
            f"the tower's model uses token {largest} as a mark of media, but the language model has a "
            f"vocabulary of {text.vocab_size}"
        )
    sections = None
    if mrope:
        half = text.head_dim // 2
        if half % 8:
            raise UserError(
                f"head_dim {text.head_dim} cannot be split into M-RoPE sections in the published shares "
                "16:24:24; use one-dimensional positions"
            )
        sections = tuple(share * half // 64 for share in _SECTION_SHARES)
    text = TextConfig(**{**text.model_dump(), "rope": "mrope" if mrope else "1d", "mrope_section": sections})
    return tower.model_copy(update=dict(text=text))


MAPPING = HFMapping(
    model_types={
        "qwen2_5_vl": ModelType("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration"),
        "mindvl": ModelType("MindVL", "MindVLForConditionalGeneration", in_transformers=False),
    },
    rules=lambda config: vision_rules(config.vision) + decoder_hf.text_rules(config.text),
    read_config=read_config,
    write_config=write_config,
    chat_template=decoder_hf.CHAT_TEMPLATE,
    companions=companions,
    aliases=qwen_vl_hf.ALIASES,
    in_memory=qwen_vl_hf.in_memory,
    tied=decoder_hf.tied,
    assemble=assemble,
    reference=Named("mindvl_jax.models.mindvl.reference:load"),
    reference_parts=qwen_vl_hf.PARTS,
)
