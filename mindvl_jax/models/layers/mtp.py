"""Multi-token prediction of DeepSeek-V3 (report section 2.2; published tensors of the layer after the last).

B rows, T tokens, D width, M heads, L layers.

Head k (counted from 1) reads the hidden state h of position t, of the main model after its final norm or of the head
before, and the embedding of token t + k, and predicts token t + k + 1:

    x = eh_proj [enorm(embedding of token t + k); hnorm(h)];  h' = decoder layer(x);  logits = head(norm(h'))

The order of the halves is that of the published weights and of the inference code of others; the report writes the
other order. Token table and output matrix are the main model's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.layers.config import DeepSeekV3TextConfig
from mindvl_jax.models.layers.latent_layer import LatentLayer
from mindvl_jax.models.layers.linear import Linear, RMSNorm
from mindvl_jax.models.layers.moe import Routing
from mindvl_jax.models.layers.stack import rematerialise, rematerialise_attention


class MTPHeads(nnx.Module):
    """All heads, stacked on a leading axis.

    Attributes:
      token_norm, hidden_norm, joint: enorm, hnorm, eh_proj. layer: routed layer. norm: shared_head.norm.
    """

    def __init__(self, config: DeepSeekV3TextConfig, *, rngs: nnx.Rngs, dtype):
        D, M = config.hidden_size, config.mtp_layers
        norm = dict(eps=config.rms_norm_eps, dtype=dtype, layers=M)
        self.token_norm, self.hidden_norm = RMSNorm(D, **norm), RMSNorm(D, **norm)
        self.joint = Linear(2 * D, D, ("embed", None), bias=False, rngs=rngs, dtype=dtype, layers=M)
        self.layer = LatentLayer(config, routed=True, layers=M, rngs=rngs, dtype=dtype)
        self.norm = RMSNorm(D, **norm)

    def head(self, number: int) -> MTPHeads:
        """One head: this module without its stack axis."""
        return jax.tree.map(lambda leaf: leaf[number], self)

    def join(self, following_BTD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        """Input of one head's layer, from the embeddings of following tokens and the hidden states."""
        return self.joint(jnp.concatenate([self.token_norm(following_BTD), self.hidden_norm(hidden_BTD)], -1))

    def __call__(
        self,
        hidden_BTD: jax.Array,
        following_BTD: Sequence[jax.Array],
        tables,
        segment_ids_BT: jax.Array,
        following_ids_BT: Sequence[jax.Array],
        remat: str,
        *,
        segment_lengths=None,
        max_sample_length: int | None = None,
    ) -> tuple[list[jax.Array], Routing]:
        """Hidden states of each head after its norm, and what each head's router did, stacked (M, ..).

        Args:
          hidden_BTD: of the main model after its final norm.
          following_BTD: for head k the decoder's inputs k positions on. Where there are none anything finite.
          tables: rotary, of the positions. segment_ids_BT: samples of packed rows, 0 is padding.
          following_ids_BT: for head k `segment_ids_BT`, 0 where the sample has no token k positions on: the router
            counts the other positions alone.
        """
        options = (segment_ids_BT, segment_lengths, max_sample_length)

        def attention(layer, x):
            return layer.attend(x, tables, *options)[0]

        def one(hidden, head, following, ids_BT):
            x = head.join(following, hidden)
            with jax.named_scope("attention"):
                x = x + rematerialise_attention(attention, remat)(head.layer, x)
            with jax.named_scope("moe"):
                out, routing = head.layer.moe(head.layer.norm2(x), ids_BT)
            return x + out, routing

        found, routings = [], []
        body = rematerialise(one, remat, looped=False)
        for number, (following, ids_BT) in enumerate(zip(following_BTD, following_ids_BT, strict=True)):
            head = self.head(number)
            with jax.named_scope("mtp"):
                hidden_BTD, routing = body(hidden_BTD, head, following, ids_BT)
                found.append(head.norm(hidden_BTD))
            routings.append(routing)
        return found, jax.tree.map(lambda *leaves: jnp.stack(leaves), *routings)


def following(x: jax.Array, steps: int) -> jax.Array:
    """Values `steps` positions on along the second axis, 0 past the end."""
    return jnp.pad(x[:, steps:], [(0, 0), (0, steps)] + [(0, 0)] * (x.ndim - 2))
