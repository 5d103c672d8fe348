"""`outline_of`: the structure of the model that a configuration describes."""

from __future__ import annotations

import functools

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.params import Outline
from mindvl_jax.models.registry import spec_of


@functools.lru_cache(maxsize=8)
def outline_of(config: ModelConfig) -> Outline:
    """Trace the family's `build` without computing anything; cached, as a 72B model takes a second."""
    build = spec_of(config).build
    return Outline.of(lambda rngs: build(config, rngs=rngs))
