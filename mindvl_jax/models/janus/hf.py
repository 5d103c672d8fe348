"""Published files of Janus-Pro in transformers' layout. Imports no jax.

Folders of the original layout (`multi_modality`) are not read. The parts that draw (VQ codes and what serves them) are
left out: what is written has the understanding half, and transformers fills the rest with random numbers. The ids of
the borders stand in no published config.json; for a tokenizer that has others, add them there as
`vision_start_token_id` and `vision_end_token_id`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Pixels, Rule, flatten, linear, norm
from mindvl_jax.models.janus.config import CHAT_TEMPLATE, JanusConfig, VisionConfig
from mindvl_jax.models.janus.presets import BORDERS
from mindvl_jax.models.layers import decoder_hf
from mindvl_jax.models.layers.config import HALF

_TOWER = "model.vision_model"
_BLOCK = f"{_TOWER}.encoder.layers.{{layer}}"
_PARTS = {
    "vision block {layer}": (_BLOCK,),
    "projector": ("model.aligner",),
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
"""transformers' defaults of Llama: files leave out what equals them."""
_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 384,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4.0,
    "attention_bias": True,
    "projection_dim": 2048,
}


def nested(name: str) -> str:
    """The published spelling of a decoder's tensor, from that of a language model alone."""
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def rules(config: JanusConfig) -> list[Rule]:
    vision, ours = config.vision, "vision/blocks"
    patch = linear(f"{_TOWER}.embeddings.patch_embedding", "vision/patch_embed", bias=True)
    kernel = flatten(vision.in_channels, vision.patch_size, vision.patch_size)
    return [
        dataclasses.replace(patch[0], form=kernel),
        patch[1],
        Rule(f"{_TOWER}.embeddings.position_embedding.weight", ("vision/positions",)),
        *norm(f"{_TOWER}.post_layernorm", "vision/after", bias=True),
        *norm(f"{_BLOCK}.layer_norm1", f"{ours}/norm1", bias=True),
        *norm(f"{_BLOCK}.layer_norm2", f"{ours}/norm2", bias=True),
        *(
            rule
            for short, part in (("q", "query"), ("k", "key"), ("v", "value"))
            for rule in linear(
                f"{_BLOCK}.self_attn.{short}_proj", f"{ours}/attention/{part}", bias=vision.attention_bias
            )
        ),
        *linear(f"{_BLOCK}.self_attn.projection_layer", f"{ours}/attention/output", bias=True),
        *linear(f"{_BLOCK}.mlp.fc1", f"{ours}/mlp/up", bias=True),
        *linear(f"{_BLOCK}.mlp.fc2", f"{ours}/mlp/down", bias=True),
        *linear("model.aligner.fc1", "projector/linear1", bias=True),
        *linear("model.aligner.hidden_layers.0", "projector/linear2", bias=True),
        *decoder_hf.spelled(decoder_hf.text_rules(config.text), nested),
    ]


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> JanusConfig | None:
    vision = content.get("vision_config")
    if not isinstance(vision, dict) or not isinstance(content.get("text_config"), dict):
        reader.problems.append("vision_config or text_config is missing")
        return None
    for key, value in (("hidden_act", "gelu"), ("use_qk_norm", False), ("depth", 2)):
        reader.expect(vision, key, (value,), value, "vision_config.")
    tower = {**_VISION_DEFAULTS, **vision}
    built = reader.build(
        VisionConfig,
        dict(
            depth=tower["num_hidden_layers"],
            hidden_size=tower["hidden_size"],
            intermediate_size=int(tower["hidden_size"] * tower["mlp_ratio"]),
            num_heads=tower["num_attention_heads"],
            attention_bias=tower["attention_bias"],
            image_side=tower["image_size"],
            patch_size=tower["patch_size"],
            in_channels=tower["num_channels"],
            layer_norm_eps=tower["layer_norm_eps"],
        ),
        "vision_config.",
    )
    text_content, where = decoder_hf.nested_text(content)
    reader.expect(text_content, "model_type", ("llama",), "llama", where)
    text = decoder_hf.read_text(reader, {**_TEXT_DEFAULTS, **text_content}, "llama", where)
    if built is None or text is None:
        return None
    reader.expect(tower, "projection_dim", (text.hidden_size,), None, "vision_config.")
    ids = {key: content.get(key, default) for key, default in BORDERS.items()}
    return reader.build(
        JanusConfig, dict(vision=built, text=text, image_token_id=content.get("image_token_id", 100581), **ids)
    )


def write_config(config: JanusConfig, common: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = config.vision, config.text
    return {
        "model_type": "janus",
        **common,
        "tie_word_embeddings": text.tie_word_embeddings,
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "text_config": {
            "model_type": "llama",
            **common,
            **decoder_hf.write_text(text),
            "head_dim": text.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "vision_config": dict(
            model_type="janus_vision_model",
            num_hidden_layers=vision.depth,
            hidden_size=vision.hidden_size,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            num_attention_heads=vision.num_heads,
            attention_bias=vision.attention_bias,
            image_size=vision.image_side,
            patch_size=vision.patch_size,
            num_channels=vision.in_channels,
            layer_norm_eps=vision.layer_norm_eps,
            num_image_tokens=vision.view_patches,
            projection_dim=text.hidden_size,
            depth=2,
            use_qk_norm=False,
            hidden_act="gelu",
        ),
        "vq_config": dict(
            model_type="janus_vqgan", projection_dim=text.hidden_size, image_token_embed_dim=text.hidden_size
        ),
    }


def companions(config: JanusConfig, pixels: Pixels) -> dict[str, Any]:
    """Settings of transformers' image processor. Areas do not count: every picture has one size."""
    side = config.vision.image_side
    return {
        "preprocessor_config.json": dict(
            image_processor_type="JanusImageProcessor",
            processor_class="JanusProcessor",
            size=dict(height=side, width=side),
            min_size=min(14, side),
            do_resize=True,
            do_pad=True,
            do_rescale=True,
            do_normalize=True,
            rescale_factor=1 / 255,
            resample=3,
            image_mean=list(HALF),
            image_std=list(HALF),
        ),
        "processor_config.json": dict(processor_class="JanusProcessor", num_image_tokens=config.vision.view_patches),
    }


MAPPING = HFMapping(
    model_types={"janus": ModelType("Janus-Pro", "JanusForConditionalGeneration")},
    rules=rules,
    read_config=read_config,
    write_config=write_config,
    companions=companions,
    chat_template=CHAT_TEMPLATE,
    ignored=("rotary_emb.inv_freq", "embeddings.position_ids"),
    unread=("model.vqmodel.", "model.generation_"),
    tied=decoder_hf.tied_as(nested),
    reference_parts=_PARTS,
)
