"""Parameters at the start of a run: fresh, or from another run or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from mindvl_jax.checkpoints.checkpoint import abstract_params
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import NF4_LEAVES, Outline, Params, flatten
from mindvl_jax.models.adapters import base_magnitude, dequantized, is_adapter
from mindvl_jax.models.layers.lora import initial_lora_a
from mindvl_jax.models.outline import outline_of
from mindvl_jax.training import nf4_base
from mindvl_jax.training.state import initial_params
from mindvl_jax.weights.adapter_layout import layout_of
from mindvl_jax.weights.adapters import read_adapter, require_layout
from mindvl_jax.weights.resolve import open_model


def starting_params(config: Config, outline: Outline, mesh: Mesh, console: Console) -> Params:
    """Parameters for step 0, on the mesh, in the model's parameter dtype.

    Raises:
      UserError: `run.init_from` holds another model; every parameter that differs is listed, up to ten.
    """
    source = config.run.init_from
    if source is None and config.adapters is None:
        return initial_params(outline, mesh, config.run.seed)
    if config.adapters is not None:
        if source is None:
            params = initial_params(outline, mesh, config.run.seed)
        else:
            base = outline_of(config.model)
            params = starting_params(config.model_copy(update=dict(adapters=None)), base, mesh, console)
            if config.adapters.base == "nf4":
                params = nf4_base.hold(params, outline, mesh)
        return {**params, **starting_adapters(config, outline, params, mesh, console)}
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


def starting_adapters(
    config: Config, outline: Outline, base: Mapping[str, jax.Array], mesh: Mesh, console: Console
) -> Params:
    """Adapter parameters for step 0, on the mesh: fresh, or those of the PEFT folder `adapters.init_from`.

    Fresh ones leave the model as it is: B is zero, and DoRA's magnitude is the norm of the base column.

    Raises:
      UserError: the folder has other targets, another rank, alpha or kind than the configuration.
    """
    target = {path: want for path, want in abstract_params(outline, mesh).items() if is_adapter(path)}
    if (source := config.adapters.init_from) is not None:
        console.print(f"starting from the adapter of {source}")
        adapter = read_adapter(Path(source), config.model)
        require_layout(adapter.layout, layout_of(config.adapters, config.model), source)
        return {
            path: jax.device_put(jnp.asarray(adapter.parameters[path], want.dtype), want.sharding)
            for path, want in target.items()
        }

    def fresh(key: jax.Array, kernels: Mapping[str, jax.Array]) -> Params:
        made, plain = {}, dequantized(kernels, jnp.float32)
        for number, (path, want) in enumerate(sorted(target.items())):
            module, _, leaf = path.rpartition("/")
            if leaf == "lora_a":
                made[path] = initial_lora_a(jax.random.fold_in(key, number), want.shape)
            else:
                made[path] = (
                    jnp.zeros(want.shape, want.dtype) if leaf == "lora_b" else base_magnitude(plain[f"{module}/kernel"])
                )
        return made

    # Only DoRA reads the kernels: they may be most of the model.
    with_magnitude = {path.rpartition("/")[0] for path in target if path.endswith("/lora_magnitude")}
    kernels = {
        path: value
        for path, value in base.items()
        if path.rpartition("/")[0] in with_magnitude and path.endswith(("/kernel", *NF4_LEAVES))
    }
    make = jax.jit(fresh, out_shardings={path: want.sharding for path, want in target.items()})
    return make(jax.random.fold_in(jax.random.key(config.run.seed), 1), kernels)
