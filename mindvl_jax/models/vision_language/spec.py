"""`ModelSpec` of vision-language families: what they share is filled in. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.layers.spec import LANGUAGE
from mindvl_jax.models.spec import ModelSpec, Named

PARTS = {"vision": "vision/**", "projector": "projector/**", **LANGUAGE}


def vision_language_spec(
    name: str,
    config: type[ModelConfig],
    presets: Mapping[str, Callable[[], ModelConfig]],
    *,
    build: str,
    hf: str | None,
    parts: Mapping[str, str] = PARTS,
    adapters: bool = False,
) -> ModelSpec:
    """Return a family's SPEC; arguments as `ModelSpec`'s, code by name ("module:attribute")."""
    return ModelSpec(
        name=name,
        config=config,
        presets=presets,
        build=Named(build),
        processor=Named("mindvl_jax.models.vision_language.processor:VisionLanguageProcessor"),
        counts=Named("mindvl_jax.models.vision_language.counts:COUNTS"),
        objective="sft",
        hf=None if hf is None else Named(hf),
        parts=parts,
        flops=Named("mindvl_jax.models.vision_language.flops:FlopCounter"),
        adapters=adapters,
    )
