"""`Batch` as models read it: a JAX pytree. Importing this module registers it."""

import jax

from mindvl_jax.models.vision_language.batch import Batch

__all__ = ["Batch"]

jax.tree_util.register_dataclass(Batch, data_fields=list(Batch.__dataclass_fields__), meta_fields=[])
