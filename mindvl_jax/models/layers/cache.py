"""Keys and values of what was already read: a ring of places through which all rows move in step.

L layers, B rows, S places, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mindvl_jax.models.layers.config import TextConfig


class Cache(abc.ABC):
    """Decoder cache of past tokens: a pytree whose arrays have rows first, or layers and then
    rows.

    A decoder makes its own (`empty_cache`), so grouped-query keys and values, latents or cross-attention memory are its
    choice. The engine calls `replace_rows`; the decoder's layers call `write` and `attend` with what their attention
    projects.
    """

    @property
    @abc.abstractmethod
    def unrolled(self) -> bool:
        """Whether each layer has arrays of its own, so that layers are unrolled; else they are stacked and scanned."""

    @property
    @abc.abstractmethod
    def places(self) -> int:
        """Cache slots of a row."""

    @abc.abstractmethod
    def write(self, layer, keys, values, place) -> Cache:
        """Put one token of every row at a cache slot of one layer."""

    @abc.abstractmethod
    def attend(self, layer, query, seen_BS: jax.Array) -> jax.Array:
        """Attention of one query a row over the slots that it may see."""

    @abc.abstractmethod
    def replace_rows(self, row_N: jax.Array, keys, values) -> Cache:
        """Overwrite the given rows with what `Decoder.read` returned. Row ids out of range are ignored."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(Cache):
    """The newest tokens of every row lie at one common place, older ones before it, around the end of the ring where
    need be.

    So a new token of all rows is one contiguous write, whatever the rows' lengths: a place for each row would be a
    scatter, which XLA on a CPU carries out element by element. Keys are rotated before they are kept, so a place says
    nothing of a position.

    Attributes:
      keys: (B, K, H, S), values: (B, K, S, H): as the two products of a single query read them, so that nothing is
        transposed. One array a layer (then the layers are unrolled), or a stack (L, ..) (then they are scanned): a
        slice of a stack is a copy on a CPU.
    """

    keys: tuple[jax.Array, ...] | jax.Array
    values: tuple[jax.Array, ...] | jax.Array

    @classmethod
    def empty(cls, config: TextConfig, rows: int, places: int, dtype, *, unrolled: bool) -> KVCache:
        B, K, S, H = rows, config.num_kv_heads, places, config.head_dim
        shapes = (B, K, H, S), (B, K, S, H)
        if unrolled:
            return cls(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers)) for shape in shapes))
        return cls(*(jnp.zeros((config.num_layers, *shape), dtype) for shape in shapes))

    @property
    def unrolled(self) -> bool:
        return isinstance(self.keys, tuple)

    @property
    def places(self) -> int:
        return jax.tree.leaves(self.keys)[0].shape[-1]

    def holds(self, newest, lengths_B: jax.Array) -> jax.Array:
        """(B, S) bool: places of each row's last `lengths_B` tokens, the newest of which lies at place `newest` (a
        scalar).
        """
        ages_S = newest - jnp.arange(self.places)
        # Not a remainder: each layer's attention makes the mask anew, and a division of integers is no vector
        # instruction.
        ages_S = jnp.where(ages_S < 0, ages_S + self.places, ages_S)
        return ages_S[None] < lengths_B[:, None]

    def write(self, layer, keys_BKH: jax.Array, values_BKH: jax.Array, place) -> KVCache:
        """Put one token of every row at a place (a scalar) of one layer."""
        return KVCache(
            self._put(self.keys, layer, keys_BKH[..., None], place, 3),
            self._put(self.values, layer, values_BKH[:, :, None], place, 2),
        )

    def _put(self, store, layer, new, place, axis: int):
        if self.unrolled:
            return (
                *store[:layer],
                lax.dynamic_update_slice_in_dim(store[layer], new.astype(store[layer].dtype), place, axis),
                *store[layer + 1 :],
            )
        starts = [layer, 0, 0, 0, 0]
        starts[axis + 1] = place
        return lax.dynamic_update_slice(store, new[None].astype(store.dtype), starts)

    def attend(self, layer, q_BNH: jax.Array, seen_BS: jax.Array) -> jax.Array:
        """Softmax attention of one query a row over the places that it may see, at least one; (B, N, H) in q's dtype.

        Plain products and no fused operator: one query is bound by reading the cache, which the products read as it
        lies. Softmax in float32, products accumulated in float32.
        """

        def take(store):
            return store[layer] if self.unrolled else lax.dynamic_index_in_dim(store, layer, 0, keepdims=False)

        keys_BKHS, values_BKSH = (take(store).astype(q_BNH.dtype) for store in (self.keys, self.values))
        B, K, H, _ = keys_BKHS.shape
        q_BKGH = q_BNH.reshape(B, K, -1, H)
        logits_BKGS = jnp.einsum("bkgh,bkhs->bkgs", q_BKGH, keys_BKHS, preferred_element_type=jnp.float32) * H**-0.5
        weights_BKGS = jax.nn.softmax(jnp.where(seen_BS[:, None, None], logits_BKGS, -jnp.inf), axis=-1)
        out_BKGH = jnp.einsum(
            "bkgs,bksh->bkgh", weights_BKGS.astype(q_BNH.dtype), values_BKSH, preferred_element_type=jnp.float32
        )
        return out_BKGH.reshape(q_BNH.shape).astype(q_BNH.dtype)

    def replace_rows(self, row_N: jax.Array, keys_LNSKH: jax.Array, values_LNSKH: jax.Array) -> KVCache:
        """Whole rows anew; a row number past the last is dropped."""

        def put(store, new):
            if self.unrolled:
                return tuple(
                    old.at[row_N].set(one.astype(old.dtype), mode="drop") for old, one in zip(store, new, strict=True)
                )
            return store.at[:, row_N].set(new.astype(store.dtype), mode="drop")

        return KVCache(
            put(self.keys, keys_LNSKH.transpose(0, 1, 3, 4, 2)), put(self.values, values_LNSKH.swapaxes(2, 3))
        )
