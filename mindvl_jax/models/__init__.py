"""The mathematics: native-resolution vision tower, projector, decoder. No mesh, no files; fused operators from npu_bridge.ops."""

import jax

from mindvl_jax.data.batch import Batch
from mindvl_jax.models.layers.cache import KVCache
from mindvl_jax.models.mindvl.model import LanguageModel, MindVL
from mindvl_jax.models.layers.linear import LOGICAL_AXES

__all__ = ["LOGICAL_AXES", "Batch", "KVCache", "LanguageModel", "MindVL"]

jax.tree_util.register_dataclass(Batch, data_fields=list(Batch.__dataclass_fields__), meta_fields=[])
