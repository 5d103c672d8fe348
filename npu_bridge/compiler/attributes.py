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
    "allowed_direction": "said what propagation may do; it is done",
    "group_id": "said what propagation may do; it is done",
}
# Keys of mhlo.frontend_attributes that ask for another memory, device or meaning. All others are notes to XLA's own
# passes (jax.experimental.xla_metadata), which change no value.
_PLACES = {
    "_xla_compute_type": "compute_on asks the host to compute this",
    "_xla_buffer_placement": "this value is placed in another memory",
}
_DEVICE = ("", "device", "unpinned_host")  # the device's own memory


def refused(op: ir.Operation, device: str) -> list[str]:
    """Return the attributes of an operation that the bridge would lose. device: where the program runs; on a CPU host
    placements are no loss.
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
            if device != "cpu" and kind not in _DEVICE:
                found.append(
                    f"{what} lives in {kind} memory, which the bridge has not on {device}; leave it in the "
                    "device's memory"
                )
        elif key not in READ and key not in HARMLESS:
            found.append(f"attribute {key!r} of {what} is unknown to the bridge and would be lost")
    return found


def _refused_notes(attribute: ir.Attribute, device: str) -> list[str]:
    notes = ir.DictAttr(attribute)
    keys = [item if isinstance(item, str) else item.name for item in notes]
    return [
        f"{_PLACES[k]} ({k} = {notes[k]}); the bridge has no such memory on {device}"
        for k in keys
        if k in _PLACES and device != "cpu"
    ]
