"""Nothing that JAX writes beside an operation is lost: each attribute is read, harmless for a reason, or refused by
name.
"""

import importlib
import pathlib
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compute_on import compute_on
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import SingleDeviceSharding
from jaxlib.mlir import ir

import npu_bridge
from npu_bridge import jaxcompat
from npu_bridge.compiler import attributes
from npu_bridge.compiler.importer import NOT_LOWERED, Importer
from npu_bridge.errors import UnsupportedError
from tests.bridge.harness import call_three_times

X = np.ones((4, 4), np.float32)
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def _names_of(dialect: str) -> dict[str, set[str]]:
    """Attributes of each operation, as the generated bindings name them."""
    source = importlib.import_module(f"jaxlib.mlir.dialects._{dialect}_ops_gen").__file__
    parts = re.split(r"OPERATION_NAME = \"[a-z]+\.", open(source).read())[1:]
    return {part.split('"', 1)[0]: set(re.findall(r'operation\.attributes\["([^"]+)"\]', part)) for part in parts}


def test_every_attribute_of_the_dialects_has_a_place():
    left_out = {word for words in NOT_LOWERED.values() for word in words.split()}
    unknown = {}
    for dialect in ("stablehlo", "chlo", "sdy"):
        for op, names in _names_of(dialect).items():
            missing = names - attributes.READ - set(attributes.HARMLESS)
            if missing and op not in left_out:
                unknown[op] = missing
    assert not unknown, unknown
    assert not attributes.READ & set(attributes.HARMLESS)
    assert all(len(reason.split()) > 2 for reason in attributes.HARMLESS.values())


def _imported(text: str, device: str = "cpu"):
    with jaxcompat.mlir.make_ir_context(), ir.Location.unknown():
        return Importer(ir.Module.parse(text), device).run([False])


@pytest.mark.parametrize("place", ["operation", "argument", "call"])
def test_an_attribute_nobody_knows_is_refused_with_its_name(place):
    mark = {p: "{mhlo.of_tomorrow = 3 : i32}" if p == place else "" for p in ("operation", "argument", "call")}
    text = f"""module {{
      func.func @main(%a: tensor<2xf32> {mark["argument"]}) -> tensor<2xf32> {{
        %0 = func.call @f(%a) {mark["call"]} : (tensor<2xf32>) -> tensor<2xf32>
        return %0 : tensor<2xf32>
      }}
      func.func private @f(%a: tensor<2xf32>) -> tensor<2xf32> {{
        %0 = stablehlo.sine %a {mark["operation"]} : tensor<2xf32>
        return %0 : tensor<2xf32>
      }}
    }}"""
    with pytest.raises(UnsupportedError, match="'mhlo.of_tomorrow'.* is unknown to the bridge and would be lost"):
        _imported(text)


def _offloaded(x):
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["h"], offload_src="device", offload_dst="pinned_host"
    )
    from jax.ad_checkpoint import checkpoint_name

    layer = jax.checkpoint(lambda x, w: (jnp.sin(checkpoint_name(x @ w, "h")), None), policy=policy)
    return jax.grad(lambda w: lax.scan(layer, x, w)[0].sum())(jnp.stack([x, x]))


def _computed_on_the_host(x):
    with compute_on("device_host"):
        y = jnp.sin(x)
    return y * 2


PLACED = {
    "device_put to a memory": lambda x: jax.device_put(jax.device_put(x * 2, HOST), DEVICE) + 1,
    "device_put to a sharding": lambda x: jax.device_put(
        x * 2, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    ),
    "a result in host memory": lambda x: jax.device_put(x * 2, HOST),
    "an offload policy": _offloaded,
    "compute_on": _computed_on_the_host,
    "compute_on a function": lambda x: compute_on("device_host")(jax.jit(jnp.sin))(x),
}


@pytest.mark.parametrize("name", PLACED)
def test_other_places_are_kept_or_refused(name):
    call_three_times(PLACED[name], X)
    for device in ("npu", "cuda"):
        compiled = npu_bridge.jit(PLACED[name], device=device)
        if name.startswith("compute_on"):
            with pytest.raises(UnsupportedError, match="host") as caught:
                compiled.lower(X)
            assert "test_attributes.py:" in str(caught.value), str(caught.value)
        else:
            assert "rt.memory." in compiled.lower(X).as_text()


def test_placements_that_only_a_module_says_are_refused_if_unknown():
    argument = (
        'func.func @main(%a: tensor<2xf32> {mhlo.memory_kind = "far_away"}) -> tensor<2xf32> { return %a : '
        "tensor<2xf32> }"
    )
    moved = (
        "func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> { %0 = stablehlo.custom_call "
        '@annotate_device_placement(%a) {mhlo.frontend_attributes = {_xla_buffer_placement = "far_away"}} : '
        "(tensor<2xf32>) -> tensor<2xf32> return %0 : tensor<2xf32> }"
    )
    note = (
        "func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> { %0 = stablehlo.sine %a {mhlo.frontend_attributes "
        '= {KEY = "host"}} : tensor<2xf32> return %0 : tensor<2xf32> }'
    )
    cases = (
        (argument, "argument 0 lives in far_away memory"),
        (moved, "placed in far_away memory"),
        (note.replace("KEY", "_xla_compute_type"), "compute_on asks the host"),
        (note.replace("KEY", "_xla_of_tomorrow"), "_xla_of_tomorrow = .* does not know"),
    )
    for text, words in cases:
        with pytest.raises(UnsupportedError, match=words):
            _imported(f"module {{ {text} }}", "npu")
    _imported(f"module {{ {note.replace('KEY', 'of_mine')} }}", "npu")
    body = "func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> { return %a : tensor<2xf32> }"
    with pytest.raises(UnsupportedError, match="'mhlo.of_tomorrow'"):
        _imported(f"module attributes {{mhlo.of_tomorrow = 1 : i32}} {{ {body} }}")


# ---- what JAX's own source writes
# ----------------------------------------------------------------------------------------------------------------

# Not by these: kernels of one accelerator, tensorflow, recorded modules. Their operations are refused.
_ELSEWHERE = ("pallas", "mosaic", "tpu_custom_call", "internal_test_util", "cudnn", "jax2tf", "triton")
# Refused as unknown, with the reason why they are in no table.
_UNKNOWN_ON_PURPOSE = {
    "indices_of_shape_operands": "dynamic shapes",
    "channel_id": "of ragged_all_to_all, which is lowered in another way",
    "jax.token": "an argument that orders side effects among programs",
}


def _sources() -> str:
    root = pathlib.Path(jax.__file__).parent
    files = [*root.glob("_src/**/*.py"), *root.glob("experimental/**/*.py")]
    return "\n".join(f.read_text() for f in files if not any(part in str(f) for part in _ELSEWHERE))


def test_every_attribute_that_jax_writes_has_a_place():
    """Operations, arguments, results, modules: the names in `attrs[..]` and `attributes[..]` of JAX's source, its notes
    to XLA (`_xla_...`), and the custom calls that it emits.
    """
    source = _sources()
    written = set(re.findall(r"""(?:attrs|attributes)\[["']([A-Za-z_.]+)["']\]""", source))
    assert {"mhlo.memory_kind", "tf.aliasing_output", "jax.result_info", "mhlo.num_replicas"} <= written
    unknown = written - attributes.READ - set(attributes.HARMLESS)
    assert unknown == set(_UNKNOWN_ON_PURPOSE)
    notes = set(re.findall(r"""["'](_xla_[a-z_]+|inlineable)["'](?=\]|:| *=)""", source))
    assert {"_xla_compute_type", "_xla_buffer_placement", "_xla_stream_annotation"} <= notes
    transfers = {"_xla_host_transfer_handler_name", "_xla_host_transfer_rendezvous"}  # of send and recv, refused
    assert notes - transfers <= set(attributes.NOTES) | set(attributes.PLACES)
    tables = (attributes.HARMLESS, attributes.CALLS, attributes.NOTES, attributes.PLACES)
    assert all(len(reason.split()) > 1 for table in tables for reason in table.values())


def test_every_custom_call_that_jax_writes_is_taken_for_a_reason_or_refused_by_name():
    call = r"""(?:custom_call\(\s*|call_target_name=(?:mlir\.)?(?:ir\.StringAttr\.get\(\s*)?)["']([A-Za-z_.$]+)["']"""
    found = set(re.findall(call, _sources()))
    assert {"LayoutConstraint", "ragged_all_to_all", "annotate_device_placement", "AllocateBuffer"} <= found
    references = {"Pin", "Unpin", "CreateBuffer"}  # of mutable arrays inside a program: memrefs, which have no storage
    lowered = {"annotate_device_placement", "ragged_all_to_all"}
    for target in found - references - lowered:
        text = f"""module {{ func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> {{
            %0 = stablehlo.custom_call @"{target}"(%a) : (tensor<2xf32>) -> tensor<2xf32>
            return %0 : tensor<2xf32> }} }}"""
        if target in attributes.CALLS:
            _imported(text)
        else:
            with pytest.raises(UnsupportedError, match=re.escape(repr(target))):
                _imported(text)


def _annotated(x, i):
    with set_xla_metadata(note="for XLA", _scheduling_group_id="1"):
        y = jnp.sin(x) @ x
    y = lax.dot(y, x, precision=lax.Precision.HIGHEST) + lax.dot(x, x, precision=lax.DotAlgorithmPreset.F32_F32_F32)
    y = jax.named_call(jnp.cos, name="part")(y) + x.at[i].get(
        mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )
    return jax.export.export(jax.jit(jnp.tanh), disabled_checks=[jax.export.DisabledSafetyCheck.platform()])(x).call(y)


@pytest.mark.parametrize("shape", ["4, 4", "a, b"])
def test_functions_exported_for_another_platform_are_called(shape):
    def inner(x):
        return lax.fori_loop(0, x.shape[0], lambda i, c: c + jnp.sin(x[i]) * i, x.sum(0)), x.reshape(-1) * 2

    argument = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
    exported = jax.export.export(jax.jit(inner), platforms=("cpu", "tpu"))(argument)
    call_three_times(
        lambda x: (exported.call(x)[0] + 1, exported.call(x * 2)),
        np.linspace(-1, 2, 16, dtype=np.float32).reshape(4, 4),
    )


def test_what_an_exported_function_has_of_its_platform_alone_is_refused_by_name():
    exported = jax.export.export(jax.jit(jnp.linalg.cholesky))(X)
    with pytest.raises(UnsupportedError, match="custom call 'lapack_"):
        npu_bridge.jit(lambda x: exported.call(x)).lower(X)


def test_notes_that_change_no_value_are_taken():
    call_three_times(_annotated, X, np.array([1, 0, 2, 3], np.int32), rtol=1e-4)
