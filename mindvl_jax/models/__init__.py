"""The mathematics: native-resolution vision tower, projector, decoder. No mesh, no files; fused operators from npu_bridge.ops."""

import jax

from mindvl_jax.batch import Batch
from mindvl_jax.models.language.cache import KVCache
from mindvl_jax.models.mindvl import LanguageModel, MindVL
from mindvl_jax.models.parameters import LOGICAL_AXES

__all__ = ["LOGICAL_AXES", "Batch", "KVCache", "LanguageModel", "MindVL"]

jax.tree_util.register_dataclass(Batch, data_fields=list(Batch.__dataclass_fields__), meta_fields=[])
