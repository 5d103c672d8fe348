"""Published files of SD3: the layout of diffusers and the original one. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.hf import ConfigReader, Reshaped, Rule, flatten, fused, linear, norm
from mindvl_jax.models.sd3.config import Sd3Config

CLASS = "SD3Transformer2DModel"


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> Sd3Config | None:
    """The transformer that diffusers' config.json describes; missing keys have diffusers' defaults."""
    reader.expect(content, "_class_name", (CLASS,), CLASS)
    reader.expect(content, "patch_size", (2,), 2)
    channels, heads, head_dim = (
        content.get(key, default)
        for key, default in (("in_channels", 16), ("num_attention_heads", 18), ("attention_head_dim", 64))
    )
    reader.expect(content, "out_channels", (None, channels), 16)
    reader.expect(content, "caption_projection_dim", (heads * head_dim,), 1152)
    reader.expect(content, "qk_norm", (None, "rms_norm"), None)
    # Image-only attention in the first blocks of SD3.5-Medium.
    if content.get("dual_attention_layers"):
        reader.problems.append("dual_attention_layers (SD3.5-Medium) is not supported")
    values = dict(
        channels=channels,
        num_layers=content.get("num_layers", 18),
        num_heads=heads,
        head_dim=head_dim,
        text_dim=content.get("joint_attention_dim", 4096),
        pooled_dim=content.get("pooled_projection_dim", 2048),
        positions_side=content.get("pos_embed_max_size", 96),
        qk_norm=content.get("qk_norm") == "rms_norm",
    )
    return reader.build(Sd3Config, values)


def _vectors(names: Mapping[str, str], layers: tuple[str, str]) -> list[Rule]:
    rules = []
    for published, ours in names.items():
        rules += linear(f"{published}.{layers[0]}", f"{ours}/enter", bias=True)
        rules += linear(f"{published}.{layers[1]}", f"{ours}/leave", bias=True)
    return rules


def diffusers_rules(config: Sd3Config) -> list[Rule]:
    """Every tensor of diffusers' layout."""
    block, last = "transformer_blocks.{layer}", f"transformer_blocks.{config.num_layers - 1}"
    embedding = "time_text_embed."
    rules = [
        Rule("pos_embed.pos_embed", ("positions",), Reshaped((1, config.positions_side**2, config.hidden_size))),
        Rule("pos_embed.proj.weight", ("image_embed/kernel",), flatten(config.channels, 2, 2)),
        Rule("pos_embed.proj.bias", ("image_embed/bias",)),
        *linear("context_embedder", "text_embed", bias=True),
        *_vectors(
            {f"{embedding}timestep_embedder": "time", f"{embedding}text_embedder": "pooled"}, ("linear_1", "linear_2")
        ),
        *fused("norm_out.linear", ("head_scale", "head_shift")),
        *linear("proj_out", "head", bias=True),
        *_stream(config, block, "joint/image", text=False),
        *_stream(config, block, "joint/text", text=True),
        *_stream(config, last, "last/image", text=False),
        *fused(f"{last}.norm1_context.linear", ("last/text_scale", "last/text_shift")),
        *_projections(config, f"{last}.attn", "last/text", text=True),
    ]
    return rules


def _stream(config: Sd3Config, published: str, ours: str, *, text: bool) -> list[Rule]:
    ending, output = ("_context", "to_add_out") if text else ("", "to_out.0")
    return [
        *linear(f"{published}.norm1{ending}.linear", f"{ours}/modulation", bias=True),
        *_projections(config, f"{published}.attn", f"{ours}/projections", text=text),
        *linear(f"{published}.attn.{output}", f"{ours}/output", bias=True),
        *linear(f"{published}.ff{ending}.net.0.proj", f"{ours}/up", bias=True),
        *linear(f"{published}.ff{ending}.net.2", f"{ours}/down", bias=True),
    ]


def _projections(config: Sd3Config, published: str, ours: str, *, text: bool) -> list[Rule]:
    rules = []
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        matrix, scale = (f"add_{letter}_proj", "norm_added_") if text else (f"to_{letter}", "norm_")
        rules += linear(f"{published}.{matrix}", f"{ours}/{name}", bias=True)
        if config.qk_norm and letter != "v":
            rules += norm(f"{published}.{scale}{letter}", f"{ours}/{name}_norm")
    return rules


def original_rules(config: Sd3Config) -> list[Rule]:
    """Every tensor of the original layout, without its prefix: fused matrices, shifts before scales."""
    block, last = "joint_blocks.{layer}", f"joint_blocks.{config.num_layers - 1}"
    rules = [
        Rule("pos_embed", ("positions",), Reshaped((1, config.positions_side**2, config.hidden_size))),
        Rule("x_embedder.proj.weight", ("image_embed/kernel",), flatten(config.channels, 2, 2)),
        Rule("x_embedder.proj.bias", ("image_embed/bias",)),
        *linear("context_embedder", "text_embed", bias=True),
        *_vectors({"t_embedder": "time", "y_embedder": "pooled"}, ("mlp.0", "mlp.2")),
        *fused("final_layer.adaLN_modulation.1", ("head_shift", "head_scale")),
        *linear("final_layer.linear", "head", bias=True),
        *fused(f"{last}.context_block.adaLN_modulation.1", ("last/text_shift", "last/text_scale")),
        *_original_projections(config, f"{last}.context_block", "last/text"),
    ]
    streams = (
        (f"{block}.x_block", "joint/image"),
        (f"{block}.context_block", "joint/text"),
        (f"{last}.x_block", "last/image"),
    )
    for published, ours in streams:
        rules += linear(f"{published}.adaLN_modulation.1", f"{ours}/modulation", bias=True)
        rules += _original_projections(config, published, f"{ours}/projections")
        rules += linear(f"{published}.attn.proj", f"{ours}/output", bias=True)
        rules += linear(f"{published}.mlp.fc1", f"{ours}/up", bias=True)
        rules += linear(f"{published}.mlp.fc2", f"{ours}/down", bias=True)
    return rules


def _original_projections(config: Sd3Config, published: str, ours: str) -> list[Rule]:
    rules = fused(f"{published}.attn.qkv", tuple(f"{ours}/{name}" for name in ("query", "key", "value")))
    if config.qk_norm:
        rules += norm(f"{published}.attn.ln_q", f"{ours}/query_norm") + norm(
            f"{published}.attn.ln_k", f"{ours}/key_norm"
        )
    return rules
