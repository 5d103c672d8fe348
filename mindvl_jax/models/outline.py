"""`outline_of`: the structure of the model that a configuration describes."""

from __future__ import annotations

import functools

from mindvl_jax.config.adapters import AdaptersConfig
from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.params import Outline
from mindvl_jax.models.adapters import attach, hold_in_nf4
from mindvl_jax.models.registry import spec_of
from mindvl_jax.models.spec import Named

_layout_of = Named(
    "mindvl_jax.weights.adapter_layout:layout_of"
)  # published names, which select layers, are known up there
_linear_modules = Named("mindvl_jax.weights.adapter_layout:linear_modules")


@functools.lru_cache(maxsize=8)
def outline_of(config: ModelConfig, adapters: AdaptersConfig | None = None) -> Outline:
    """Trace the family's `build` without computing anything; cached, as a 72B model takes a second.

    Args:
      adapters: the configuration's section; its adapters are among the parameters then.

    Raises:
      UserError: an adapter target that selects nothing; a matrix that NF4 cannot hold.
    """
    build = spec_of(config).build
    if adapters is None:
        return Outline.of(lambda rngs: build(config, rngs=rngs))
    layout = _layout_of(adapters, config)
    in_nf4 = _linear_modules(config) if adapters.base == "nf4" else ()
    return Outline.of(lambda rngs: hold_in_nf4(attach(build(config, rngs=rngs), layout, rngs), in_nf4))
