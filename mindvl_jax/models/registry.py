"""The model families, one line each. Imports no jax."""

from __future__ import annotations

import importlib

from mindvl_jax.config import families
from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.spec import ModelSpec

_FAMILIES = (
    "mindvl",
    "qwen",
    "mindvl_moe",
    "qwen3_moe",
    "deepseek_v3",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
    "llava",
    "janus",
    "dit",
)  # fmt: skip

SPECS: dict[str, ModelSpec] = {name: importlib.import_module(f"mindvl_jax.models.{name}").SPEC for name in _FAMILIES}

for _spec in SPECS.values():
    families.register(_spec.name, _spec.config, _spec.presets)


def spec_of(config: ModelConfig) -> ModelSpec:
    """Family of a configuration.

    Raises:
      TypeError: not the configuration of a registered family.
    """
    spec = SPECS.get(getattr(config, "family", ""))
    if spec is None or not isinstance(config, spec.config):
        raise TypeError(f"{type(config).__name__} belongs to no registered model family ({', '.join(SPECS)})")
    return spec
