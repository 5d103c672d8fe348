"""Published files of LLaVA-1.5 in transformers' layout (the `-hf` folders). Imports no jax.

Folders of the original layout, whose tower lies elsewhere, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Pixels, Rule, flatten, linear, norm
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.layers.config import CLIP_MEAN, CLIP_STD
from mindvl_jax.models.llava.config import CHAT_TEMPLATE, LlavaConfig, VisionConfig

_TOWER = "vision_tower.vision_model"
_BLOCK = f"{_TOWER}.encoder.layers.{{layer}}"
# transformers 5 writes the tower without `vision_model`; published files have it.
_ALIASES = (
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
_PARTS = {
    "vision block {layer}": ("model.vision_tower.encoder.layers.{layer}",),
    "projector": ("model.multi_modal_projector",),
    **decoder_hf.PARTS,
}
_TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
"""transformers' defaults of Llama: the published files leave out what equals them."""
_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
}


def nested(name: str) -> str:
    """The published spelling of a decoder's tensor, from that of a language model alone."""
    return f"language_model.{name}"


def in_memory(name: str) -> str:
    """Published name -> name in transformers' model."""
    name = name.replace("language_model.model.", "language_model.", 1)
    name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else f"model.{name}"


def rules(config: LlavaConfig) -> list[Rule]:
    vision, ours = config.vision, "vision/blocks"
    kernel = flatten(vision.in_channels, vision.patch_size, vision.patch_size)
    attention = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output"))
    return [
        Rule(f"{_TOWER}.embeddings.patch_embedding.weight", ("vision/patch_embed/kernel",), kernel),
        Rule(f"{_TOWER}.embeddings.class_embedding", ("vision/class_token",)),
        Rule(f"{_TOWER}.embeddings.position_embedding.weight", ("vision/positions",)),
        *norm(f"{_TOWER}.pre_layrnorm", "vision/before", bias=True),  # the published spelling
        *norm(f"{_TOWER}.post_layernorm", "vision/after", bias=True),
        *norm(f"{_BLOCK}.layer_norm1", f"{ours}/norm1", bias=True),
        *norm(f"{_BLOCK}.layer_norm2", f"{ours}/norm2", bias=True),
        *(
            rule
            for theirs, part in attention
            for rule in linear(f"{_BLOCK}.self_attn.{theirs}", f"{ours}/attention/{part}", bias=True)
        ),
        *linear(f"{_BLOCK}.mlp.fc1", f"{ours}/mlp/up", bias=True),
        *linear(f"{_BLOCK}.mlp.fc2", f"{ours}/mlp/down", bias=True),
        *linear("multi_modal_projector.linear_1", "projector/linear1", bias=True),
        *linear("multi_modal_projector.linear_2", "projector/linear2", bias=True),
        *decoder_hf.spelled(decoder_hf.text_rules(config.text), nested),
    ]


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> LlavaConfig | None:
    vision, text_content = content.get("vision_config"), content.get("text_config")
    if not isinstance(vision, dict) or not isinstance(text_content, dict):
        reader.problems.append("vision_config or text_config is missing")
        return None
    reader.expect(vision, "model_type", ("clip_vision_model",), "clip_vision_model", "vision_config.")
    reader.expect(vision, "hidden_act", ("quick_gelu",), "quick_gelu", "vision_config.")
    reader.expect(text_content, "model_type", ("llama",), "llama", "text_config.")
    for key, value in (
        ("projector_hidden_act", "gelu"),
        ("vision_feature_select_strategy", "default"),
        ("multimodal_projector_bias", True),
    ):
        reader.expect(content, key, (value,), value)
    tower = {**_VISION_DEFAULTS, **vision}
    built = reader.build(
        VisionConfig,
        dict(
            depth=tower["num_hidden_layers"],
            hidden_size=tower["hidden_size"],
            intermediate_size=tower["intermediate_size"],
            num_heads=tower["num_attention_heads"],
            image_side=tower["image_size"],
            patch_size=tower["patch_size"],
            in_channels=tower["num_channels"],
            layer_norm_eps=tower["layer_norm_eps"],
            feature_layer=content.get("vision_feature_layer", -2),
            fit="pad" if content.get("image_aspect_ratio") == "pad" else "crop",
        ),
        "vision_config.",
    )
    text_content, where = decoder_hf.nested_text(content)
    text = decoder_hf.read_text(reader, {**_TEXT_DEFAULTS, **text_content}, "llama", where)
    image = content.get("image_token_index", content.get("image_token_id", 32000))
    if built is None or text is None:
        return None
    return reader.build(LlavaConfig, dict(vision=built, text=text, image_token_id=image))


def write_config(config: LlavaConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = config.vision, config.text
    content = {
        "model_type": "llava",
        **common,
        "tie_word_embeddings": text.tie_word_embeddings,
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.view_patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            **common,
            **decoder_hf.write_text(text),
            "head_dim": text.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "vision_config": dict(
            model_type="clip_vision_model",
            num_hidden_layers=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_side,
            patch_size=vision.patch_size,
            num_channels=vision.in_channels,
            layer_norm_eps=vision.layer_norm_eps,
            hidden_act="quick_gelu",
        ),
    }
    if vision.fit == "pad":
        content["image_aspect_ratio"] = "pad"
    return content


def companions(config: LlavaConfig, pixels: Pixels) -> dict[str, Any]:
    """Settings of transformers' image processor. Areas do not count: every picture has one size."""
    side = config.vision.image_side
    return {
        "preprocessor_config.json": dict(
            image_processor_type="LlavaImageProcessor",
            processor_class="LlavaProcessor",
            size=dict(shortest_edge=side),
            crop_size=dict(height=side, width=side),
            do_pad=config.vision.fit == "pad",
            do_resize=True,
            do_center_crop=True,
            do_rescale=True,
            do_normalize=True,
            do_convert_rgb=True,
            rescale_factor=1 / 255,
            resample=3,
            image_mean=list(CLIP_MEAN),
            image_std=list(CLIP_STD),
        ),
        "processor_config.json": dict(
            processor_class="LlavaProcessor",
            patch_size=config.vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
        ),
    }


MAPPING = HFMapping(
    model_types={"llava": ModelType("LLaVA-1.5", "LlavaForConditionalGeneration")},
    rules=rules,
    read_config=read_config,
    write_config=write_config,
    companions=companions,
    chat_template=CHAT_TEMPLATE,
    aliases=_ALIASES,
    in_memory=in_memory,
    ignored=("rotary_emb.inv_freq", "embeddings.position_ids"),
    tied=decoder_hf.tied_as(nested),
    reference_parts=_PARTS,
)
