"""Systems that draw pictures: what each adds to `pipeline.PipelineFolder`.

Legend: B images, S text tokens, E width of text states, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference.diffusion.pipeline import PipelineFolder, Wish
from mindvl_jax.models.flux import hf as flux_hf
from mindvl_jax.models.flux.config import FluxConfig
from mindvl_jax.models.flux.model import Flux, from_tokens, to_tokens
from mindvl_jax.models.frozen import clip_text, t5
from mindvl_jax.models.hf import ConfigReader, Rule
from mindvl_jax.models.sd3 import hf as sd3_hf
from mindvl_jax.models.sd3.config import Sd3Config
from mindvl_jax.models.sd3.model import Sd3
from mindvl_jax.weights.errors import read_json


class FluxFolder(PipelineFolder):
    """Flux.1: states of T5, the pooled ones of CLIP, tokens of 2 x 2 latents, a guidance scale that dev is told."""

    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    text_length, cfg = 512, 1.0

    def read(self, reader: ConfigReader) -> FluxConfig | None:
        self.clip = clip_text.ClipText.read(self.settings("text_encoder"))
        self.t5 = t5.T5Encoder.read(self.settings("text_encoder_2"))
        config = flux_hf.read_config(self.settings("transformer"), reader)
        if config is not None and config.channels != 4 * self.vae.latent_channels:
            reader.problems.append(
                f"the transformer reads {config.channels} channels a token, the autoencoder makes "
                f"{self.vae.latent_channels} a latent; expected 4 times as many"
            )
        return config

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = self.tokens("tokenizer", texts, None)
        pooled = self.run("text_encoder", lambda tensors, ids: clip_text.encode(self.clip, tensors, ids).pooled, ids)
        ids = self.tokens("tokenizer_2", texts, length)
        return self.run("text_encoder_2", lambda tensors, ids: t5.encode(self.t5, tensors, ids), ids), pooled

    def rules(self) -> Sequence[Rule]:
        return flux_hf.diffusers_rules(self.config)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return Flux(self.config, rngs=rngs)

    def velocity(self, model: Flux, x: jax.Array, times: jax.Array, condition: Any, wish: Wish) -> jax.Array:
        grid = (x.shape[2] // 2, x.shape[3] // 2)
        scale = jnp.full((len(x),), wish.guidance, jnp.float32) if self.config.guidance_embedding else None
        return from_tokens(model.velocity(to_tokens(x), times, *condition, grid=grid, guidance_B=scale), *grid)


class Sd3Folder(PipelineFolder):
    """Stable Diffusion 3: two CLIP encoders side by side, padded to the width of T5, whose states follow."""

    parts = (*FluxFolder.parts, "text_encoder_3", "tokenizer_3")
    text_length, cfg = 256, 7.0

    def read(self, reader: ConfigReader) -> Sd3Config | None:
        self.clips = [clip_text.ClipText.read(self.settings(part)) for part in ("text_encoder", "text_encoder_2")]
        self.t5 = t5.T5Encoder.read(self.settings("text_encoder_3"))
        config = sd3_hf.read_config(self.settings("transformer"), reader)
        if config is not None and config.channels != self.vae.latent_channels:
            reader.problems.append(
                f"the transformer reads {config.channels} channels, the autoencoder makes {self.vae.latent_channels}"
            )
        return config

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        states, pooled = [], []
        for config, ending in zip(self.clips, ("", "_2"), strict=True):
            ids = self.tokens(f"tokenizer{ending}", texts, None)
            both = self.run(
                f"text_encoder{ending}",
                lambda tensors, ids, config=config: clip_text.encode(config, tensors, ids)[1:],
                ids,
            )
            states.append(both[0])
            pooled.append(both[1])
        ids = self.tokens("tokenizer_3", texts, length)
        wide = self.run("text_encoder_3", lambda tensors, ids: t5.encode(self.t5, tensors, ids), ids)
        narrow = np.concatenate(states, -1)
        narrow = np.pad(narrow, ((0, 0), (0, 0), (0, wide.shape[-1] - narrow.shape[-1])))
        return np.concatenate([narrow, wide], 1), np.concatenate(pooled, -1)

    def levels(self, steps: int, tokens: int) -> np.ndarray:
        return self.schedule.published_levels(steps, tokens)

    def rules(self) -> Sequence[Rule]:
        return sd3_hf.diffusers_rules(self.config)

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return Sd3(self.config, rngs=rngs)

    def velocity(self, model: Sd3, x: jax.Array, times: jax.Array, condition: Any, wish: Wish) -> jax.Array:
        return model.velocity(x, times, *condition)


SYSTEMS: dict[str, type[PipelineFolder]] = {"FluxPipeline": FluxFolder, "StableDiffusion3Pipeline": Sd3Folder}
"""By the class that model_index.json names."""


def open_folder(folder: Path, dtype: str = "float32") -> PipelineFolder:
    """A pipeline folder, its settings read and checked.

    Raises:
      UserError: no model_index.json, or a pipeline that is not supported; the supported ones are named.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder}: no model_index.json; expected a pipeline folder in the layout of diffusers")
    name = read_json(index).get("_class_name")
    if not isinstance(name, str) or name not in SYSTEMS:
        raise UserError(f"{index}: pipeline {name!r} is not supported; supported: {', '.join(SYSTEMS)}")
    return SYSTEMS[name](folder, dtype)
