"""Decoder of Qwen2.5 and Qwen3 (references: transformers' Qwen2, Qwen2.5-VL text and Qwen3).

B rows, T tokens, S cache slots, N query heads, K key/value heads, H head dim, D width, F feed-forward width, V
vocabulary, L layers. The families differ in the attention only: qwen2 has q/k/v biases, qwen3 norms each query and
key head, llama does neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.cache import Cache, KVCache
from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.layers.linear import GatedMLP, Linear, RMSNorm, parameter
from mindvl_jax.models.layers.rope import text_tables
from mindvl_jax.models.layers.stack import UNROLLED_LAYERS, keep, rematerialise_attention, scan_layers
from mindvl_jax.models.layers.visual_tokens import LayerAdditions, adding
from mindvl_jax.parallel.activations import exchange_rows
from mindvl_jax.parallel.attention import attention
from npu_bridge import ops


@jax.custom_vjp
def transposed(table_VD: jax.Array) -> jax.Array:
    """(V, D) -> (D, V).

    The barrier in its gradient is for XLA on CPU: it would fold the transposition into the product that makes the
    gradient, into a bfloat16 form that its runtime refuses.
    """
    return table_VD.T


transposed.defvjp(lambda table_VD: (table_VD.T, None), lambda _, g_DV: (jax.lax.optimization_barrier(g_DV).T,))


class Embedding(nnx.Module):
    """Token table (V, D)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype):
        table = jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype) * 0.02
        self.embedding = parameter(table, ("vocab", "embed"))

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        return exchange_rows(ops.embedding(self.embedding[...], ids_BT))


class Attention(nnx.Module):
    """Grouped-query attention: projections, optional q/k norms and rotary positions; the caller attends."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype):
        D, L, H = config.hidden_size, config.num_layers, config.head_dim
        self.head_dim = H
        common = dict(bias=config.family == "qwen2", rngs=rngs, dtype=dtype, layers=L)
        self.query = Linear(D, config.num_heads * H, ("embed", "heads"), **common)
        self.key = Linear(D, config.num_kv_heads * H, ("embed", "kv_heads"), **common)
        self.value = Linear(D, config.num_kv_heads * H, ("embed", "kv_heads"), **common)
        self.output = Linear(
            config.num_heads * H, D, ("heads", "embed"), scale=1 / math.sqrt(2 * L), **{**common, "bias": False}
        )

        def per_head():
            return (
                RMSNorm(H, eps=config.rms_norm_eps, dtype=dtype, name="head_dim", layers=L)
                if config.family not in ("qwen2", "llama")
                else None
            )

        self.query_norm, self.key_norm = per_head(), per_head()

    def project(self, x_BTD, cos_BTH, sin_BTH) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> q (B, T, N, H), k and v (B, T, K, H), rotated."""

        def heads(layer):
            return keep(layer(x_BTD)).reshape(*x_BTD.shape[:2], -1, self.head_dim)

        q, k, v = heads(self.query), heads(self.key), heads(self.value)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return ops.rotary(q, cos_BTH, sin_BTH), ops.rotary(k, cos_BTH, sin_BTH), v

    def finish(self, out_BTNH) -> jax.Array:
        return self.output(keep(out_BTNH.reshape(*out_BTNH.shape[:2], -1)))


class DecoderLayer(nnx.Module):
    """Pre-norm attention and gated feed-forward."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype):
        L = config.num_layers
        self.norm1 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, layers=L)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, layers=L)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            bias=False,
            rngs=rngs,
            dtype=dtype,
            layers=L,
            residual_scale=1 / math.sqrt(2 * L),
        )

    def feed_forward(self, x_BTD) -> jax.Array:
        with jax.named_scope("mlp"):
            return x_BTD + self.mlp(self.norm2(x_BTD))


class Decoder(nnx.Module):
    """Token table, layers, final norm and, unless tied, the output matrix."""

    layer_type: type[nnx.Module] = DecoderLayer

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype, remat: str = "none"):
        self.config = config
        self.remat = remat
        self.embed = Embedding(config, rngs=rngs, dtype=dtype)
        self.layers = self.layer_type(config, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)

        def untied():
            return Linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), bias=False, rngs=rngs, dtype=dtype)

        self.head = None if config.tie_word_embeddings else untied()

    def head_kernel(self) -> jax.Array:
        """(D, V): the output matrix, which is the token table when tied."""
        return transposed(self.embed.embedding[...]) if self.head is None else self.head.kernel[...]

    def __call__(
        self,
        inputs_BTD,
        positions_B3T,
        segment_ids_BT,
        *,
        segment_lengths=None,
        max_sample_length: int | None = None,
        added: LayerAdditions | None = None,
    ) -> jax.Array:
        """Hidden states (B, T, D) after the final norm.

        Args:
          inputs_BTD: token (and visual) embeddings in the dtype of the computation.
          positions_B3T: (B, 3, T) rotary positions. segment_ids_BT: (B, T) sample of each place, 0 is padding.
          segment_lengths: (B, M) the samples as counts, -1 padded; for kernels that want lengths.
          max_sample_length: static promise that no sample is longer; lets attention compute a band.
          added: what is added after the first layers.
        """
        x = self.through(
            self.layers,
            inputs_BTD,
            positions_B3T,
            segment_ids_BT,
            segment_lengths=segment_lengths,
            max_sample_length=max_sample_length,
            added=added,
        )
        return self.norm(x)

    def through(
        self, layers, x_BTD, positions_B3T, segment_ids_BT, *, segment_lengths, max_sample_length, added=None
    ) -> jax.Array:
        """`x_BTD` behind some of the layers, a stack of their own; arguments as of a call."""
        attend = self.attended(self.rotary(positions_B3T), segment_ids_BT, segment_lengths, max_sample_length)

        def layer_step(x, layer):
            return layer.feed_forward(attend(x, layer))

        with jax.named_scope("layers"):
            step, stack = adding(layer_step, layers, added)
            return scan_layers(step, x_BTD, stack, remat=self.remat)

    def attended(self, rotary, segment_ids_BT, segment_lengths, max_sample_length: int | None) -> Callable:
        """Return (x, layer) -> x with the layer's attention added, rematerialised as `remat` says."""

        def attention_of(layer, x):
            q, k, v = layer.attention.project(layer.norm1(x), *rotary)
            return layer.attention.finish(self_attention(q, k, v, segment_ids_BT, segment_lengths, max_sample_length))

        def attend(x, layer):
            with jax.named_scope("attention"):
                return x + rematerialise_attention(attention_of, self.remat)(layer, x)

        return attend

    def read(
        self, inputs_BTD, positions_B3T, segment_ids_BT, *, segment_lengths=None, added: LayerAdditions | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As a call, and what a cache is filled with.

        Returns:
          hidden states (B, T, D) after the final norm, keys and values (L, B, T, K, H), the keys rotated.
        """
        rotary = self.rotary(positions_B3T)

        def layer_step(x, layer):
            q, k, v = layer.attention.project(layer.norm1(x), *rotary)
            out = self_attention(q, k, v, segment_ids_BT, segment_lengths, None)
            return layer.feed_forward(x + layer.attention.finish(out)), (k, v)

        step, stack = adding(layer_step, self.layers, added)
        x, (keys, values) = jax.lax.scan(step, inputs_BTD, stack, unroll=self.config.num_layers <= UNROLLED_LAYERS)
        return self.norm(x), keys, values

    def read_after(
        self, inputs_BTD, positions_B3T, segment_ids_BT, keys_LBPKH, values_LBPKH, segment_ids_BP
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `read`, for tokens that follow others whose keys and values are known.

        Args:
          segment_ids_BT: 1 for tokens, 0 for padding behind them. segment_ids_BP: 1 for the known tokens, 0 for padding
            before them: the last known one stands directly before the first new one.

        Returns:
          hidden states, keys and values of the new tokens alone.
        """
        rotary = self.rotary(positions_B3T)
        ids = dict(segment_ids_q=segment_ids_BT, segment_ids_kv=jnp.concatenate([segment_ids_BP, segment_ids_BT], 1))

        def layer_step(x, layer_and_before):
            layer, before = layer_and_before
            q, *own = layer.attention.project(layer.norm1(x), *rotary)
            k, v = (jnp.concatenate([old.astype(new.dtype), new], 1) for old, new in zip(before, own, strict=True))
            out = ops.attention(q, k, v, causal=True, padding="unread", **ids)
            return layer.feed_forward(x + layer.attention.finish(out)), tuple(own)

        stack = self.layers, (keys_LBPKH, values_LBPKH)
        unroll = self.config.num_layers <= UNROLLED_LAYERS
        x, (keys, values) = jax.lax.scan(layer_step, inputs_BTD, stack, unroll=unroll)
        return self.norm(x), keys, values

    @property
    def stacks(self) -> tuple[nnx.Module, ...]:
        """The layers as stacks, in order: one stack for each kind of layer that follows another."""
        return (self.layers,)

    def empty_cache(self, rows: int, places: int, dtype, *, unrolled: bool) -> Cache:
        """A cache of `places` slots a row for `read` and `extend`."""
        return KVCache.empty(self.config, rows, places, dtype, unrolled=unrolled)

    def extend(
        self, inputs_B1D, positions_B31, cache: Cache, place, lengths_B, *, layers: Sequence[DecoderLayer] | None = None
    ) -> tuple[jax.Array, Cache]:
        """One more token of every row, which attends to itself and to the row's tokens before it.

        Args:
          inputs_B1D: embeddings. positions_B31: rotary positions.
          place: scalar, where the cache takes the tokens: the place after the one of the call before, around the ring.
          lengths_B: tokens of each row, the new one counted.
          layers: the layers one by one, where the caller has them: cut from their stack they are copied, at every call.

        Returns:
          hidden states (B, 1, D) after the final norm; the cache with the new tokens in it.
        """
        rotary = self.rotary(positions_B31)
        seen_BS = cache.holds(place, lengths_B)

        def layer_step(carry, layer_and_number):
            (x, cache), (layer, number) = carry, layer_and_number
            q, k, v = layer.attention.project(layer.norm1(x), *rotary)
            cache = cache.write(number, k[:, 0], v[:, 0], place)
            out = cache.attend(number, q[:, 0], seen_BS)
            return layer.feed_forward(x + layer.attention.finish(out[:, None])), cache

        carry = inputs_B1D, cache
        if cache.unrolled:
            for number in range(self.config.num_layers):
                carry = layer_step(
                    carry,
                    (
                        layers[number]
                        if layers
                        else jax.tree.map(lambda leaf, number=number: leaf[number], self.layers),
                        number,
                    ),
                )
        else:
            carry = scan_layers(layer_step, carry, (self.layers, jnp.arange(self.config.num_layers)))
        return self.norm(carry[0]), carry[1]

    def rotary(self, positions_B3T) -> tuple[jax.Array, jax.Array]:
        """Rotary tables of the positions, which every layer's `project` takes."""
        config = self.config
        return text_tables(
            positions_B3T,
            config.head_dim,
            config.rope_theta,
            config.mrope_section if config.rope == "mrope" else None,
            interleaved=config.mrope_interleaved,
        )


def self_attention(
    q, k, v, segment_ids_BT, segment_lengths, max_sample_length: int | None, *, scale: float | None = None
) -> jax.Array:
    """Causal attention inside the segments of packed rows. Outputs at padding positions are never used."""
    options = {} if scale is None else {"scale": scale}
    return attention(
        q,
        k,
        v,
        segment_ids=segment_ids_BT,
        causal=True,
        max_segment_length=max_sample_length,
        lengths=segment_lengths,
        padding="unread",
        **options,
    )
