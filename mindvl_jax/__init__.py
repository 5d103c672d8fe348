"""MindVL in JAX: a native-resolution vision-language model and the system that trains it."""

__version__ = "0.1.0"

import mindvl_jax.models.registry  # noqa: F401  registers the model families with the configuration, before anyone reads one
