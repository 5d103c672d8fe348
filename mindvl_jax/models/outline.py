"""`outline_of`: the structure of the model that a configuration describes."""

from __future__ import annotations

import functools

from mindvl_jax.config.adapters import AdaptersConfig
from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.params import Outline
from mindvl_jax.models.adapters import attach
from mindvl_jax.models.registry import spec_of
from mindvl_jax.models.spec import Named

_layout_of = Named(
    "mindvl_jax.weights.adapter_layout:layout_of"
)  # published names, which select layers, are known up there


@functools.lru_cache(maxsize=8)
def outline_of(config: ModelConfig, adapters: AdaptersConfig | None = None) -> Outline:
    """Trace the family's `build` without computing anything; cached, as a 72B model takes a second.

    Args:
      adapters: the configuration's section; its adapters are among the parameters then.

    Raises:
      UserError: an adapter target that selects nothing.
    """
    build = spec_of(config).build
    if adapters is None:
        return Outline.of(lambda rngs: build(config, rngs=rngs))
    layout = _layout_of(adapters, config)
    return Outline.of(lambda rngs: attach(build(config, rngs=rngs), layout, rngs))
