"""Convert partitioned StableHLO to the intermediate form: calls inlined, attributes plain, shapes local, shardings
checked.

Every result's local shape is computed from its sharding and compared with the shape inferred from the operands, which
catches wrong partitioning. Problems are gathered and raised once.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from npu_bridge import jaxcompat
from npu_bridge.compiler import attributes, callbacks
from npu_bridge.compiler.elementwise import SAME_SHAPE
from npu_bridge.compiler.ir import (
    COMPLEX,
    ELEMENT_BYTES,
    Block,
    Layout,
    Location,
    MeshShape,
    Op,
    Program,
    Type,
    Value,
    body_kind,
)
from npu_bridge.compiler.partition import COMBINED_SCATTERS
from npu_bridge.compiler.primitives import PLACE_TARGET
from npu_bridge.errors import UnsupportedError

_NUMBERS = {"gather": stablehlo.GatherDimensionNumbers, "scatter": stablehlo.ScatterDimensionNumbers}
_FIELDS = {
    "gather": (
        "offset_dims",
        "collapsed_slice_dims",
        "operand_batching_dims",
        "start_indices_batching_dims",
        "start_index_map",
        "index_vector_dim",
    ),
    "scatter": (
        "update_window_dims",
        "inserted_window_dims",
        "input_batching_dims",
        "scatter_indices_batching_dims",
        "scattered_dims_to_operand_dims",
        "index_vector_dim",
    ),
    "dot_general": (
        "lhs_batching_dimensions",
        "rhs_batching_dimensions",
        "lhs_contracting_dimensions",
        "rhs_contracting_dimensions",
    ),
    "convolution": (
        "input_batch_dimension",
        "input_feature_dimension",
        "input_spatial_dimensions",
        "kernel_input_feature_dimension",
        "kernel_output_feature_dimension",
        "kernel_spatial_dimensions",
        "output_batch_dimension",
        "output_feature_dimension",
        "output_spatial_dimensions",
    ),
}
# Operations of the dialects that never reach the code generator, with the reason. tests/bridge/test_registry.py holds
# every operation of StableHLO, CHLO and Shardy against this table, the importer and the registry.
NOT_LOWERED = {
    "CHLO of infinities and conjugates, which jax writes in other ways": "is_inf is_neg_inf is_pos_inf conj",
    "dense linear algebra, which npu_bridge.primitives lowers in its own way": "cholesky triangular_solve",
    "host, tokens, asynchronous pairs": "infeed outfeed send recv after_all create_token async_start async_done tuple "
    "get_tuple_element",
    "dynamic shapes": "dynamic_broadcast_in_dim dynamic_conv dynamic_gather dynamic_iota dynamic_pad dynamic_reshape "
    "get_dimension_size "
    "set_dimension_size real_dynamic_slice torch_index_select constant_like",
    "quantised types": "uniform_quantize uniform_dequantize",
    "not reproducible across devices": "rng replica_id",
    "StableHLO that jax's lowering does not emit": "batch_norm_grad batch_norm_inference batch_norm_training "
    "broadcast collective_broadcast collective_reduce composite cross-replica-sum dot einsum if map "
    "return unary_einsum",
    "CHLO and sort, which npu_bridge.compiler.primitives lowers in its own way": "square top_k sort scan ragged_dot",
    "CHLO that jax's lowering does not emit": "_asin_acos_kernel mulhi broadcast_add broadcast_and "
    "broadcast_atan2 broadcast_compare broadcast_complex broadcast_divide broadcast_maximum broadcast_minimum "
    "broadcast_multiply "
    "broadcast_next_after broadcast_or "
    "broadcast_polygamma broadcast_power broadcast_remainder broadcast_select broadcast_shift_left "
    "broadcast_shift_right_arithmetic "
    "broadcast_shift_right_logical broadcast_subtract broadcast_xor broadcast_zeta",
    "Shardy's own bookkeeping, removed before code is written": "data_flow_edge func_data_flow_edge "
    "manual_computation mesh named_computation propagation_barrier replicated_to_unreduced reshard "
    "sharded_to_unreduced "
    "sharding_constraint sharding_group",
}
_SKIPPED = frozenset(
    {
        "sdy.sharding",
        "sdy.sharding_rule",
        "channel_handle",
        "precision_config",
        "mhlo.backend_config",
        "backend_config",
        "result_accuracy",
        "out_sharding",
        "api_version",
        "use_global_device_ids",
    }
)


# numpy dtypes without an MLIR buffer, and the integer types of their bits.
_BIT_TYPES = {
    "bf16": (ml_dtypes.bfloat16, np.uint16),
    "f8E4M3FN": (ml_dtypes.float8_e4m3fn, np.uint8),
    "f8E5M2": (ml_dtypes.float8_e5m2, np.uint8),
    "f8E4M3FNUZ": (ml_dtypes.float8_e4m3fnuz, np.uint8),
    "f8E5M2FNUZ": (ml_dtypes.float8_e5m2fnuz, np.uint8),
    "complex<f32>": (np.complex64, np.uint32),
    "complex<f64>": (np.complex128, np.uint64),
}

_BRACES = re.compile(r"\{([^{}]*)\}")
_MOVES = re.compile(r"\{([^{}]*)\}: *(\d+) *-> *(\d+)")
_AXIS = re.compile(r'"([^"]+)"(?::\((\d+)\)(\d+))?')


def _axes_of(text: str) -> tuple[str, ...]:
    """``"x", "y":(1)2`` -> ("x", "y:1:2")."""
    return tuple(f"{name}:{before}:{size}" if size else name for name, before, size in _AXIS.findall(text))


def dense_array(attr: ir.DenseElementsAttr, dtype: str) -> np.ndarray:
    """Return the elements of a constant. MLIR's bindings have no buffers of bfloat16 and 8-bit floats."""
    if dtype not in _BIT_TYPES:
        return np.array(attr)
    return parsed_array(str(attr), dtype, tuple(ir.RankedTensorType(attr.type).shape))


def parsed_array(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Parse the elements of ``dense<..>`` for types without a buffer in the bindings (and complex numbers)."""
    named, bits = _BIT_TYPES[dtype]
    if found := re.search(r'dense<"0x([0-9A-Fa-f]*)">', text):
        return np.frombuffer(bytes.fromhex(found[1]), named).reshape(shape)
    numbers = re.findall(
        r"0x[0-9A-Fa-f]+|[-+]?\d[\d.]*(?:[eE][-+]?\d+)?", text[text.index("dense<") + 6 : text.rindex("> :")]
    )
    kind = {np.complex64: np.float32, np.complex128: np.float64}.get(named, named)
    made = np.empty(len(numbers), kind)
    for n, number in enumerate(numbers):
        made[n] = np.array(int(number, 16), bits).view(kind) if number.startswith("0x") else float(number)
    made = made.view(named)  # pairs of numbers if complex
    return np.full(shape, made[0]) if made.size == 1 else made.reshape(shape)


def _plain(value: Any) -> Any:
    return list(value) if hasattr(value, "__iter__") and not isinstance(value, str) else value


class Importer:
    """Walk one module. `run` returns the Program."""

    def __init__(self, module: ir.Module, device: str = "cpu"):
        self.module, self.device = module, device
        self.functions = {f.sym_name.value: f for f in module.body.operations if f.operation.name == "func.func"}
        self.problems: list[str] = []
        self.mesh = self._read_meshes()
        self._layouts: dict[Any, Layout] = {}
        self._locations: dict[Any, Location] = {}
        self._caller = Location()  # the call whose function is being imported
        self._types: dict[tuple[ir.Type, Layout | None], Type] = {}

    # -- meshes, types, layouts -------------------------------------------------------------------------------------

    def _read_meshes(self) -> MeshShape:
        self.meshes: dict[str, MeshShape] = {}
        for op in self.module.body.operations:
            if op.operation.name == "sdy.mesh":
                mesh = sdy.MeshAttr(op.operation.attributes["mesh"])
                axes = tuple((sdy.MeshAxisAttr(a).name, sdy.MeshAxisAttr(a).size) for a in mesh.axes)
                devices = tuple(mesh.device_ids) or None
                self.meshes[ir.StringAttr(op.operation.attributes["sym_name"]).value] = MeshShape(axes, devices)
        real = {m for m in self.meshes.values() if m.axes}
        if len(real) > 1:
            self.problems.append(
                f"{len(real)} different meshes in one program: {sorted(map(str, real))}; use one mesh for all shardings"
            )
        return next(iter(real), MeshShape())

    def _axis(self, attr: ir.Attribute) -> str:
        ref = sdy.AxisRefAttr(attr)
        if ref.sub_axis_info is None:
            return ref.name
        info = sdy.SubAxisInfoAttr(ref.sub_axis_info)
        return f"{ref.name}:{info.pre_size}:{info.size}"

    def layout(self, attr: ir.Attribute) -> Layout:
        if attr not in self._layouts:
            sharding = sdy.TensorShardingAttr(attr)
            dims = tuple(
                tuple(self._axis(a) for a in sdy.DimensionShardingAttr(d).axes) for d in sharding.dimension_shardings
            )
            if len(sharding.unreduced_axes):
                self.problems.append(
                    f"unreduced sharding {attr} crosses a program boundary; reduce it inside the program"
                )
            self._layouts[attr] = dims
        return self._layouts[attr]

    def location(self, op: ir.Operation) -> Location:
        key = self._caller, op.location
        if key not in self._locations:
            scope, file, line = jaxcompat.read_location(op.location)
            if not file:  # inside a jitted function of jax: the user's call site
                file, line = self._caller.file, self._caller.line
            self._locations[key] = Location(jaxcompat.scope_in_call(self._caller.scope, scope), file, line)
        return self._locations[key]

    def local(self, ir_type: ir.Type, layout: Layout | None, where: Location, what: str) -> Type:
        """Return the local type on one device. Cached unless it is wrong, so that every use reports the problem."""
        key, found = (ir_type, layout), len(self.problems)
        if key in self._types:
            return self._types[key]
        made = self._local(ir_type, layout, where, what)
        if len(self.problems) == found:
            self._types[key] = made
        return made

    def _local(self, ir_type: ir.Type, layout: Layout | None, where: Location, what: str) -> Type:
        tensor = ir.RankedTensorType(ir_type)
        dtype = str(tensor.element_type)
        if dtype not in ELEMENT_BYTES:
            self.problems.append(f"{what} at {where}: element type {dtype} has no torch storage")
        shape = list(tensor.shape)
        if not tensor.has_static_shape:
            self.problems.append(
                f"{what} at {where}: dynamic shape {tensor}; the bridge needs every size fixed at compile time"
            )
            shape = [max(n, 1) for n in shape]
        for d, axes in enumerate(layout or ()):
            shards = self.mesh.size(axes)
            if shape[d] % shards:
                self.problems.append(
                    f"{what} at {where}: dimension {d} of size {shape[d]} is split over {axes}, {shards} "
                    "shards, unevenly; "
                    "pad it to a multiple or constrain it to be unsharded"
                )
            shape[d] //= shards
        return Type(tuple(shape), dtype)

    def result_layouts(self, op: ir.Operation) -> list[Layout]:
        attrs = op.attributes
        if op.name == "sdy.manual_computation":
            shardings = sdy.TensorShardingPerValueAttr(attrs["out_shardings"]).shardings
        elif "out_sharding" in attrs:
            shardings = [attrs["out_sharding"]]
        elif "sdy.sharding" in attrs:
            shardings = sdy.TensorShardingPerValueAttr(attrs["sdy.sharding"]).shardings
        else:
            return [() for _ in op.results]
        return [self.layout(s) for s in shardings]

    # -- program ------------------------------------------------------------------------------------------------------

    def run(self, donated: list[bool]) -> Program:
        """Import the module. Raises UnsupportedError with all problems."""
        main = self.functions["main"]
        for op in (self.module.operation, *(f.operation for f in self.functions.values())):
            self.problems += attributes.refused(op, self.device)
        env: dict[Any, Value] = {}
        params = []
        arg_attrs = (
            main.operation.attributes["arg_attrs"]
            if "arg_attrs" in main.operation.attributes
            else [{}] * len(main.arguments)
        )
        for i, (arg, attrs) in enumerate(zip(main.arguments, arg_attrs)):
            layout = self.layout(attrs["sdy.sharding"]) if "sdy.sharding" in attrs else ()
            value = Value(self.local(arg.type, layout, Location(), f"argument {i}"), layout)
            params.append(value)
            env[arg] = value
        body = Block(params)
        body.results = self.block(main.entry_block, env, body, {})
        if self.problems:
            raise UnsupportedError(list(dict.fromkeys(self.problems)))
        memory = {key: self._memory_kinds(main.operation, key) for key in ("arg_attrs", "res_attrs")}
        arguments = [bool(m) for m in memory["arg_attrs"] or [None] * len(params)]
        return Program(
            self.mesh,
            body,
            donated,
            host_arguments=arguments,
            host_results=memory["res_attrs"] or [None] * len(body.results),
        )

    def _memory_kinds(self, main: ir.Operation, key: str) -> list[bool | None]:
        """Whether each argument or result lies in the host's memory; None where the module does not say."""
        if key not in main.attributes:
            return []
        return [
            attributes.is_host(ir.StringAttr(attrs["mhlo.memory_kind"]).value) if "mhlo.memory_kind" in attrs else None
            for attrs in main.attributes[key]
        ]

    def block(self, block: ir.Block, env: dict[Any, Value], out: Block, manual: dict[str, None]) -> list[Value]:
        """Append the block's operations to `out` and return its results."""
        for view in block.operations:
            op = view.operation
            if op.name in ("func.return", "stablehlo.return", "sdy.return"):
                return [env[o] for o in op.operands]
            for result, value in zip(op.results, self.op(op, env, out, manual), strict=True):
                env[result] = value
        return []

    def region(
        self, region: ir.Region, env: dict[Any, Value], manual: dict[str, None], params: list[Value] | None = None
    ) -> Block:
        block = region.blocks[0]
        inner = dict(env)
        if params is None:
            params = [Value(self.local(a.type, None, Location(), "region argument")) for a in block.arguments]
        inner.update(zip(block.arguments, params))
        made = Block(params)
        made.results = self.block(block, inner, made, manual)
        return made

    def op(self, op: ir.Operation, env: dict[Any, Value], out: Block, manual: dict[str, None]) -> list[Value]:
        name = op.name.split(".", 1)[1]
        where = self.location(op)
        self.problems += [f"{op.name} at {where}: {text}" for text in attributes.refused(op, self.device)]
        if op.name in ("func.call", "sdy.named_computation"):
            return self._call(op, env, out, manual)
        if op.name == "sdy.manual_computation":
            return self._manual(op, env, out, manual)
        operands = [env[o] for o in op.operands]
        if name == "optimization_barrier":
            # New values for the same storage, so that common subexpressions across the barrier are not merged, which
            # preserves remat.
            made = Op("optimization_barrier", operands, [Value(v.type, v.layout) for v in operands], location=where)
            out.ops.append(made)
            return made.results
        if name in ("propagation_barrier", "sharding_constraint", "reshard"):
            return operands
        layouts = self.result_layouts(op)
        types = [self.local(r.type, lay, where, op.name) for r, lay in zip(op.results, layouts)]
        if name in SAME_SHAPE and any(v.shape != types[0].shape for v in operands):
            self.problems.append(
                f"{op.name} at {where}: local operand shapes {[v.shape for v in operands]} against result {types[0]}: "
                "Shardy left its operands apart; constrain them to one sharding"
            )
        results = [Value(t, lay) for t, lay in zip(types, layouts)]
        made = Op(name, operands, results, location=where)
        handler = getattr(self, f"_import_{name}", None)
        if op.name.startswith("sdy.") or (handler and op.name.startswith("stablehlo.")):
            if handler is None:
                self.problems.append(f"{op.name} at {where}: the bridge does not know this Shardy operation")
                return results
            return handler(op, made, out, env, manual)
        made.attrs = self.attributes(op, name)
        made.regions = [self.region(r, env, manual) for r in op.regions]
        out.ops.append(made)
        return results

    def attributes(self, op: ir.Operation, name: str) -> dict[str, Any]:
        """MLIR attributes as ints, lists, numpy arrays, strings or dicts of those."""
        found: dict[str, Any] = {}
        for item in op.attributes:
            key = item if isinstance(item, str) else item.name
            if key in _SKIPPED:
                continue
            attr = op.attributes[key]
            if key in ("dimension_numbers", "scatter_dimension_numbers", "dot_dimension_numbers"):
                numbers = {
                    **_NUMBERS,
                    "dot_general": stablehlo.DotDimensionNumbers,
                    "convolution": stablehlo.ConvDimensionNumbers,
                }[name]
                found.update({f: _plain(getattr(numbers(attr), f)) for f in _FIELDS[name]})
            elif isinstance(attr, ir.DenseElementsAttr) and name != "constant":
                found[key] = np.array(attr).tolist()
            elif isinstance(attr, (ir.IntegerAttr, ir.BoolAttr, ir.StringAttr, ir.FloatAttr)):
                found[key] = attr.value
            elif isinstance(attr, (ir.DenseI64ArrayAttr, ir.DenseBoolArrayAttr, ir.DenseI32ArrayAttr)):
                found[key] = list(attr)
            elif key == "comparison_direction":
                found[key] = stablehlo.ComparisonDirectionAttr(attr).value
            elif key == "fft_type":
                found[key] = stablehlo.FftTypeAttr(attr).value
            elif key == "compare_type":
                found[key] = stablehlo.ComparisonTypeAttr(attr).value
            elif key == "rng_algorithm":
                found[key] = stablehlo.RngAlgorithmAttr(attr).value
            elif not isinstance(attr, ir.DenseElementsAttr):
                found[key] = str(attr)
        return found

    # -- calls, manual computations -----------------------------------------------------------------------------------

    def _call(self, op: ir.Operation, env: dict[Any, Value], out: Block, manual: dict[str, None]) -> list[Value]:
        if op.name == "func.call":
            callee = self.functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value]
            block = callee.entry_block
        else:
            block = op.regions[0].blocks[0]
        inner = dict(zip(block.arguments, (env[o] for o in op.operands)))
        before, self._caller = self._caller, self.location(op)
        try:
            return self.block(block, inner, out, manual)
        finally:
            self._caller = before

    def _manual(self, op: ir.Operation, env: dict[Any, Value], out: Block, manual: dict[str, None]) -> list[Value]:
        axes = dict(manual)
        axes.update(
            dict.fromkeys(
                a if isinstance(a, str) else ir.StringAttr(a).value
                for a in sdy.ManualAxesAttr(op.attributes["manual_axes"])
            )
        )
        ins = sdy.TensorShardingPerValueAttr(op.attributes["in_shardings"]).shardings
        block = op.regions[0].blocks[0]
        inner = dict(env)
        for arg, operand, sharding in zip(block.arguments, op.operands, ins):
            # Inside, types are local in the manual axes already; shardings name only the free axes.
            layout = tuple(tuple(a for a in d if a.partition(":")[0] not in axes) for d in self.layout(sharding))
            value = env[operand]
            inside = self.local(arg.type, layout, self.location(op), "shard_map argument")
            if inside.shape != value.shape:
                self.problems.append(
                    f"shard_map at {self.location(op)}: argument has local shape {value.shape}, the body wants {inside}"
                )
            inner[arg] = self._relabel(value, layout, op, out)
        results = self.block(block, inner, out, axes)
        return [self._relabel(v, layout, op, out) for v, layout in zip(results, self.result_layouts(op))]

    def _relabel(self, value: Value, layout: Layout, op: ir.Operation, out: Block) -> Value:
        """Relabel a shard: inside a manual computation its manual axes do not count as a split."""
        made = Op("relabel", [value], [Value(value.type, layout)], {"layout": layout}, location=self.location(op))
        out.ops.append(made)
        return made.result

    # -- single operations --------------------------------------------------------------------------------------------

    def _import_constant(self, op, made, out, env, manual):
        value = made.result
        if value.dtype in COMPLEX:
            array = parsed_array(
                str(op).split(" loc(")[0], value.dtype, tuple(ir.RankedTensorType(op.results[0].type).shape)
            )
            if array.size and (array == array.reshape(-1)[0]).all():
                made.attrs["splat"] = complex(array.reshape(-1)[0])
            else:
                made.attrs |= {"array": array, "dims": [list(a) for a in value.layout] or [[] for _ in value.shape]}
            out.ops.append(made)
            return made.results
        attr = ir.DenseElementsAttr(op.attributes["value"])
        if attr.is_splat:
            scalar = attr.get_splat_value().value
            made.attrs["splat"] = bool(scalar) if value.dtype == "i1" else scalar
        else:
            made.attrs["array"] = dense_array(attr, value.dtype)
            made.attrs["dims"] = [list(a) for a in value.layout] or [[] for _ in value.shape]
        out.ops.append(made)
        return made.results

    def _import_iota(self, op, made, out, env, manual):
        dim = ir.IntegerAttr(op.attributes["iota_dimension"]).value
        made.attrs = {"dim": dim, "axes": made.result.layout[dim] if made.result.layout else ()}
        out.ops.append(made)
        return made.results

    def _import_slice(self, op, made, out, env, manual):
        made.attrs = self.attributes(op, "slice")
        whole = ir.RankedTensorType(op.operands[0].type).shape
        for d, (low, high, step) in enumerate(
            zip(*(made.attrs[k] for k in ("start_indices", "limit_indices", "strides")))
        ):
            if (low, high, step) == (0, whole[d], 1):
                made.attrs["limit_indices"][d] = made.operands[0].shape[d]
            elif whole[d] != made.operands[0].shape[d]:
                self.problems.append(f"slice at {made.location}: dimension {d} is sliced while it is sharded")
        out.ops.append(made)
        return made.results

    def _import_while(self, op, made, out, env, manual):
        def params():
            return [Value(r.type, r.layout) for r in made.results]

        for operand, result in zip(made.operands, made.results):
            if operand.type != result.type:
                self.problems.append(
                    f"while at {made.location}: carried value enters as {operand.type} and is {result.type} inside"
                )
        made.regions = [self.region(r, env, manual, params()) for r in op.regions]
        out.ops.append(made)
        return made.results

    def _import_case(self, op, made, out, env, manual):
        made.regions = [self.region(r, env, manual, []) for r in op.regions]
        out.ops.append(made)
        return made.results

    def _import_gather(self, op, made, out, env, manual):
        made.attrs = self.attributes(op, "gather")
        self._indexed_shards(op, made, made.operands[0], "start_index_map")
        # An unsharded window dimension: its slice size is the local size.
        full = ir.RankedTensorType(op.operands[0].type).shape
        sizes = made.attrs["slice_sizes"]
        for d, n in enumerate(sizes):
            if n == full[d] and d not in made.attrs["start_index_map"]:
                sizes[d] = made.operands[0].shape[d]
        out.ops.append(made)
        return made.results

    def _import_scatter(self, op, made, out, env, manual):
        made.attrs = self.attributes(op, "scatter")
        made.regions = [self.region(op.regions[0], env, manual)]
        if len(made.results) != 1:
            self.problems.append(
                f"scatter at {made.location}: {len(made.results)} arrays scattered at once; scatter them one by one"
            )
        self._indexed_shards(op, made, made.results[0], "scattered_dims_to_operand_dims")
        out.ops.append(made)
        return made.results

    def _indexed_shards(self, op, made, value: Value, key: str) -> None:
        """An indexed dimension may be sharded: each device handles the indices that fall into its shard."""
        made.attrs["shards"] = {d: value.layout[d] for d in made.attrs[key] if value.layout and value.layout[d]}
        made.attrs["global_sizes"] = {d: ir.RankedTensorType(op.operands[0].type).shape[d] for d in made.attrs[key]}

    def _import_custom_call(self, op, made, out, env, manual):
        target = ir.StringAttr(op.attributes["call_target_name"]).value
        if target in attributes.CALLS:
            return made.operands
        if target == "annotate_device_placement":
            note = ir.DictAttr(op.attributes["mhlo.frontend_attributes"])["_xla_buffer_placement"]
            return self._placed(made, attributes.is_host(ir.StringAttr(note).value), out)
        if target == "ragged_all_to_all":
            return self._ragged_all_to_all(op, made, out)
        if not target.startswith(jaxcompat.CALL_PREFIX) or "bridge.params" not in op.attributes:
            self.problems.append(
                f"custom call {target!r} at {made.location}: unknown to the bridge; define it with "
                "npu_bridge.jaxcompat.define_operator"
            )
            return made.results
        record = ast.literal_eval(ir.StringAttr(op.attributes["bridge.params"]).value)
        if target == PLACE_TARGET:
            return self._placed(made, record["params"]["memory"] == "host", out)
        if target == callbacks.TARGET:
            made.name, made.attrs = "callback", record["params"]
            out.ops.append(made)
            return made.results
        made.name = "kernel"
        made.attrs = {"name": target, "params": record["params"], "part": record["part"], "count": record["results"]}
        out.ops.append(made)
        return made.results

    def _ragged_all_to_all(self, op: ir.Operation, made: Op, out: Block) -> list[Value]:
        groups = ir.DenseElementsAttr(ir.DictAttr(op.attributes["backend_config"])["replica_groups"])
        made.name, made.attrs = "ragged_all_to_all", {"axes": self.group_axes(np.array(groups).tolist(), made)}
        if any(axes for v in (*made.operands, *made.results) for axes in v.layout):
            self.problems.append(
                f"ragged_all_to_all at {made.location}: its operands are split over axes outside of the shard_map; "
                "make all axes of the mesh manual"
            )
        out.ops.append(made)
        return made.results

    def _placed(self, made: Op, host: bool, out: Block) -> list[Value]:
        made.name, made.attrs = "place", {"memory": "host" if host else "device"}
        out.ops.append(made)
        return made.results

    # -- collectives
    # ----------------------------------------------------------------------------------------------------

    # Shardy's collective attributes have no Python bindings: parse their text.

    def _lists(self, attr: ir.Attribute) -> list[tuple[str, ...]]:
        """``[{"x"}, {"y", "z":(1)2}]``: axis references of each dimension."""
        return [_axes_of(group) for group in _BRACES.findall(str(attr))]

    def _import_all_gather(self, op, made, out, env, manual):
        if op.name.startswith("sdy."):
            made.attrs = {"dims": self._lists(op.attributes["gathering_axes"])}
        else:
            attrs = self.attributes(op, "all_gather")
            made.attrs = {"dims": self._one_dim(made, attrs["all_gather_dim"], attrs["replica_groups"])}
            if len(made.operands) != 1:
                self.problems.append(f"all_gather at {made.location}: several arrays gathered by one operation")
        out.ops.append(made)
        return made.results

    def _one_dim(self, made: Op, dim: int, groups: list[list[int]]) -> list[tuple[str, ...]]:
        dims: list[tuple[str, ...]] = [() for _ in made.operands[0].shape]
        dims[dim] = self.group_axes(groups, made)
        return dims

    def _import_all_slice(self, op, made, out, env, manual):
        made.attrs = {"dims": self._lists(op.attributes["slicing_axes"])}
        out.ops.append(made)
        return made.results

    def _import_all_reduce(self, op, made, out, env, manual):
        if op.name.startswith("sdy."):
            axes = _axes_of(str(op.attributes["reduction_axes"]))
            made.attrs = {"axes": axes, "kind": self._partial_kind(made.operands[0], made, axes)}
            out.ops.append(made)
            return made.results
        axes = self.group_axes(self.attributes(op, "all_reduce")["replica_groups"], made)
        kind = body_kind(self.region(op.regions[0], env, manual))
        if kind is None:
            self.problems.append(
                f"all_reduce at {made.location}: its body is not one of add, multiply, maximum, minimum, and, or"
            )
        for operand, result in zip(made.operands, made.results):
            out.ops.append(Op("all_reduce", [operand], [result], {"axes": axes, "kind": kind}, location=made.location))
        return made.results

    def _partial_kind(self, value: Value, made: Op, axes: tuple[str, ...]) -> str:
        """Return how values partial over `axes` combine, from their producer: Shardy's all_reduce has no kind."""
        op, known = value.producer, None
        while op is not None and op.name in (
            "reshape",
            "transpose",
            "all_reduce",
            "all_slice",
            "broadcast_in_dim",
            "convert",
            "all_to_all",
            "permute",
            "optimization_barrier",
            "relabel",
        ):
            if op.name == "all_reduce":
                known = known or op.attrs["kind"]
            source = op.operands[op.results.index(value)] if op.name == "optimization_barrier" else op.operands[0]
            value, op = source, source.producer
        if known is not None and (op is None or op.name != "scatter"):
            return known
        if op is None or op.name in ("dot_general", "convolution", "kernel"):
            return "add"
        if op.name == "scatter" and (kind := body_kind(op.regions[0])) in COMBINED_SCATTERS:
            if COMBINED_SCATTERS[kind] is not None:  # what was there before counts on one device alone
                op.attrs["once"] = (*op.attrs.get("once", ()), *axes)
            if known is not None:
                return known
            kind = {"subtract": "add"}.get(kind, kind)
            logic = {"add": "or", "maximum": "or", "multiply": "and", "minimum": "and"}
            return logic[kind] if value.dtype == "i1" else kind
        if op.name == "gather":
            return "or" if value.dtype == "i1" else "add"
        if op.name == "reduce" and len(op.results) == 1:
            kind = body_kind(op.regions[0])
            if kind in ("add", "multiply", "maximum", "minimum", "and", "or"):
                return kind
        self.problems.append(
            f"{op.name} at {op.location}: its result is partial on each device and cannot be combined; "
            "unshard its operand"
        )
        return "add"

    def _import_reduce_scatter(self, op, made, out, env, manual):
        if op.name.startswith("sdy."):
            dims = self._lists(op.attributes["reduce_scatter_axes"])
            kind = self._partial_kind(made.operands[0], made, tuple(a for d in dims for a in d))
        else:
            attrs = self.attributes(op, "reduce_scatter")
            dims = self._one_dim(made, attrs["scatter_dimension"], attrs["replica_groups"])
            kind = body_kind(self.region(op.regions[0], env, manual))
        made.attrs = {"dims": dims, "kind": kind, "axes": tuple(a for d in dims for a in d)}
        made.regions = []
        out.ops.append(made)
        return made.results

    def _import_all_to_all(self, op, made, out, env, manual):
        if op.name.startswith("sdy."):
            steps = [(_axes_of(a), int(s), int(t)) for a, s, t in _MOVES.findall(str(op.attributes["params"]))]
        else:
            attrs = self.attributes(op, "all_to_all")
            axes = self.group_axes(attrs["replica_groups"], made)
            steps = [(axes, attrs["concat_dimension"], attrs["split_dimension"])]
        value = made.operands[0]
        for axes, source, target in steps:
            n = self.mesh.size(axes)
            shape = list(value.shape)
            shape[source] *= n
            if shape[target] % n:
                self.problems.append(
                    f"all_to_all at {made.location}: dimension {target} of size {shape[target]} over {n} devices"
                )
            shape[target] //= n
            step = Op("all_to_all", [value], [Value(Type(tuple(shape), value.dtype), made.result.layout)],
                      {"axes": axes, "source": source, "target": target}, location=made.location)  # fmt: skip
            out.ops.append(step)
            value = step.result
        return [value]

    def _import_collective_permute(self, op, made, out, env, manual):
        if op.name.startswith("sdy."):
            # Keep the axes of an enclosing manual computation.
            fixed = (tuple(manual),) if manual else ()

            def full(v):
                return v.layout or ((),) * len(v.shape)

            pairs = self._relayout_pairs((*full(made.operands[0]), *fixed), (*full(made.result), *fixed))
        else:
            pairs = [tuple(p) for p in self.attributes(op, "collective_permute")["source_target_pairs"]]
        made.name, made.attrs = "permute", {"pairs": pairs}
        out.ops.append(made)
        return made.results

    def _import_partition_id(self, op, made, out, env, manual):
        out.ops.append(made)
        return made.results

    def _import_return(self, op, made, out, env, manual):
        return made.operands

    def shard_indices(self, layout: Layout) -> np.ndarray:
        """Return the shard index of each device (row-major mesh position), one column per dimension."""
        sizes = self.mesh.sizes
        names = list(sizes)
        places = np.indices(list(sizes.values()) or [1]).reshape(len(names) or 1, -1)
        columns = []
        for axes in layout:
            index = np.zeros(places.shape[1], int)
            for axis in axes:
                name, _, rest = axis.partition(":")
                before, size = map(int, rest.split(":")) if rest else (1, sizes[name])
                after = sizes[name] // (before * size)
                index = index * size + (places[names.index(name)] // after) % size
            columns.append(index)
        return np.stack(columns, 1) if columns else np.zeros((places.shape[1], 0), int)

    def _relayout_pairs(self, source: Layout, target: Layout) -> list[tuple[int, int]]:
        have, want = self.shard_indices(source), self.shard_indices(target)
        holders: dict[tuple[int, ...], list[int]] = {}
        for device, shard in enumerate(map(tuple, have.tolist())):
            holders.setdefault(shard, []).append(device)
        # Senders and receivers of a shard are equally many: pair them in order, so that every device sends and receives
        # once.
        return [(holders[tuple(shard)].pop(0), device) for device, shard in enumerate(want.tolist())]

    def group_axes(self, groups: list[list[int]], made: Op) -> tuple[str, ...]:
        """Return the mesh axes that replica groups span, in the order of their members."""
        wanted = sorted(map(tuple, groups))
        names, shape = list(self.mesh.sizes), list(self.mesh.sizes.values())
        ids = np.arange(math.prod(shape)).reshape(shape)
        for count in range(len(names) + 1):
            for axes in itertools.permutations(names, count):
                rest = [n for n in names if n not in axes]
                order = [names.index(n) for n in (*rest, *axes)]
                rows = ids.transpose(order).reshape(-1, math.prod(shape[names.index(n)] for n in axes))
                if sorted(map(tuple, rows.tolist())) == wanted:
                    return axes
        self.problems.append(
            f"{made.name} at {made.location}: device groups {groups} do not follow the mesh axes {names}"
        )
        return ()
