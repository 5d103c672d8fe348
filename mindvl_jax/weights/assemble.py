"""A model from two published folders: the vision tower of one, the language model of another, a new projector between
them.
"""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.rules import parameter_shardings
from mindvl_jax.weights.errors import WeightsError
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.mapping import mapping_of, read_config


def assemble(
    vision_folder: str | Path,
    language_folder: str | Path,
    *,
    mrope: bool = True,
    seed: int = 0,
    mesh: Mesh | None = None,
    dtype=None,
) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Configuration and parameters of a model whose projector is new.

    Args:
      vision_folder: a Qwen2.5-VL (or MindVL) folder; its language model and merger are not read.
      language_folder: a Qwen3 or Qwen2.5 folder.
      seed: of the projector, which starts at random (its width belongs to the language model).

    Raises:
      WeightsError: folders of other families, or anything `load_parameters` refuses. UserError: a decoder that does not
        suit the tower.
    """
    tower, decoder = read_config(Path(vision_folder)), read_config(Path(language_folder))
    join = mapping_of(tower).assemble
    if join is None:
        raise WeightsError(
            f"{vision_folder}: a language model without a vision tower, or one that serves no other decoder; "
            "expected Qwen2.5-VL or MindVL"
        )
    if hasattr(decoder, "vision"):
        raise WeightsError(f"{language_folder}: a vision-language model; expected Qwen3 or Qwen2.5")
    config = join(tower, decoder, mrope=mrope)
    parameters = load_parameters(vision_folder, tower, mesh=mesh, dtype=dtype, parts=("vision/",))
    parameters |= load_parameters(language_folder, decoder, mesh=mesh, dtype=dtype)
    kind = dtype if dtype is not None else parameters["language/norm/scale"].dtype
    return config, parameters | _new_parts(config, set(parameters), seed, kind, mesh)


def _new_parts(config: ModelConfig, given: set[str], seed: int, dtype, mesh: Mesh | None) -> dict[str, jax.Array]:
    """Fresh values of the parameters that neither folder gave; under jit the others are dead code and cost nothing."""
    outline = outline_of(config)
    paths = [path for path in outline.shapes if path not in given]

    def initial(key: jax.Array) -> dict[str, jax.Array]:
        fresh = outline.initial(key)
        return {path: fresh[path].astype(dtype) for path in paths}

    shardings = None
    if mesh is not None:
        shardings = parameter_shardings(
            {path: outline.axis_names[path] for path in paths},
            {path: outline.shapes[path].shape for path in paths},
            mesh,
        )
    return jax.jit(initial, out_shardings=shardings)(jax.random.key(seed))
