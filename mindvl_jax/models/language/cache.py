"""Keys and values of what was already read.

L layers, B rows, S places, K key/value heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mindvl_jax.config import TextConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Attributes: keys, values: (L, B, S, K, H). Which places are valid is the caller's `cache_index_B`: all below it are."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: TextConfig, rows: int, places: int, dtype) -> "KVCache":
        shape = (config.num_layers, rows, places, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    @property
    def places(self) -> int:
        return self.keys.shape[2]

    def write(self, layer, keys_BTKH: jax.Array, values_BTKH: jax.Array, index_B: jax.Array) -> "KVCache":
        """Put T new places of one layer into each row from `index_B` on; places past the end are dropped."""
        B, T = keys_BTKH.shape[:2]
        rows, places = jnp.arange(B)[:, None], index_B[:, None] + jnp.arange(T)[None]
        put = lambda store, new: store.at[layer, rows, places].set(new.astype(store.dtype), mode="drop")
        return KVCache(put(self.keys, keys_BTKH), put(self.values, values_BTKH))

    def layer(self, layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values (B, S, K, H) of one layer."""
        take = lambda store: jax.lax.dynamic_index_in_dim(store, layer, 0, keepdims=False)
        return take(self.keys), take(self.values)
