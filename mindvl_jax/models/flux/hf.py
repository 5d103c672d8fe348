"""Published files of Flux: the layout of diffusers and the original one. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindvl_jax.models.flux.config import FluxConfig
from mindvl_jax.models.hf import ConfigReader, Rule, fused, linear, norm

CLASS = "FluxTransformer2DModel"


def read_config(content: Mapping[str, Any], reader: ConfigReader) -> FluxConfig | None:
    """The transformer that diffusers' config.json describes; missing keys have diffusers' defaults."""
    reader.expect(content, "_class_name", (CLASS,), CLASS)
    reader.expect(content, "patch_size", (1,), 1)
    channels = content.get("in_channels", 64)
    reader.expect(content, "out_channels", (None, channels), None)
    values = dict(
        channels=channels,
        joint_layers=content.get("num_layers", 19),
        parallel_layers=content.get("num_single_layers", 38),
        num_heads=content.get("num_attention_heads", 24),
        head_dim=content.get("attention_head_dim", 128),
        text_dim=content.get("joint_attention_dim", 4096),
        pooled_dim=content.get("pooled_projection_dim", 768),
        guidance_embedding=content.get("guidance_embeds", False),
        rope_axes=content.get("axes_dims_rope", (16, 56, 56)),
    )
    return reader.build(FluxConfig, values)


def _vector(published: str, ours: str, names: tuple[str, str]) -> list[Rule]:
    return [
        *linear(f"{published}.{names[0]}", f"{ours}/enter", bias=True),
        *linear(f"{published}.{names[1]}", f"{ours}/leave", bias=True),
    ]


def diffusers_rules(config: FluxConfig) -> list[Rule]:
    """Every tensor of diffusers' layout."""
    single, double = "single_transformer_blocks.{layer}", "transformer_blocks.{layer}"
    embeddings = {"timestep_embedder": "time", "text_embedder": "pooled"}
    if config.guidance_embedding:
        embeddings["guidance_embedder"] = "guidance"
    rules = [
        *linear("x_embedder", "image_embed", bias=True),
        *linear("context_embedder", "text_embed", bias=True),
        *fused("norm_out.linear", ("head_scale", "head_shift")),
        *linear("proj_out", "head", bias=True),
    ]
    for published, ours in embeddings.items():
        rules += _vector(f"time_text_embed.{published}", ours, ("linear_1", "linear_2"))
    streams = {
        "image": ("norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
        "text": ("norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
    }
    for stream, (modulation, matrix, scale, output, mlp) in streams.items():
        ours, attention = f"joint/{stream}", f"{double}.attn"
        rules += linear(f"{double}.{modulation}.linear", f"{ours}/modulation", bias=True)
        rules += _projections(attention, f"{ours}/projections", matrix, scale)
        rules += linear(f"{attention}.{output}", f"{ours}/output", bias=True)
        rules += linear(f"{double}.{mlp}.net.0.proj", f"{ours}/up", bias=True)
        rules += linear(f"{double}.{mlp}.net.2", f"{ours}/down", bias=True)
    rules += linear(f"{single}.norm.linear", "parallel/modulation", bias=True)
    rules += _projections(f"{single}.attn", "parallel/projections", "to_{}", "norm_{}")
    rules += linear(f"{single}.proj_mlp", "parallel/up", bias=True)
    return rules + linear(f"{single}.proj_out", "parallel/output", bias=True)


def _projections(published: str, ours: str, matrix: str, scale: str) -> list[Rule]:
    rules = []
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += linear(f"{published}.{matrix.replace('{}', letter)}", f"{ours}/{name}", bias=True)
        if letter != "v":
            rules += norm(f"{published}.{scale.replace('{}', letter)}", f"{ours}/{name}_norm")
    return rules


def original_rules(config: FluxConfig) -> list[Rule]:
    """Every tensor of the original layout: fused matrices, the head's shift before its scale."""
    single, double = "single_blocks.{layer}", "double_blocks.{layer}"
    embeddings = {"time_in": "time", "vector_in": "pooled"}
    if config.guidance_embedding:
        embeddings["guidance_in"] = "guidance"
    rules = [
        *linear("img_in", "image_embed", bias=True),
        *linear("txt_in", "text_embed", bias=True),
        *fused("final_layer.adaLN_modulation.1", ("head_shift", "head_scale")),
        *linear("final_layer.linear", "head", bias=True),
    ]
    for published, ours in embeddings.items():
        rules += _vector(published, ours, ("in_layer", "out_layer"))
    for stream, short in (("image", "img"), ("text", "txt")):
        ours, published = f"joint/{stream}", f"{double}.{short}"
        matrices = tuple(f"{ours}/projections/{name}" for name in ("query", "key", "value"))
        rules += linear(f"{published}_mod.lin", f"{ours}/modulation", bias=True)
        rules += fused(f"{published}_attn.qkv", matrices)
        rules += _original_norms(f"{published}_attn.norm", ours)
        rules += linear(f"{published}_attn.proj", f"{ours}/output", bias=True)
        rules += linear(f"{published}_mlp.0", f"{ours}/up", bias=True)
        rules += linear(f"{published}_mlp.2", f"{ours}/down", bias=True)
    matrices = tuple(f"parallel/projections/{name}" for name in ("query", "key", "value"))
    rules += linear(f"{single}.modulation.lin", "parallel/modulation", bias=True)
    rules += fused(f"{single}.linear1", (*matrices, "parallel/up"))
    rules += _original_norms(f"{single}.norm", "parallel")
    return rules + linear(f"{single}.linear2", "parallel/output", bias=True)


def _original_norms(published: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{published}.{name}_norm.scale", (f"{ours}/projections/{name}_norm/scale",)) for name in ("query", "key")
    ]
