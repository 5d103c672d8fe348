"""A JAX function that is written differently for platform `npu`, without a trace of the choice in either program.

`jax.lax.platform_dependent` would leave a `stablehlo.case` in both.
"""

from functools import partial

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from npu_bridge import jaxcompat


def platform_function(name, default, on_npu):
    """-> function of arrays and static keywords that lowers to `on_npu` on platform `npu` and to `default` elsewhere.

    Both return one array of one shape and dtype. The result has no derivative of its own: use it inside a
    `jax.custom_vjp`.
    """
    primitive = Primitive(name)
    primitive.def_impl(lambda *args, **params: jax.jit(partial(default, **params))(*args))

    def abstract(*avals, **params):
        out = jaxcompat.result_shapes(default, tuple((a.shape, a.dtype) for a in avals), tuple(params.items()))
        return avals[0].update(shape=out.shape, dtype=out.dtype, sharding=None, weak_type=False)

    def batch(args, dims, **params):
        return jax.vmap(partial(default, **params), in_axes=dims)(*args), 0

    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(default, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_npu, multiple_results=False), platform=jaxcompat.PLATFORM)
    return primitive.bind
