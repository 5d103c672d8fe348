"""MindVL from two published folders: the vision tower of a Qwen2.5-VL and a Qwen3 or Qwen2.5 language model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig
from mindvl_jax.models.qwen.config import QwenConfig
from mindvl_jax.models.layers.projector import Projector
from mindvl_jax.parallel.rules import parameter_shardings
from mindvl_jax.weights.hf_config import WeightsError, read_config
from mindvl_jax.weights.load import load_parameters

_SECTION_SHARES = (16, 24, 24)  # of 64 frequencies: the published split of M-RoPE


def assembled_config(vision: MindVLConfig, text: TextConfig, *, mrope: bool) -> MindVLConfig:
    """The configuration of tower and decoder together.

    Args:
      mrope: whether the decoder counts positions in three sections (as the nearest public pairing does) or in one.

    Raises:
      WeightsError: a head dim that the published sections cannot be scaled to.
    """
    sections = None
    if mrope:
        half = text.head_dim // 2
        if half % 8:
            raise WeightsError(f"head_dim {text.head_dim} cannot be split into M-RoPE sections in the published shares 16:24:24; use one-dimensional positions")
        sections = tuple(share * half // 64 for share in _SECTION_SHARES)
    text = TextConfig(**{**text.model_dump(), "rope": "mrope" if mrope else "1d", "mrope_section": sections})
    return vision.model_copy(update=dict(text=text))


def assemble(vision_folder: str | Path, language_folder: str | Path, *, mrope: bool = True, seed: int = 0, mesh: Mesh | None = None, dtype=None) -> tuple[MindVLConfig, dict[str, jax.Array]]:
    """Configuration and parameters of a MindVL whose projector is new.

    Args:
      vision_folder: a Qwen2.5-VL (or MindVL) folder; its language model and merger are not read.
      language_folder: a Qwen3 or Qwen2.5 folder.
      seed: of the projector, which starts at random (its width belongs to the language model).

    Raises:
      WeightsError: folders of other families, or anything `load_parameters` refuses.
    """
    vision_config, text_config = read_config(Path(vision_folder)), read_config(Path(language_folder))
    if not isinstance(vision_config, MindVLConfig):
        raise WeightsError(f"{vision_folder}: a language model without a vision tower; expected Qwen2.5-VL or MindVL")
    if not isinstance(text_config, QwenConfig):
        raise WeightsError(f"{language_folder}: a vision-language model; expected Qwen3 or Qwen2.5")
    largest = max(vision_config.image_token_id, vision_config.video_token_id, vision_config.vision_start_token_id, vision_config.vision_end_token_id)
    if largest >= text_config.text.vocab_size:
        raise WeightsError(f"{vision_folder} uses token {largest} as a mark of media, but {language_folder} has a vocabulary of {text_config.text.vocab_size}")
    config = assembled_config(vision_config, text_config.text, mrope=mrope)
    parameters = load_parameters(vision_folder, vision_config, mesh=mesh, dtype=dtype, parts=("vision/",))
    parameters |= load_parameters(language_folder, text_config, mesh=mesh, dtype=dtype)
    kind = jnp.dtype(dtype) if dtype is not None else parameters["language/norm/scale"].dtype
    return config, parameters | _new_projector(config, seed, kind, mesh)


def _new_projector(config: MindVLConfig, seed: int, dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    projector = Projector(config.vision.hidden_size, config.vision.merge_unit, config.text.hidden_size, eps=config.vision.rms_norm_eps, rngs=nnx.Rngs(seed), dtype=dtype)
    variables = {"projector/" + "/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(projector, nnx.Param))}
    values = {path: variable.get_value() for path, variable in variables.items()}
    if mesh is None:
        return values
    names = {path: variable.get_metadata().get("out_sharding") for path, variable in variables.items()}
    return jax.device_put(values, parameter_shardings(names, {path: value.shape for path, value in values.items()}, mesh))
