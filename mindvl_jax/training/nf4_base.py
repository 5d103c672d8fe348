"""A base held in NF4 under adapters (`adapters.base: nf4`): what it cannot be combined with, and its start."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from mindvl_jax.checkpoints.checkpoint import abstract_params
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline, Params
from mindvl_jax.models.layers.nf4 import BLOCK, quantize
from mindvl_jax.parallel.rules import partition_spec


def require_possible(config: Config, outline: Outline, mesh: Mesh) -> None:
    """Refuse a moving average of codes, and a mesh that would cut blocks.

    Raises:
      UserError: naming the key, and for a mesh the first matrix and the axis.
    """
    if config.adapters is None or config.adapters.base is None:
        return
    if config.training.ema_decay is not None:
        raise UserError(
            "training.ema_decay keeps a float32 average of all parameters, which a base in four bits (adapters.base: "
            "nf4) does not have; leave one of the two out"
        )
    for path, codes in outline.shapes.items():
        module, _, leaf = path.rpartition("/")
        if leaf != "nf4_codes":
            continue
        absmax = outline.shapes[f"{module}/nf4_absmax"]
        axis = partition_spec(outline.axis_names[path], codes.shape, mesh)[-1]
        if axis is not None and absmax.shape[-1] % mesh.shape[axis]:
            raise UserError(
                f"mesh.{axis}={mesh.shape[axis]} would cut blocks of {BLOCK} weights of {module} "
                f"({2 * codes.shape[-1]} inputs, adapters.base: nf4); the axis must divide {absmax.shape[-1]}"
            )


def hold(params: Mapping[str, jax.Array], outline: Outline, mesh: Mesh) -> Params:
    """Parameters as the outline wants them: kernels that it has in NF4 are quantised, each dropped when it is done.

    Args:
      params: with `kernel`; consumed.
    """
    target, held = abstract_params(outline, mesh), dict(params)
    for path in [path for path in target if path.endswith("/nf4_codes")]:
        module = path.removesuffix("/nf4_codes")
        places = target[path].sharding, target[f"{module}/nf4_absmax"].sharding
        make = jax.jit(lambda kernel: ((made := quantize(kernel)).codes, made.absmax), out_shardings=places)
        held[path], held[f"{module}/nf4_absmax"] = make(held.pop(f"{module}/kernel"))
    return {path: held[path] for path in target if path in held}
