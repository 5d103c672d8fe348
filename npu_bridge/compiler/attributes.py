"""Attributes that JAX attaches to operations, arguments and results: read, harmless for a reason, or refused by name.

An unread attribute would change a program's meaning silently. The importer checks every name against these tables and
refuses unknown ones.
"""

from __future__ import annotations

from jaxlib.mlir import ir

# Read by the importer, the passes or the code generator.
READ = frozenset(
    [
        "all_gather_dim",
        "base_dilations",
        "batch_group_count",
        "broadcast_dimensions",
        "call_target_name",
        "callee",
        "compare_type",
        "comparison_direction",
        "concat_dimension",
        "dimension",
        "dimension_numbers",
        "dimensions",
        "dot_dimension_numbers",
        "fft_length",
        "fft_type",
        "edge_padding_high",
        "edge_padding_low",
        "exponent_bits",
        "feature_group_count",
        "interior_padding",
        "iota_dimension",
        "lhs_dilation",
        "limit_indices",
        "mantissa_bits",
        "padding",
        "permutation",
        "replica_groups",
        "rhs_dilation",
        "rng_algorithm",
        "scatter_dimension",
        "scatter_dimension_numbers",
        "slice_sizes",
        "source_target_pairs",
        "split_count",
        "split_dimension",
        "start_indices",
        "strides",
        "unique_indices",
        "value",
        "window_dilations",
        "window_dimensions",
        "window_reversal",
        "window_strides",
        "bridge.params",
        "sdy.sharding",
        "axes",
        "gathering_axes",
        "in_shardings",
        "manual_axes",
        "mesh",
        "name",
        "out_sharding",
        "out_shardings",
        "params",
        "reduce_scatter_axes",
        "reduction_axes",
        "sharding",
        "slicing_axes",
        "sym_name",
        "arg_attrs",
        "res_attrs",
        "function_type",
        "mhlo.frontend_attributes",
        "mhlo.memory_kind",
    ]
)
HARMLESS = {
    "sdy.sharding_rule": "said what partitioning may do; it is done",
    "sym_visibility": "says which functions are called from outside",
    "precision_config": "asks for at least some precision; products keep that of their operands",
    "algorithm": "asks for at least some precision; products keep that of their operands",
    "result_accuracy": "asks for an accuracy of XLA's approximations; torch has its own functions",
    "channel_handle": "numbers XLA's exchanges; torch orders them by the program",
    "use_global_device_ids": "shardings speak of the whole mesh",
    "indices_are_sorted": "permits a shortcut that torch does not take",
    "is_stable": "every sort of the bridge is stable",
    "has_side_effect": "callbacks repeat it in bridge.params; other calls that have one are refused",
    "api_version": "how XLA would call a kernel of its own",
    "backend_config": "options of XLA's own kernels; calls other than the bridge's are refused",
    "mhlo.backend_config": "options of XLA's own kernels; calls other than the bridge's are refused",
    "operand_layouts": "layouts in XLA's memory",
    "result_layouts": "layouts in XLA's memory",
    "called_computations": "empty for the calls that are accepted",
    "output_operand_aliases": "permits an operator to overwrite an operand; the memory plan decides",
    "mhlo.sharding": "GSPMD's form of what Shardy's attributes say",
    "xla.sdy.sharding": "another form of Shardy's attribute",
    "tf.aliasing_output": "donation, which the bridge takes from the arguments themselves",
    "jax.buffer_donor": "donation, which the bridge takes from the arguments themselves",
    "jax.result_info": "a result's name",
    "jax.arg_info": "an argument's name",
    "mhlo.layout_mode": "the layout of an array in XLA's memory",
    "no_inline": "calls are inlined; values stay the same",
    "operandSegmentSizes": "counts operands of each kind",
    "resultSegmentSizes": "counts results of each kind",
    "mhlo.num_partitions": "shardings speak of the whole mesh",
    "mhlo.num_replicas": "one; shardings speak of the whole mesh",
    "mhlo.is_same_data_across_replicas": "there are no replicas; shardings speak of the whole mesh",
    "jax.uses_shape_polymorphism": "dynamic shapes are refused where they are",
    "jax.global_constant": "names an argument",
    "jax.const": "names an argument that holds a constant",
    "stablehlo.mesh": "another form of Shardy's mesh",
    "allowed_direction": "said what propagation may do; it is done",
    "group_id": "said what propagation may do; it is done",
}
# Custom calls of others that are taken for their operands.
CALLS = {
    "Sharding": "Shardy's attributes say the same",
    "SPMDFullToShardShape": "GSPMD's form of a manual computation, inside of which shapes are local already",
    "SPMDShardToFullShape": "GSPMD's form of a manual computation",
    "LayoutConstraint": "a layout in XLA's memory",
}
# Keys of mhlo.frontend_attributes that XLA's own passes read and that change no value, like those that a user makes up
# (jax.experimental.xla_metadata). A key of XLA's, `_xla_...`, that is in no table is refused.
NOTES = {
    "_xla_buffer_placement": "read where it belongs: at annotate_device_placement",
    "_xla_stream_annotation": "one of XLA's own streams",
    "inlineable": "calls are inlined; values stay the same",
}
# Keys that ask for another device or meaning.
PLACES = {"_xla_compute_type": "compute_on asks the host to compute this; the bridge computes on {device} alone"}
# Memory kinds: those of the device itself, and the host's.
_DEVICE = frozenset({"", "device", "unpinned_host"})
_HOST = frozenset({"pinned_host"})


def is_host(kind: str) -> bool:
    """Whether a memory kind is the host's."""
    return kind in _HOST


def refused(op: ir.Operation, device: str) -> list[str]:
    """Return the attributes of an operation that the bridge would lose.

    device: where the program runs; on a CPU the host computes in any case.
    """
    found = []
    for item in op.attributes:
        key = item if isinstance(item, str) else item.name
        if key == "mhlo.frontend_attributes":
            found += _refused_notes(op.attributes[key], device)
        elif key in ("arg_attrs", "res_attrs"):
            for number, attributes in enumerate(op.attributes[key]):
                found += _refused_of_value(
                    attributes, f"{'argument' if key == 'arg_attrs' else 'result'} {number}", device
                )
        elif key not in READ and key not in HARMLESS:
            found.append(
                f"attribute {key!r} ({str(op.attributes[key])[:80]}) is unknown to the bridge and would be lost"
            )
    return found


def _refused_of_value(attributes: ir.DictAttr, what: str, device: str) -> list[str]:
    found = []
    for item in attributes:
        key = item if isinstance(item, str) else item.name
        value = attributes[key]
        if key == "mhlo.memory_kind":
            kind = ir.StringAttr(value).value
            if kind not in _DEVICE | _HOST:
                found.append(f"{what} lives in {kind} memory, of which the bridge knows nothing; use pinned_host")
        elif key not in READ and key not in HARMLESS:
            found.append(f"attribute {key!r} of {what} is unknown to the bridge and would be lost")
    return found


def _refused_notes(attribute: ir.Attribute, device: str) -> list[str]:
    notes = ir.DictAttr(attribute)
    keys = [item if isinstance(item, str) else item.name for item in notes]
    found = [f"{PLACES[k].format(device=device)} ({k} = {notes[k]})" for k in keys if k in PLACES and device != "cpu"]
    found += [
        f"{k} = {notes[k]} asks XLA for something that the bridge does not know"
        for k in keys
        if k.startswith("_xla_") and k not in NOTES and k not in PLACES
    ]
    if "_xla_buffer_placement" in keys:
        kind = ir.StringAttr(notes["_xla_buffer_placement"]).value
        if kind not in _DEVICE | _HOST:
            found.append(f"a value is placed in {kind} memory, of which the bridge knows nothing; use pinned_host")
    return found
