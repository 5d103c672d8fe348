"""Decoder with its token table and loss: what every family with text output shares.

B rows, T tokens, D language width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.models.batch import Batch
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, Qwen3MoETextConfig, TextConfig
from mindvl_jax.models.layers.decoder import Decoder
from mindvl_jax.models.layers.moe import Routing
from mindvl_jax.models.layers.mtp import following
from mindvl_jax.models.layers.routed_decoders import DeepSeekV3Decoder, Qwen3MoEDecoder
from mindvl_jax.parallel.activations import within_rows
from mindvl_jax.parallel.attention import order_of_places
from mindvl_jax.parallel.pipeline import Part, pipelined_loss
from npu_bridge import ops

DECODERS = {TextConfig: Decoder, Qwen3MoETextConfig: Qwen3MoEDecoder, DeepSeekV3TextConfig: DeepSeekV3Decoder}
"""The decoder of each kind of text configuration."""


class MTPLosses(NamedTuple):
    """What M MTP heads say of a micro-batch.

    Attributes:
      losses_MBT: weights times negative log-likelihoods, at the position that predicts. weights_MBT: these weights, 0
        where a sample has no token that far ahead. tokens_M: positions that each head's router counts.
    """

    losses_MBT: jax.Array
    weights_MBT: jax.Array
    tokens_M: jax.Array


class RoutedLosses(NamedTuple):
    """Of a routed decoder.

    Attributes:
      losses_BT: as of `LanguageModel.token_losses`. routing: stacked over the routed layers, MTP heads last.
      mtp: None where the heads did not run.
    """

    losses_BT: jax.Array
    routing: Routing
    mtp: MTPLosses | None = None


class LanguageModel(nnx.Module):
    """A decoder that reads the text fields of a batch; families with other inputs derive from it and override `embed`.

    Parameters live under `language/`, layers stacked on a leading axis.

    Args:
      config: of the family; its `text` is the decoder's.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.language = DECODERS[type(config.text)](
            config.text, rngs=rngs, dtype=jnp.dtype(config.param_dtype), remat=config.remat
        )

    def embed(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, T, D): token embeddings."""
        return self.language.embed(batch.tokens).astype(self.compute_dtype)

    def decoder_inputs(self, batch: Batch, *, max_image_patches: int | None = None) -> tuple[jax.Array, dict[str, Any]]:
        """Return the decoder's inputs: embeddings (B, T, D), and further arguments of a family."""
        return self.embed(batch, max_image_patches=max_image_patches), {}

    def __call__(
        self, batch: Batch, *, max_sample_length: int | None = None, max_image_patches: int | None = None
    ) -> jax.Array:
        """(B, T, D): hidden states after the final norm.

        Args:
          max_sample_length: static promise that no sample has more tokens. max_image_patches: no image more patches.
        """
        inputs_BTD, options = self.decoder_inputs(batch, max_image_patches=max_image_patches)
        with jax.named_scope("language"):
            return self.language(
                inputs_BTD,
                batch.positions,
                batch.segment_ids,
                segment_lengths=batch.segment_lengths,
                max_sample_length=max_sample_length,
                **options,
            )

    def head_kernel(self) -> jax.Array:
        """(D, V) output matrix."""
        return self.language.head_kernel()

    def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """(.., D) hidden states -> (.., V) float32. For a few places at a time; training uses `token_losses`.

        Args:
          kernel: (D, V) the output matrix, where the caller has it at hand.
        """
        return ops.linear(hidden, self.head_kernel() if kernel is None else kernel).astype(jnp.float32)

    def token_losses(
        self, batch: Batch, *, chunk: int, max_sample_length: int | None = None, max_image_patches: int | None = None
    ) -> jax.Array:
        """(B, T) float32: loss_weights times the negative log-likelihood of `targets`; full logits never exist.

        Args:
          chunk: static number of tokens whose logits exist at one time.
        """
        batch, order = _as_attention_wants(batch)
        hidden_BTD = self(batch, max_sample_length=max_sample_length, max_image_patches=max_image_patches)
        return _in_order(self._losses(hidden_BTD, batch, chunk), order)

    def pipelined_losses(
        self,
        batch: Batch,
        coefficients_BT: jax.Array,
        *,
        chunk: int,
        max_sample_length: int | None = None,
        max_image_patches: int | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """On a mesh with pipeline stages: the sum of coefficients times token losses, differentiable, and the losses as
        of `token_losses`, which are not.
        """
        batch, order = _as_attention_wants(batch)
        if order is not None:
            coefficients_BT = jnp.take(coefficients_BT, order, axis=-1)
        inputs_BTD = self.embed(batch, max_image_patches=max_image_patches)
        decoder, structure = self.language, jax.tree.structure(self.language.layers)
        norm = jax.tree.structure(decoder.norm)

        def stage(leaves, x, fields):
            with jax.named_scope("language"):
                return decoder.through(
                    jax.tree.unflatten(structure, leaves),
                    x,
                    fields["positions"],
                    fields["segment_ids"],
                    segment_lengths=fields.get("segment_lengths"),
                    max_sample_length=max_sample_length,
                )

        def last(leaves, x, fields):
            *of_norm, head = leaves
            with jax.named_scope("loss"):
                hidden = jax.tree.unflatten(norm, of_norm)(x)
                return ops.cross_entropy(hidden, head, fields["targets"], fields["loss_weights"], chunk=chunk)

        names = ("positions", "segment_ids", "segment_lengths", "targets", "loss_weights")
        fields = {name: value for name in names if (value := getattr(batch, name)) is not None}
        of_norm = _part(decoder.norm)
        ending = Part([*of_norm.leaves, self.head_kernel()], [*of_norm.names, ("embed", "vocab")])
        stack = _part(decoder.layers)
        numerator, losses_BT = pipelined_loss(stage, last, stack, ending, inputs_BTD, fields, coefficients_BT)
        return numerator, _in_order(losses_BT, order)

    def routed_losses(
        self,
        batch: Batch,
        *,
        chunk: int,
        max_sample_length: int | None = None,
        max_image_patches: int | None = None,
        mtp: bool = False,
    ) -> RoutedLosses:
        """As `token_losses`, and what the routers of a routed decoder did.

        Args:
          mtp: also run the model's MTP heads.
        """
        batch, order = _as_attention_wants(batch)
        inputs_BTD, options = self.decoder_inputs(batch, max_image_patches=max_image_patches)
        bounds = dict(segment_lengths=batch.segment_lengths, max_sample_length=max_sample_length)
        with jax.named_scope("language"):
            hidden_BTD, routing = self.language.routed(
                inputs_BTD, batch.positions, batch.segment_ids, **bounds, **options
            )
        losses_BT = _in_order(self._losses(hidden_BTD, batch, chunk), order)
        if not mtp:
            return RoutedLosses(losses_BT, routing)

        def ahead(values, steps):
            """Values of the token `steps` on in its own sample; 0 past the end of the row."""
            moved = following(_in_order(values, order, axis=1), steps)
            return moved if order is None else jnp.take(moved, order, axis=1)

        steps = range(1, self.language.config.mtp_layers + 1)
        ids = [jnp.where(ahead(batch.segment_ids, k) == batch.segment_ids, batch.segment_ids, 0) for k in steps]
        with jax.named_scope("language"):
            hidden, of_heads = self.language.predict_ahead(
                hidden_BTD, [ahead(inputs_BTD, k) for k in steps], batch.positions, batch.segment_ids, ids, **bounds
            )
        losses, weights = [], []
        for k, own_BT, hidden_BTD in zip(steps, ids, hidden, strict=True):
            # A label belongs to a token: head k is taught it k positions before the main model is, in the same sample.
            weights_BT = jnp.where(own_BT > 0, ahead(batch.loss_weights, k), 0)
            moved = batch.replace(targets=ahead(batch.targets, k), loss_weights=weights_BT)
            losses.append(_in_order(self._losses(hidden_BTD, moved, chunk), order))
            weights.append(_in_order(weights_BT, order))
        tokens_M = jnp.stack([jnp.sum((own_BT > 0).astype(jnp.float32)) for own_BT in ids])
        routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), routing, of_heads)
        return RoutedLosses(losses_BT, routing, MTPLosses(jnp.stack(losses), jnp.stack(weights), tokens_M))

    def _losses(self, hidden_BTD, batch: Batch, chunk: int) -> jax.Array:
        with jax.named_scope("loss"):

            def loss(hidden, targets, weights, head):
                return ops.cross_entropy(hidden, head, targets, weights, chunk=chunk)

            return within_rows(
                loss, (hidden_BTD, batch.targets, batch.loss_weights), (self.head_kernel(),), [("embed", "vocab")]
            )


def _part(module: nnx.Module) -> Part:
    """A module's parameters with the names of their dims, in the order of its pytree."""
    variables = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return Part(jax.tree.leaves(module), [variable.get_metadata().get("out_sharding") for variable in variables])


def _as_attention_wants(batch: Batch) -> tuple[Batch, np.ndarray | None]:
    """The batch with its token places in the order that attention over the mesh wants, and that order.

    Every field goes along, positions and the visual tokens' places too, so that nothing else changes; counts of
    neighbouring places (`segment_lengths`) mean nothing then, and the form of attention that reorders reads none.
    """
    order = order_of_places(batch.tokens.shape[-1])
    if order is None:
        return batch, None
    names = ("tokens", "targets", "loss_weights", "segment_ids", "positions", "visual_index")
    fields = {name: getattr(batch, name) for name in names}
    moved = {name: jnp.take(value, order, axis=-1) for name, value in fields.items() if value is not None}
    return batch.replace(**moved), order


def _in_order(values: jax.Array, order: np.ndarray | None, axis: int = -1) -> jax.Array:
    """Values of places as they lay in the batch."""
    return values if order is None else jnp.take(values, np.argsort(order), axis=axis)
