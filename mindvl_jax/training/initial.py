"""Parameters at the start of a run: fresh, or from another run or a Hugging Face folder."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.checkpoints.checkpoint import abstract_params
from mindvl_jax.core.params import Outline, Params, flatten
from mindvl_jax.training.state import initial_params


def starting_params(config: Config, outline: Outline, mesh: Mesh, console: Console) -> Params:
    """Parameters for step 0, on the mesh, in the model's parameter dtype.

    Raises:
      UserError: `run.init_from` holds another model; every parameter that differs is listed, up to ten.
    """
    source = config.run.init_from
    if source is None:
        return initial_params(outline, mesh, config.run.seed)
    from mindvl_jax.weights import open_model

    console.print(f"starting from the weights of {source}")
    given = flatten(nnx.state(open_model(source, mesh=mesh).model, nnx.Param))
    target = abstract_params(outline, mesh)
    problems = [f"{path}: not in this model's configuration" for path in given if path not in target]
    for path, want in target.items():
        if path not in given:
            problems.append(f"{path}: missing there")
        elif given[path].shape != want.shape:
            problems.append(f"{path}: shape {given[path].shape} there, {want.shape} in the configuration")
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(
            f"run.init_from={source} does not fit the model of the configuration in {len(problems)} parameters; "
            "use the same model section, or leave init_from out:\n  " + "\n  ".join(problems[:10]) + more
        )
    # Copies: training donates these buffers, and the opened model must not be left with dead ones.
    place = jax.jit(
        lambda params: {path: value.astype(target[path].dtype) for path, value in params.items()},
        out_shardings={path: want.sharding for path, want in target.items()},
    )
    return place({path: given[path] for path in target})
