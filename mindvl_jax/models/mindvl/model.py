"""MindVL: vision tower, projector and language model as one differentiable function of a packed batch; and the decoder alone.

B rows, T tokens, P patches, D language width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mindvl_jax.models.batch import Batch
from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.layers.decoder import Decoder
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.models.layers.visual_tokens import place_visual
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.mindvl.vision import VisionTower
from npu_bridge import ops


class LanguageModel(nnx.Module):
    """A decoder by itself: reads the text fields of a batch. Its parameters live under `language/`, as in `MindVL`."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, param_dtype: str = "float32", compute_dtype: str = "float32", remat: str = "none"):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.language = Decoder(config, rngs=rngs, dtype=jnp.dtype(param_dtype), remat=remat)

    def embed(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, T, D): token embeddings."""
        return self.language.embed(batch.tokens).astype(self.compute_dtype)

    def __call__(self, batch: Batch, *, max_sample_length: int | None = None, max_image_patches: int | None = None) -> jax.Array:
        """(B, T, D): hidden states after the final norm.

        Args:
          max_sample_length: static promise that no sample has more tokens. max_image_patches: no image more patches.
        """
        inputs_BTD = self.embed(batch, max_image_patches=max_image_patches)
        with jax.named_scope("language"):
            return self.language(inputs_BTD, batch.positions, batch.segment_ids, segment_lengths=batch.segment_lengths,
                                 max_sample_length=max_sample_length)

    def head_kernel(self) -> jax.Array:
        """(D, V) output matrix."""
        return self.language.head_kernel()

    def logits(self, hidden: jax.Array, kernel: jax.Array | None = None) -> jax.Array:
        """(.., D) hidden states -> (.., V) float32. For a few places at a time; training uses `token_losses`.

        Args:
          kernel: (D, V) the output matrix, where the caller has it at hand.
        """
        return ops.linear(hidden, self.head_kernel() if kernel is None else kernel).astype(jnp.float32)

    def token_losses(self, batch: Batch, *, chunk: int, max_sample_length: int | None = None, max_image_patches: int | None = None) -> jax.Array:
        """(B, T) float32: loss_weights times the negative log-likelihood of `targets`; full logits never exist.

        Args:
          chunk: static number of tokens whose logits exist at one time.
        """
        hidden_BTD = self(batch, max_sample_length=max_sample_length, max_image_patches=max_image_patches)
        with jax.named_scope("loss"):
            return ops.cross_entropy(hidden_BTD, self.head_kernel(), batch.targets, batch.loss_weights, chunk=chunk)


class MindVL(LanguageModel):
    """The assembled model.

    Parameters live under `vision/`, `projector/` and `language/`; layers are stacked on a leading axis. Created under a mesh
    and logical axis rules (see `models.parameters.parameter`) they are placed at once; `nnx.eval_shape` builds it without memory.
    """

    def __init__(self, config: MindVLConfig, *, rngs: nnx.Rngs):
        super().__init__(config.text, rngs=rngs, param_dtype=config.param_dtype, compute_dtype=config.compute_dtype, remat=config.remat)
        dtype = jnp.dtype(config.param_dtype)
        self.config = config
        self.vision = VisionTower(config.vision, rngs=rngs, dtype=dtype, remat=config.remat)
        self.projector = Projector(config.vision.hidden_size, config.vision.merge_unit, config.text.hidden_size, eps=config.vision.rms_norm_eps, rngs=rngs, dtype=dtype)

    def visual_features(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, P / merge_unit, D): one visual token for each group of neighbouring patches, in window order."""
        with jax.named_scope("vision"):
            features = self.vision(batch.patches, batch.patch_positions, batch.patch_segment_ids, batch.patch_window_ids,
                                   image_lengths=batch.image_lengths, window_lengths=batch.window_lengths,
                                   max_image_patches=max_image_patches, dtype=self.compute_dtype)
        with jax.named_scope("projector"):
            return self.projector(features)

    def embed(self, batch: Batch, *, max_image_patches: int | None = None) -> jax.Array:
        """(B, T, D): token embeddings with visual tokens in their places. Text-only batches run the same program."""
        visual_BGD = self.visual_features(batch, max_image_patches=max_image_patches)
        return place_visual(super().embed(batch), visual_BGD, batch.visual_index)
