"""Time npu_bridge takes to compile a program, and the share of JAX's own tracing and lowering."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


@case("emission")
def emission_case(settings: Settings) -> Iterator[Comparison]:
    """A decoder of 64 layers with its AdamW step on 2 x 2, from the JAX function to the written torch program: scanned
    (at most 1 s) and unrolled (at most 10 s).
    """
    for scan, most in ((True, 1.0), (False, 10.0)):
        yield _lowering(2 if settings.dry else 64, scan, most)


def _lowering(layers: int, scan: bool, most: float) -> Comparison:
    os.environ["NPU_BRIDGE_CACHE"] = "off"
    import jax

    import npu_bridge
    from npu_bridge import jaxcompat
    from npu_bridge.runtime.api import as_mesh
    from tests.bridge import decoder

    config = decoder.Config(layers=layers, scan=scan, fused=True)
    (step, state), data = decoder.make(config), decoder.batch(config)
    made: dict[str, float | str] = {}

    def anew() -> Callable:
        """Return a function that JAX has not traced yet."""
        jax.clear_caches()
        return lambda *arguments: step(*arguments)

    shardings = (decoder.specs(state), {name: jax.sharding.PartitionSpec("fsdp") for name in data})

    def write():
        lowered = npu_bridge.jit(anew(), mesh=decoder.MESH, in_shardings=shardings, donate_argnums=0).lower(state, data)
        made["lines"] = float(lowered.as_text().count("\n"))

    mesh = as_mesh(decoder.MESH)[0]

    def shaped(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    arguments = [jax.tree.map(shaped, tree, specs) for tree, specs in zip((state, data), shardings)]

    def jax_alone():
        with jaxcompat.abstract_mesh(mesh):
            jax.jit(anew(), donate_argnums=0).trace(*arguments).lower(lowering_platforms=("npu",))

    work = {"programs": 1.0}
    name = "scanned" if scan else "unrolled"
    return Comparison(
        f"{layers} layers, {name}",
        [Side("npu_bridge, to the text", write, work, made), Side("of this: JAX traces and lowers", jax_alone, work)],
        unit="programs",
        clock="cpu",
        note=f"Wanted: at most {most:g} s. Nothing is taken from a cache, neither the bridge's nor JAX's.",
    )
