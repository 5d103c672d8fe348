"""`ModelSpec` of language models alone. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.spec import ModelSpec, Named

LANGUAGE = {"language": "language/**"}
ROUTED = {"experts": "language/layers/moe/experts/**", "router": "language/layers/moe/router/**"}


def language_spec(
    name: str,
    config: type[ModelConfig],
    presets: Mapping[str, Callable[[], ModelConfig]],
    *,
    hf: str,
    parts: Mapping[str, str] = LANGUAGE,
    adapters: bool = False,
) -> ModelSpec:
    """Return the SPEC of a decoder alone; arguments as `ModelSpec`'s, code by name ("module:attribute")."""
    return ModelSpec(
        name=name,
        config=config,
        presets=presets,
        build=Named("mindvl_jax.models.layers.language_model:LanguageModel"),
        processor=Named("mindvl_jax.models.layers.text_processor:TextProcessor"),
        counts=Named("mindvl_jax.models.layers.text_counts:COUNTS"),
        objective="sft",
        hf=Named(hf),
        parts=parts,
        flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
        adapters=adapters,
    )
