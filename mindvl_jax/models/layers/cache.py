"""Keys and values of what was already read: a ring of places through which all rows move in step.

L layers, B rows, S places, N query heads, K key/value heads, G = N / K, H head dim; R width of a latent, P of a shared
rotary key, J of a value.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, TextConfig


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

    def holds(self, newest, lengths_B: jax.Array) -> jax.Array:
        """(B, S) bool: places of each row's last `lengths_B` tokens, the newest of which lies at place `newest` (a
        scalar).
        """
        ages_S = newest - jnp.arange(self.places)
        # Not a remainder: each layer's attention makes the mask anew, and a division of integers is no vector
        # instruction.
        ages_S = jnp.where(ages_S < 0, ages_S + self.places, ages_S)
        return ages_S[None] < lengths_B[:, None]

    @abc.abstractmethod
    def write(self, layer, keys, values, place) -> Cache:
        """Put one token of every row at a cache slot of one layer."""

    @abc.abstractmethod
    def attend(self, layer, query, seen_BS: jax.Array) -> jax.Array:
        """Attention of one query a row over the slots that it may see; what a query is depends on the cache."""

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

    def write(self, layer, keys_BKH: jax.Array, values_BKH: jax.Array, place) -> KVCache:
        """Put one token of every row at a place (a scalar) of one layer."""
        return KVCache(
            _put(self.keys, layer, keys_BKH[..., None], place, 3),
            _put(self.values, layer, values_BKH[:, :, None], place, 2),
        )

    def attend(self, layer, q_BNH: jax.Array, seen_BS: jax.Array) -> jax.Array:
        """Softmax attention of one query a row over the places that it may see, at least one; (B, N, H) in q's dtype.

        Plain products and no fused operator: one query is bound by reading the cache, which the products read as it
        lies. Softmax in float32, products accumulated in float32.
        """

        keys_BKHS, values_BKSH = (_of_layer(store, layer).astype(q_BNH.dtype) for store in (self.keys, self.values))
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

        return KVCache(
            _put_rows(self.keys, row_N, keys_LNSKH.transpose(0, 1, 3, 4, 2)),
            _put_rows(self.values, row_N, values_LNSKH.swapaxes(2, 3)),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache(Cache):
    """Cache of latent attention. A token keeps one latent and one rotated key, which all heads share.

    R + P values a token and layer (512 + 64 in DeepSeek-V3) instead of keys and values of every head; places as in
    `KVCache`.

    Attributes:
      latents: (B, S, R) normed latents, shared: (B, S, P) rotated keys; one array a layer or a stack (L, ..).
    """

    latents: tuple[jax.Array, ...] | jax.Array
    shared: tuple[jax.Array, ...] | jax.Array

    @classmethod
    def empty(
        cls, config: DeepSeekV3TextConfig, rows: int, places: int, dtype, *, unrolled: bool, mtp: bool = False
    ) -> LatentCache:
        """`mtp`: with a layer more, that of the first MTP head."""
        shapes = (rows, places, config.kv_lora_rank), (rows, places, config.qk_rope_head_dim)
        layers = config.num_layers + mtp
        if unrolled:
            return cls(*(tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for shape in shapes))
        return cls(*(jnp.zeros((layers, *shape), dtype) for shape in shapes))

    @property
    def unrolled(self) -> bool:
        return isinstance(self.latents, tuple)

    @property
    def places(self) -> int:
        return jax.tree.leaves(self.latents)[0].shape[-2]

    def write(self, layer, latents_BR: jax.Array, shared_BP: jax.Array, place) -> LatentCache:
        """Put one token of every row at a place (a scalar) of one layer."""
        return LatentCache(
            _put(self.latents, layer, latents_BR[:, None], place, 1),
            _put(self.shared, layer, shared_BP[:, None], place, 1),
        )

    def write_at(self, layer, latents_BTR: jax.Array, shared_BTP: jax.Array, place_BT: jax.Array) -> LatentCache:
        """Put T tokens of every row at places of its own; a place outside the cache drops its token."""
        return LatentCache(
            _put_at(self.latents, layer, latents_BTR, place_BT), _put_at(self.shared, layer, shared_BTP, place_BT)
        )

    def attend(self, layer, query, seen_BS: jax.Array) -> jax.Array:
        """(B, N, J). `query` is a layer's `attend_absorbed` with its two queries bound: it holds the up-projections."""
        return query(_of_layer(self.latents, layer), _of_layer(self.shared, layer), seen_BS)

    def replace_rows(self, row_N: jax.Array, latents_LNSR: jax.Array, shared_LNSP: jax.Array) -> LatentCache:
        """Whole rows anew; a row number past the last is dropped."""
        return LatentCache(_put_rows(self.latents, row_N, latents_LNSR), _put_rows(self.shared, row_N, shared_LNSP))


def _put(store, layer, new, place, axis: int):
    """Write at one place of one layer; `axis` is that of the places in an array of a single layer."""
    if isinstance(store, tuple):
        return (
            *store[:layer],
            lax.dynamic_update_slice_in_dim(store[layer], new.astype(store[layer].dtype), place, axis),
            *store[layer + 1 :],
        )
    starts = [layer, *[0] * new.ndim]
    starts[axis + 1] = place
    return lax.dynamic_update_slice(store, new[None].astype(store.dtype), starts)


def _put_at(store, layer, new_BTX, place_BT):
    rows_B1 = jnp.arange(new_BTX.shape[0])[:, None]
    if isinstance(store, tuple):
        own = store[layer].at[rows_B1, place_BT].set(new_BTX.astype(store[layer].dtype), mode="drop")
        return (*store[:layer], own, *store[layer + 1 :])
    return store.at[layer, rows_B1, place_BT].set(new_BTX.astype(store.dtype), mode="drop")


def _put_rows(store, row_N, new):
    if isinstance(store, tuple):
        return tuple(old.at[row_N].set(one.astype(old.dtype), mode="drop") for old, one in zip(store, new, strict=True))
    return store.at[:, row_N].set(new.astype(store.dtype), mode="drop")


def _of_layer(store, layer) -> jax.Array:
    return store[layer] if isinstance(store, tuple) else lax.dynamic_index_in_dim(store, layer, 0, keepdims=False)
