"""Low-rank adapters: selection of linear layers, and attachment to a model.

A layout maps module paths such as `language/layers/attention/query` to an `Adapter`. It comes from the `adapters`
section of a configuration (`weights.adapter_layout`) or from a PEFT folder (`weights.adapters`). The parameters
`lora_a`, `lora_b` and `lora_magnitude` stand beside the base `kernel`, stacked over layers like it, so freezing,
sharding, moments and checkpoints need no special case. The matrices of routed experts (`.../experts/gate`, no module
but an array (layers, experts, D, F)) have theirs under `.../experts/gate_adapter`.

Published linear layers that we keep apart (`attn.qkv` of the vision tower is query, key and value here) have one A in
PEFT. Named by their published name they share one `lora_a` here too, which stands under the first of them in sorted
order (`key`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import in_nf4
from mindvl_jax.models.layers.linear import Linear, parameter
from mindvl_jax.models.layers.lora import adapter_scale, initial_lora_a
from mindvl_jax.models.layers.moe import ExpertAdapter, Experts
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


def of_experts(module: str) -> bool:
    """Whether a path of a layout is a matrix of routed experts."""
    return module.split("/")[-2:-1] == ["experts"]


def kernel_path(module: str) -> str:
    """Path of the base matrix that an adapter of `module` changes."""
    return module if of_experts(module) else f"{module}/kernel"


def leaf_path(module: str, leaf: str) -> str:
    """Path of one of an adapter's parameters."""
    return f"{module}_adapter/{leaf}" if of_experts(module) else f"{module}/{leaf}"


def _kernel(model: nnx.Module, module: str) -> nnx.Param:
    return _at(model, module) if of_experts(module) else _module(model, module).kernel


def _set(model: nnx.Module, module: str, adapter: Adapter, **leaves: nnx.Param | None) -> None:
    """Put an adapter's parameters into the model."""
    if of_experts(module):
        experts, name = _at(model, module.rpartition("/")[0]), module.rpartition("/")[2]
        if not isinstance(experts, Experts):
            raise TypeError(f"{module} is no matrix of experts")
        setattr(experts, f"{name}_adapter", ExpertAdapter(leaves["lora_a"], leaves["lora_b"], adapter.scale))
        return
    linear = _module(model, module)
    for leaf, value in leaves.items():
        if value is not None:
            setattr(linear, leaf, value)
    linear.lora_scale = adapter.scale


def attach_values(model: nnx.Module, layout: Layout, values: Mapping[str, jax.Array]) -> nnx.Module:
    """Add adapters with given values, by path, to a model with values, in place.

    Each lies on the devices of its base kernel.
    """
    for path, adapter in sorted(layout.items(), key=lambda item: (item[1].shares is not None, item[0])):
        kernel = _kernel(model, path)
        *lead, in_name, out_name = kernel.get_metadata()["out_sharding"]
        place = kernel[...].sharding

        def put(leaf, *names, path=path, place=place, lead=lead):
            value = jnp.asarray(values[leaf_path(path, leaf)])
            where = (
                NamedSharding(
                    place.mesh, partition_spec((*lead, *names), value.shape, place.mesh, staged=path.startswith(STAGED))
                )
                if isinstance(place, NamedSharding)
                else place
            )
            return parameter(jax.device_put(value, where), (*lead, *names))

        own = put("lora_a", in_name, None) if adapter.shares is None else _module(model, adapter.shares).lora_a
        magnitude = put("lora_magnitude", out_name) if adapter.dora else None
        _set(model, path, adapter, lora_a=own, lora_b=put("lora_b", None, out_name), lora_magnitude=magnitude)
    return model


def attach(model: nnx.Module, layout: Layout, rngs: nnx.Rngs) -> nnx.Module:
    """Add the adapters of a layout to a model in place: A random, B zero, the magnitude the norm of the base column.

    The base parameters must exist already, so that their random values do not depend on the adapters.
    """
    for path, adapter in sorted(layout.items(), key=lambda item: (item[1].shares is not None, item[0])):
        kernel, names = (param := _kernel(model, path))[...], param.get_metadata()["out_sharding"]
        *lead, inputs, outputs = kernel.shape
        *lead_names, in_name, out_name = names
        if adapter.shares is None:
            drawn = initial_lora_a(rngs.params(), (*lead, inputs, adapter.rank))
            own = parameter(drawn, (*lead_names, in_name, None))
        else:
            own = _module(model, adapter.shares).lora_a
        zeros = parameter(jnp.zeros((*lead, adapter.rank, outputs), jnp.float32), (*lead_names, None, out_name))
        magnitude = parameter(base_magnitude(kernel), (*lead_names, out_name)) if adapter.dora else None
        _set(model, path, adapter, lora_a=own, lora_b=zeros, lora_magnitude=magnitude)
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
        a, b = params[leaf_path(adapter.shares or path, "lora_a")], params[leaf_path(path, "lora_b")]
        kernel, magnitude = params[kernel_path(path)], params.get(leaf_path(path, "lora_magnitude"))
        merged[kernel_path(path)] = fold(kernel, a, b, adapter.scale, magnitude)
    return merged


def _at(model: nnx.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("/"), model)


def _module(model: nnx.Module, path: str) -> Linear:
    module = _at(model, path)
    if not isinstance(module, Linear):
        raise TypeError(f"{path} is a {type(module).__name__}; adapters go on linear layers")
    return module
