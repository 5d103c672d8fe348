"""Decoders with routed feed-forward layers: Qwen3-MoE and DeepSeek-V3 (references: transformers' Qwen3Moe, DeepseekV3).

B rows, T tokens, D width, E experts, L layers; R width of a latent, P of a shared rotary key.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.cache import LatentCache
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, Qwen3MoETextConfig
from mindvl_jax.models.layers.decoder import Attention, Decoder, Embedding, transposed
from mindvl_jax.models.layers.latent_layer import LatentLayer
from mindvl_jax.models.layers.linear import Linear, RMSNorm
from mindvl_jax.models.layers.mla import rotary_tables
from mindvl_jax.models.layers.moe import MoE, Routing
from mindvl_jax.models.layers.mtp import MTPHeads, following
from mindvl_jax.models.layers.stack import rematerialise_attention, scan_layers, scan_layers_with_aux
from mindvl_jax.models.layers.visual_tokens import LayerAdditions, adding


class RoutedLayer(nnx.Module):
    """Pre-norm attention and a mixture of experts."""

    def __init__(self, config: Qwen3MoETextConfig, *, rngs: nnx.Rngs, dtype):
        L, D = config.num_layers, config.hidden_size
        self.norm1 = RMSNorm(D, eps=config.rms_norm_eps, dtype=dtype, layers=L)
        self.attention = Attention(config, rngs=rngs, dtype=dtype)
        self.norm2 = RMSNorm(D, eps=config.rms_norm_eps, dtype=dtype, layers=L)
        self.moe = MoE(config.moe, D, rngs=rngs, dtype=dtype, layers=L, depth=L)

    def routed(self, x_BTD, segment_ids_BT) -> tuple[jax.Array, Routing]:
        with jax.named_scope("moe"):
            out, routing = self.moe(self.norm2(x_BTD), segment_ids_BT)
        return x_BTD + out, routing

    def feed_forward(self, x_BTD) -> jax.Array:
        """As a dense layer's, for decoding, where nobody balances."""
        return self.routed(x_BTD, None)[0]


class Qwen3MoEDecoder(Decoder):
    """Qwen3 with routed layers; the cache and the decode step are those of the dense decoder."""

    layer_type = RoutedLayer

    def routed(
        self,
        inputs_BTD,
        positions_B3T,
        segment_ids_BT,
        *,
        segment_lengths=None,
        max_sample_length: int | None = None,
        added: LayerAdditions | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Hidden states (B, T, D) after the final norm, and what each layer's router did, stacked (L, ..)."""
        attend = self.attended(self.rotary(positions_B3T), segment_ids_BT, segment_lengths, max_sample_length)

        def layer_step(x, layer):
            return layer.routed(attend(x, layer), segment_ids_BT)

        with jax.named_scope("layers"):
            step, stack = adding(layer_step, self.layers, added)
            x, routing = scan_layers_with_aux(step, inputs_BTD, stack, remat=self.remat)
        return self.norm(x), routing

    def __call__(self, inputs_BTD, positions_B3T, segment_ids_BT, **options) -> jax.Array:
        return self.routed(inputs_BTD, positions_B3T, segment_ids_BT, **options)[0]


class DeepSeekV3Decoder(nnx.Module):
    """Token table, dense layers, routed layers, final norm, output matrix, and MTP heads where the model has them."""

    def __init__(self, config: DeepSeekV3TextConfig, *, rngs: nnx.Rngs, dtype, remat: str = "none"):
        self.config, self.remat = config, remat
        self.embed = Embedding(config, rngs=rngs, dtype=dtype)
        layer = dict(rngs=rngs, dtype=dtype)
        self.dense = (
            LatentLayer(config, routed=False, layers=config.dense_layers, **layer) if config.dense_layers else None
        )
        self.layers = LatentLayer(config, routed=True, layers=config.num_layers - config.dense_layers, **layer)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, ("embed", "vocab"), bias=False, **layer)
        )
        self.mtp = MTPHeads(config, **layer) if config.mtp_layers else None

    def head_kernel(self) -> jax.Array:
        """(D, V): the output matrix, which is the token table when tied."""
        return transposed(self.embed.embedding[...]) if self.head is None else self.head.kernel[...]

    @property
    def stacks(self) -> tuple[LatentLayer, ...]:
        """The layers as stacks, in order: dense ones where there are any, then routed ones."""
        return (self.layers,) if self.dense is None else (self.dense, self.layers)

    def routed(
        self, inputs_BTD, positions_B3T, segment_ids_BT, *, segment_lengths=None, max_sample_length: int | None = None
    ) -> tuple[jax.Array, Routing]:
        """Hidden states (B, T, D) after the final norm, and what each routed layer's router did, stacked (L, ..)."""
        tables = rotary_tables(positions_B3T, self.config)

        def attend(layer, x):
            def attention(layer, x):
                return layer.attend(x, tables, segment_ids_BT, segment_lengths, max_sample_length)[0]

            with jax.named_scope("attention"):
                return x + rematerialise_attention(attention, self.remat)(layer, x)

        def dense_step(x, layer):
            x = attend(layer, x)
            with jax.named_scope("mlp"):
                return x + layer.mlp(layer.norm2(x))

        def routed_step(x, layer):
            x = attend(layer, x)
            with jax.named_scope("moe"):
                out, routing = layer.moe(layer.norm2(x), segment_ids_BT)
            return x + out, routing

        with jax.named_scope("layers"):
            x = inputs_BTD if self.dense is None else scan_layers(dense_step, inputs_BTD, self.dense, remat=self.remat)
            x, routing = scan_layers_with_aux(routed_step, x, self.layers, remat=self.remat)
        return self.norm(x), routing

    def __call__(self, inputs_BTD, positions_B3T, segment_ids_BT, **options) -> jax.Array:
        return self.routed(inputs_BTD, positions_B3T, segment_ids_BT, **options)[0]

    def predict_ahead(
        self, hidden_BTD, following_BTD, positions_B3T, segment_ids_BT, following_ids_BT, **options
    ) -> tuple[list[jax.Array], Routing]:
        """See `MTPHeads.__call__`, with this decoder's rotary tables and remat."""
        tables = rotary_tables(positions_B3T, self.config)
        return self.mtp(hidden_BTD, following_BTD, tables, segment_ids_BT, following_ids_BT, self.remat, **options)

    def read(
        self, inputs_BTD, positions_B3T, segment_ids_BT, *, segment_lengths=None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As a call, and what a cache is filled with.

        Returns:
          hidden states (B, T, D) after the final norm, latents (L, B, T, R), shared keys (L, B, T, P).
        """
        tables = rotary_tables(positions_B3T, self.config)

        def layer_step(x, layer):
            out, *kept = layer.attend(x, tables, segment_ids_BT, segment_lengths, None)
            return layer.feed_forward(x + out), kept

        x, kept = inputs_BTD, []
        for stack in self.stacks:
            x, of_stack = scan_layers_with_aux(layer_step, x, stack)
            kept.append(of_stack)
        latents, shared = (jnp.concatenate(parts) for parts in zip(*kept, strict=True))
        return self.norm(x), latents, shared

    def empty_cache(self, rows: int, places: int, dtype, *, unrolled: bool) -> LatentCache:
        """A cache of `places` slots a row for `read` and `extend`."""
        return LatentCache.empty(self.config, rows, places, dtype, unrolled=unrolled)

    def extend(
        self, inputs_B1D, positions_B31, cache: LatentCache, place, lengths_B, *, layers: Sequence | None = None
    ) -> tuple[jax.Array, LatentCache]:
        """One more token of every row by absorbed attention over the cache; arguments as `Decoder.extend`'s."""
        tables = rotary_tables(positions_B31, self.config)
        seen_BS = cache.holds(place, lengths_B)

        def layer_step(carry, layer_and_number):
            (x, cache), (layer, number) = carry, layer_and_number
            inputs = layer.norm1(x)
            nope, rotary = layer.attention.queries(inputs, *tables)
            latents, shared = layer.attention.latents(inputs, *tables)
            cache = cache.write(number, latents[:, 0], shared[:, 0], place)
            query = functools.partial(layer.attention.attend_absorbed, nope[:, 0], rotary[:, 0])
            out = cache.attend(number, query, seen_BS)
            return layer.feed_forward(x + layer.attention.finish(out[:, None])), cache

        x, cache = self._through_stacks(layer_step, (inputs_B1D, cache), cache.unrolled, layers)
        return self.norm(x), cache

    def _through_stacks(self, layer_step, carry, unrolled: bool, layers: Sequence | None):
        """`carry` after layer_step(carry, (layer, its number)) of every layer; `layers` as of `extend`."""
        first = 0
        for stack in self.stacks:
            depth = jax.tree.leaves(stack)[0].shape[0]
            if unrolled:
                for number in range(depth):
                    layer = (
                        layers[first + number]
                        if layers
                        else jax.tree.map(lambda leaf, number=number: leaf[number], stack)
                    )
                    carry = layer_step(carry, (layer, first + number))
            else:
                carry = scan_layers(layer_step, carry, (stack, first + jnp.arange(depth)))
            first += depth
        return carry

    def read_ahead(self, inputs_BTD, positions_B3T, segment_ids_BT, *, segment_lengths=None):
        """As `read`, with the first MTP head as one layer more of what a cache is filled with.

        The entry of a sample's last position is that of no token: it is written once the next token is known.
        """
        bounds = dict(segment_lengths=segment_lengths)
        hidden, latents, shared = self.read(inputs_BTD, positions_B3T, segment_ids_BT, **bounds)
        head, tables = self.mtp.head(0), rotary_tables(positions_B3T, self.config)
        inputs = head.layer.norm1(head.join(following(inputs_BTD, 1), hidden))
        of_head = head.layer.attention.latents(inputs, *tables)
        return hidden, *(jnp.concatenate([store, own[None]]) for store, own in zip((latents, shared), of_head))

    def extend_at(
        self, inputs_BTD, positions_B3T, cache: LatentCache, place_BT, *, layers: Sequence | None = None
    ) -> tuple[jax.Array, LatentCache]:
        """T more tokens of every row at cache slots of its own, where slot i holds the row's token i.

        What lies in the slots behind is overwritten later: taking tokens back needs no more than a smaller place.

        Returns:
          hidden states (B, T, D) after the final norm; the cache with the new tokens in it.
        """
        tables = rotary_tables(positions_B3T, self.config)

        def layer_step(carry, layer_and_number):
            layer, number = layer_and_number
            return _extended_at(layer, number, *carry, tables, place_BT)

        x, cache = self._through_stacks(layer_step, (inputs_BTD, cache), cache.unrolled, layers)
        return self.norm(x), cache

    def draft_at(
        self, following_BTD, hidden_BTD, positions_B3T, cache: LatentCache, place_BT
    ) -> tuple[jax.Array, LatentCache]:
        """T more positions of the first MTP head, whose layer is the cache's last; arguments as of `extend_at`.

        Args:
          following_BTD: embeddings of the tokens after the positions. hidden_BTD: of the main model there.

        Returns:
          hidden states (B, T, D) for the output matrix, which predicts the token after the following one; the cache.
        """
        head, tables = self.mtp.head(0), rotary_tables(positions_B3T, self.config)
        x = head.join(following_BTD, hidden_BTD)
        x, cache = _extended_at(head.layer, self.config.num_layers, x, cache, tables, place_BT)
        return head.norm(x), cache


def _extended_at(layer: LatentLayer, number, x_BTD, cache: LatentCache, tables, place_BT):
    inputs = layer.norm1(x_BTD)
    nope, rotary = layer.attention.queries(inputs, *tables)
    cache = cache.write_at(number, *layer.attention.latents(inputs, *tables), place_BT)
    seen_BTS = jnp.arange(cache.places) <= place_BT[..., None]

    def query(latents, shared, seen_BTS):
        attend = jax.vmap(layer.attention.attend_absorbed, (1, 1, None, None, 1), 1)
        return attend(nope, rotary, latents, shared, seen_BTS)

    out = cache.attend(number, query, seen_BTS)
    return layer.feed_forward(x_BTD + layer.attention.finish(out)), cache
