"""Low-rank adapters: selection of linear layers, and attachment to a model.

A layout maps module paths such as `language/layers/attention/query` to an `Adapter`. It comes from the `adapters`
section of a configuration (`weights.adapter_layout`) or from a PEFT folder (`weights.adapters`). The parameters
`lora_a`, `lora_b` and `lora_magnitude` stand beside the base `kernel`, stacked over layers like it, so freezing,
sharding, moments and checkpoints need no special case.

Published linear layers that we keep apart (`attn.qkv` of the vision tower is query, key and value here) have one A in
PEFT. Named by their published name they share one `lora_a` here too, which stands under the first of them in sorted
order (`key`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import in_nf4
from mindvl_jax.models.layers.linear import Linear, parameter
from mindvl_jax.models.layers.lora import adapter_scale, initial_lora_a
from mindvl_jax.models.layers.nf4 import BLOCK, Nf4, can_hold, dequantized_kernel, quantize
from mindvl_jax.parallel.rules import STAGED, partition_spec

LEAVES = ("lora_a", "lora_b", "lora_magnitude")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of one (stacked) linear layer.

    Attributes:
      rank, alpha: of every layer of the stack. rslora: scale by alpha / sqrt(rank). dora: has a magnitude.
      shares: module path whose `lora_a` this one uses; None for its own.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    shares: str | None = None

    @property
    def scale(self) -> float:
        return adapter_scale(self.alpha, self.rank, rslora=self.rslora)


Layout = Mapping[str, Adapter]


def is_adapter(path: str) -> bool:
    """Whether a parameter path belongs to an adapter."""
    return path.rsplit("/", 1)[-1] in LEAVES


def attach_values(model: nnx.Module, layout: Layout, values: Mapping[str, jax.Array]) -> nnx.Module:
    """Add adapters with given values, by path, to a model with values, in place.

    Each lies on the devices of its base kernel.
    """
    for path, adapter in sorted(layout.items(), key=lambda item: (item[1].shares is not None, item[0])):
        linear = _module(model, path)
        *lead, in_name, out_name = linear.kernel.get_metadata()["out_sharding"]
        place = linear.kernel[...].sharding

        def put(leaf, *names, path=path, place=place, lead=lead):
            value = jnp.asarray(values[f"{path}/{leaf}"])
            where = (
                NamedSharding(
                    place.mesh, partition_spec((*lead, *names), value.shape, place.mesh, staged=path.startswith(STAGED))
                )
                if isinstance(place, NamedSharding)
                else place
            )
            return parameter(jax.device_put(value, where), (*lead, *names))

        linear.lora_a = (
            put("lora_a", in_name, None) if adapter.shares is None else _module(model, adapter.shares).lora_a
        )
        linear.lora_b = put("lora_b", None, out_name)
        if adapter.dora:
            linear.lora_magnitude = put("lora_magnitude", out_name)
        linear.lora_scale = adapter.scale
    return model


def attach(model: nnx.Module, layout: Layout, rngs: nnx.Rngs) -> nnx.Module:
    """Add the adapters of a layout to a model in place: A random, B zero, the magnitude the norm of the base column.

    The base parameters must exist already, so that their random values do not depend on the adapters.
    """
    for path, adapter in sorted(layout.items(), key=lambda item: (item[1].shares is not None, item[0])):
        linear = _module(model, path)
        kernel, names = linear.kernel[...], linear.kernel.get_metadata()["out_sharding"]
        *lead, inputs, outputs = kernel.shape
        *lead_names, in_name, out_name = names
        if adapter.shares is None:
            linear.lora_a = parameter(
                initial_lora_a(rngs.params(), (*lead, inputs, adapter.rank)), (*lead_names, in_name, None)
            )
        else:
            linear.lora_a = _module(model, adapter.shares).lora_a
        linear.lora_b = parameter(jnp.zeros((*lead, adapter.rank, outputs), jnp.float32), (*lead_names, None, out_name))
        if adapter.dora:
            linear.lora_magnitude = parameter(base_magnitude(kernel), (*lead_names, out_name))
        linear.lora_scale = adapter.scale
    return model


def hold_in_nf4(model: nnx.Module, paths: Iterable[str]) -> nnx.Module:
    """Put the kernels of stacked linear layers into NF4, in place; layers outside stacks stay as they are.

    Raises:
      UserError: a matrix that is not a whole number of blocks.
    """
    for path in sorted(paths):
        linear = _module(model, path)
        kernel, names = linear.kernel[...], linear.kernel.get_metadata()["out_sharding"]
        if kernel.ndim != 3:
            continue
        inputs, outputs = kernel.shape[1:]
        if not can_hold(inputs, outputs):
            raise UserError(
                f"adapters.base: nf4 cannot hold {path}: {inputs} x {outputs} weights are not a whole number of blocks "
                f"of {BLOCK}"
            )
        # A block that reaches into the next row cannot be split: such matrices are whole on every device.
        whole_rows = inputs % BLOCK == 0
        of_codes = (names[2], names[1]) if whole_rows else (None, None)
        matrix = quantize(kernel)
        linear.kernel = None
        linear.nf4_codes = parameter(matrix.codes, (names[0], *of_codes))
        linear.nf4_absmax = parameter(matrix.absmax, (names[0], *(of_codes if whole_rows else (None,))))
    return model


def dequantized(params: Mapping[str, jax.Array], dtype) -> dict[str, jax.Array]:
    """Parameters by path, with a `kernel` in `dtype` for every matrix in NF4; the others as they are."""
    plain = {path: value for path, value in params.items() if not in_nf4(path)}
    expand = jax.jit(dequantized_kernel, static_argnums=1)
    for path, codes in params.items():
        module, _, leaf = path.rpartition("/")
        if leaf == "nf4_codes":
            plain[f"{module}/kernel"] = expand(Nf4(codes, params[f"{module}/nf4_absmax"]), jnp.dtype(dtype))
    return dict(sorted(plain.items()))


def base_magnitude(kernel: jax.Array) -> jax.Array:
    """DoRA's initial magnitude (.., F): the norm of each column of the base kernel (.., D, F), in float32."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2))


def merge_kernel(
    kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, magnitude: jax.Array | None = None
) -> jax.Array:
    """Base kernel (.., D, F) with its adapter folded in, computed in float32 and rounded once to the kernel's dtype."""
    merged = kernel.astype(jnp.float32) + scale * jnp.matmul(
        a.astype(jnp.float32), b.astype(jnp.float32), precision="highest"
    )
    if magnitude is not None:
        merged = merged * (magnitude / jnp.linalg.norm(merged, axis=-2))[..., None, :]
    return merged.astype(kernel.dtype)


def merge(params: Mapping[str, jax.Array], layout: Layout) -> dict[str, jax.Array]:
    """Parameters by path with every adapter folded into its kernel; the adapters' own leaves are gone."""
    merged = {path: value for path, value in params.items() if not is_adapter(path)}
    fold = jax.jit(merge_kernel, static_argnames=("scale",))
    for path, adapter in layout.items():
        a = params[f"{adapter.shares or path}/lora_a"]
        merged[f"{path}/kernel"] = fold(
            params[f"{path}/kernel"], a, params[f"{path}/lora_b"], adapter.scale, params.get(f"{path}/lora_magnitude")
        )
    return merged


def _module(model: nnx.Module, path: str) -> Linear:
    module = functools.reduce(getattr, path.split("/"), model)
    if not isinstance(module, Linear):
        raise TypeError(f"{path} is a {type(module).__name__}; adapters go on linear layers")
    return module
