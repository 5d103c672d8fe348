"""Torch helpers that written programs call as ``T.<name>``: StableHLO semantics without a single torch operator."""

from npu_bridge.runtime.arithmetic import (
    bessel_i1e,
    cbrt,
    count_leading_zeros,
    digamma,
    float_remainder,
    float_to_integer,
    integer_divide,
    integer_remainder,
    polygamma,
    population_count,
    reduce_precision,
    round_half_away,
    shift_left,
    shift_right_arithmetic,
    shift_right_logical,
    sign,
    to_float8,
    total_order,
    unsigned_divide,
    unsigned_index,
    unsigned_maximum,
    unsigned_minimum,
    unsigned_order,
    unsigned_remainder,
    unsigned_to_float,
    widen_unsigned,
    zeta,
)
from npu_bridge.runtime.index_ops import (
    add_at,
    dynamic_slice,
    dynamic_update_slice,
    gather,
    pad,
    pick,
    scatter_,
    take,
    write,
)
from npu_bridge.runtime.linear_algebra import (
    math_cholesky,
    math_eig,
    math_eigh,
    math_lu,
    math_qr,
    math_svd,
    math_triangular_solve,
)
from npu_bridge.runtime.masks import math_attention_mask
from npu_bridge.runtime.random_bits import math_threefry2x32, rng_bit_generator
from npu_bridge.runtime.reductions import (
    bmm,
    convolution,
    math_argmax,
    math_argmin,
    math_cumlogsumexp,
    math_cummax,
    math_cummin,
    math_cumprod,
    math_cumsum,
    math_sort,
    math_top_k,
    mm,
    product,
    reduce_window,
    reduce_window_with,
    select_and_scatter_add,
    tree_reduce,
)

__all__ = [name for name in dir() if not name.startswith("_")]
