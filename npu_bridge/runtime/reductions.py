"""Products, convolutions, reductions over dimensions and windows, cumulative sums, sorting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from npu_bridge.runtime.arithmetic import total_order, unsigned_order
from npu_bridge.runtime.index_ops import pad

# ---- products
# -----------------------------------------------------------------------------------------------------------


def _product(function: Callable, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if (
        x.device.type == "cuda"
        and dtype == torch.float32
        and x.dtype == y.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
    ):
        return function(x, y, out_dtype=dtype)
    if dtype == torch.float32 and x.device.type == "npu" and x.dtype == y.dtype:
        # The cube unit accumulates in float32 and rounds once on the way out; widening the operands would leave the
        # cube.
        return function(x, y).to(dtype)
    if dtype == torch.bool:  # any(x and y): a count that is not zero
        return function(x.float(), y.float()) != 0
    wide = torch.promote_types(
        torch.promote_types(
            *(torch.float32 if d.itemsize < 2 and d.is_floating_point else d for d in (x.dtype, y.dtype))
        ),
        dtype,
    )
    wide = torch.float32 if wide.itemsize < 2 and wide.is_floating_point else wide
    return function(x.to(wide), y.to(wide)).to(dtype)


def mm(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Matrix product with sums and result in `dtype`."""
    return _product(torch.mm, x, y, dtype)


def bmm(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Batched matrix product with sums and result in `dtype`."""
    return _product(torch.bmm, x, y, dtype)


def convolution(
    x: torch.Tensor,
    kernel: torch.Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[Sequence[int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    reverse: Sequence[bool],
    feature_groups: int,
    batch_groups: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x (batch, features, space...), kernel (out, in, space...) with up to 3 dimensions of space; returns (batch, out,
    space...).
    """
    rank = len(stride)
    if rank == 0:
        return mm(x, kernel.t(), dtype)
    if any(reverse):
        kernel = kernel.flip([2 + i for i, r in enumerate(reverse) if r])
    if any(p for pair in padding for p in pair) or any(d != 1 for d in lhs_dilation):
        low, high = [0, 0, *(p[0] for p in padding)], [0, 0, *(p[1] for p in padding)]
        x = pad(x, torch.zeros((), dtype=x.dtype, device=x.device), low, high, [0, 0, *(d - 1 for d in lhs_dilation)])
    if batch_groups > 1:  # each group of the batch meets its own output features: groups of features instead
        n = x.shape[0] // batch_groups
        x = x.unflatten(0, (batch_groups, n)).transpose(0, 1).flatten(1, 2)
    narrow = x.dtype
    wide = dtype if dtype.itemsize > narrow.itemsize else narrow
    if not wide.is_floating_point:
        return _whole_convolution(x.to(wide), kernel.to(wide), stride, rhs_dilation, feature_groups * batch_groups).to(
            dtype
        )
    if wide.itemsize < 2:
        wide = torch.float32
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    y = function(
        x.to(wide),
        kernel.to(wide),
        stride=list(stride),
        dilation=list(rhs_dilation),
        groups=feature_groups * batch_groups,
    )
    return y.to(dtype)


def _whole_convolution(
    x: torch.Tensor, kernel: torch.Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> torch.Tensor:
    """Of integers, which wrap: one product for each place of the kernel. torch has convolutions of floats."""
    if x.dtype == torch.bool:
        return _whole_convolution(x.int(), kernel.int(), stride, dilation, groups) != 0
    size = [
        max((n - (k - 1) * d - 1) // s + 1, 0) for n, k, d, s in zip(x.shape[2:], kernel.shape[2:], dilation, stride)
    ]
    x, kernel = x.unflatten(1, (groups, x.shape[1] // groups)), kernel.unflatten(0, (groups, kernel.shape[0] // groups))
    out = torch.zeros(x.shape[0], groups, kernel.shape[1], *size, dtype=x.dtype, device=x.device)
    for at in itertools.product(*(range(k) for k in kernel.shape[3:])):
        part = x[
            (
                ...,
                *(
                    slice(a * d, a * d + (n - 1) * s + 1, s) if n else slice(0, 0)
                    for a, d, n, s in zip(at, dilation, size, stride)
                ),
            )
        ]
        out += torch.einsum("bgc...,goc->bgo...", part, kernel[(..., *at)])
    return out.flatten(1, 2)


# ---- reductions
# ---------------------------------------------------------------------------------------------------------


def product(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    for d in sorted(dims, reverse=True):
        x = x.prod(d, dtype=x.dtype)
    return x


def tree_reduce(
    body: Callable, xs: Sequence[torch.Tensor], inits: Sequence[torch.Tensor], dims: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Reduce with any associative body, neighbours first, so that order is kept."""
    dims = sorted(dims)
    moved = []
    for x in xs:
        x = x.movedim(dims, list(range(len(dims))))
        moved.append(x.flatten(0, len(dims) - 1) if len(dims) > 1 else x if dims else x.unsqueeze(0))
    shape = moved[0].shape[1:]
    if moved[0].shape[0] == 0:
        return tuple(i.expand(shape).clone() for i in inits)
    while moved[0].shape[0] > 1:
        n = moved[0].shape[0] // 2 * 2
        joined = body(*(m[0:n:2] for m in moved), *(m[1:n:2] for m in moved))
        moved = [torch.cat([j, m[n:]]) if m.shape[0] > n else j for j, m in zip(joined, moved)]
    return tuple(body(*(i.expand(shape) for i in inits), *(m[0] for m in moved)))


def _windows(
    x: torch.Tensor, fill: torch.Tensor, window, strides, base_dilations, window_dilations, padding
) -> torch.Tensor:
    """View (out..., window...) of the padded array."""
    if any(p for pair in padding for p in pair) or any(d != 1 for d in base_dilations):
        x = pad(x, fill, [p[0] for p in padding], [p[1] for p in padding], [d - 1 for d in base_dilations])
    reach = [(w - 1) * d + 1 for w, d in zip(window, window_dilations)]
    out = [max((n - r) // s + 1, 0) for n, r, s in zip(x.shape, reach, strides)]
    step = x.stride()
    return x.as_strided(
        [*out, *window], [*(a * s for a, s in zip(step, strides)), *(a * d for a, d in zip(step, window_dilations))]
    )


def reduce_window(
    x: torch.Tensor, init: torch.Tensor, kind: str, *, window, strides, base_dilations, window_dilations, padding
) -> torch.Tensor:
    rank = x.dim()
    # What is padded takes no part: it is filled with what changes nothing, and the start comes in once.
    limits = (
        (-math.inf, math.inf)
        if x.dtype.is_floating_point or x.is_complex()
        else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
    )
    neutral = {"add": 0, "multiply": 1, "maximum": limits[0], "minimum": limits[1]}[kind]
    view = _windows(
        x,
        torch.full((), neutral, dtype=x.dtype, device=x.device),
        window,
        strides,
        base_dilations,
        window_dilations,
        padding,
    )
    dims = [rank + d for d in range(rank) if window[d] > 1]
    view = view.squeeze([rank + d for d in range(rank) if window[d] == 1])
    dims = list(range(rank, view.dim()))
    if kind == "multiply":
        return (product(view, dims) if dims else view) * init
    if not dims:
        reduced = view
    else:
        reduced = (
            view.sum(dims, dtype=x.dtype)
            if kind == "add"
            else {"maximum": torch.amax, "minimum": torch.amin}[kind](view, dims)
        )
    combine = {"add": torch.add, "maximum": torch.maximum, "minimum": torch.minimum}[kind]
    return combine(reduced, init)


def reduce_window_with(
    body: Callable,
    xs: Sequence[torch.Tensor],
    inits: Sequence[torch.Tensor],
    *,
    window,
    strides,
    base_dilations,
    window_dilations,
    padding,
) -> tuple[torch.Tensor, ...]:
    """Reduce windows by any body. Padding takes no part in it, whatever the body makes of the start."""
    rank = xs[0].dim()
    views = [_windows(x, i, window, strides, base_dilations, window_dilations, padding) for x, i in zip(xs, inits)]
    inside = torch.ones(xs[0].shape, dtype=torch.bool, device=xs[0].device)
    inside = _windows(
        inside,
        torch.zeros((), dtype=torch.bool, device=inside.device),
        window,
        strides,
        base_dilations,
        window_dilations,
        padding,
    )
    count, dims = len(xs), list(range(rank, 2 * rank))

    def of_both(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (*a, in_a), (*b, in_b) = operands[: count + 1], operands[count + 1 :]
        both = body(*a, *b)
        return (*(torch.where(in_a & in_b, z, torch.where(in_a, x, y)) for x, y, z in zip(a, b, both)), in_a | in_b)

    reached = torch.ones((), dtype=torch.bool, device=inside.device)
    return tree_reduce(of_both, [*views, inside], [*inits, reached], dims)[:count]


def select_and_scatter_add(
    x: torch.Tensor, source: torch.Tensor, init: torch.Tensor, direction: str, *, window, strides, padding
) -> torch.Tensor:
    """Add each window's source to the element it selects. On ties GE and LE select the first one, as XLA does."""
    rank = x.dim()
    limit = float("-inf") if direction in ("GE", "GT") else float("inf")
    low, high = [p[0] for p in padding], [p[1] for p in padding]
    ones = [1] * rank
    fill = torch.full((), limit, dtype=x.dtype, device=x.device)
    padded = pad(x, fill, low, high, [0] * rank)
    view = _windows(padded, fill, window, strides, ones, ones, [[0, 0]] * rank)
    flat = view.reshape(*view.shape[:rank], -1)
    chosen = (math_argmax if direction in ("GE", "GT") else math_argmin)(flat, axis=rank)[0].long()
    linear = torch.zeros_like(chosen)
    for d in range(rank):
        inner = 1
        for w in window[d + 1 :]:
            inner *= w
        offset = (chosen // inner) % window[d]
        begin = torch.arange(view.shape[d], device=x.device) * strides[d]
        linear = linear * padded.shape[d] + begin.view([-1 if k == d else 1 for k in range(rank)]) + offset
    out = torch.zeros(padded.numel(), dtype=source.dtype, device=x.device).index_add_(
        0, linear.reshape(-1), source.reshape(-1)
    )
    out = out.view(padded.shape)
    crop = tuple(slice(a, a + n) for a, n in zip(low, x.shape))
    return out[crop] + init


# ---- what the bridge's own lowerings of primitives call
# -----------------------------------------------------------------


def _cumulative(function: Callable, x: torch.Tensor, axis: int, reverse: bool) -> tuple[torch.Tensor]:
    narrow = x.dtype
    x = x.float() if narrow in (torch.bfloat16, torch.float16) else x
    y = function(x.flip(axis) if reverse else x)
    return ((y.flip(axis) if reverse else y).to(narrow),)


def math_cumsum(x: torch.Tensor, *, axis: int, reverse: bool):
    return _cumulative(lambda t: torch.cumsum(t, axis, dtype=t.dtype), x, axis, reverse)


def math_cumprod(x: torch.Tensor, *, axis: int, reverse: bool):
    return _cumulative(lambda t: torch.cumprod(t, axis, dtype=t.dtype), x, axis, reverse)


def math_cummax(x: torch.Tensor, *, axis: int, reverse: bool, unsigned: bool):
    order = unsigned_order if unsigned else lambda t: t
    return _cumulative(lambda t: order(torch.cummax(order(t), axis).values), x, axis, reverse)


def math_cummin(x: torch.Tensor, *, axis: int, reverse: bool, unsigned: bool):
    order = unsigned_order if unsigned else lambda t: t
    return _cumulative(lambda t: order(torch.cummin(order(t), axis).values), x, axis, reverse)


def math_cumlogsumexp(x: torch.Tensor, *, axis: int, reverse: bool):
    return _cumulative(lambda t: torch.logcumsumexp(t, axis), x, axis, reverse)


def _argument(x: torch.Tensor, axis: int, extreme: Callable, unsigned: bool, dtype: str) -> tuple[torch.Tensor]:
    """First index of the extreme, as an integer of `dtype`; the first NaN wins. torch.argmax promises no order among
    equals.
    """
    if unsigned:
        x = unsigned_order(x)
    if x.dtype == torch.bool:
        x = x.to(torch.uint8)
    hit = x == extreme(x, axis, keepdim=True)
    if x.is_floating_point():
        nan = torch.isnan(x)
        hit = torch.where(nan.any(axis, keepdim=True), nan, hit)
    n = x.shape[axis]
    numbers = torch.arange(n, dtype=torch.int32, device=x.device).view([n if d == axis else 1 for d in range(x.dim())])
    return (torch.where(hit, numbers, n).amin(axis).to(getattr(torch, dtype)),)


def math_argmax(x: torch.Tensor, *, axis: int, unsigned: bool = False, dtype: str = "int32"):
    return _argument(x, axis, torch.amax, unsigned, dtype)


def math_argmin(x: torch.Tensor, *, axis: int, unsigned: bool = False, dtype: str = "int32"):
    return _argument(x, axis, torch.amin, unsigned, dtype)


def math_top_k(x: torch.Tensor, *, k: int, axis: int, unsigned: bool):
    """Largest first in IEEE 754's total order (0 above -0, NaN above everything, -NaN below), the lower index first
    among equals. torch.topk promises no order among equals.
    """
    key = total_order(x) if x.is_floating_point() else unsigned_order(x) if unsigned else x
    indices = torch.sort(key, dim=axis, descending=True, stable=True).indices.narrow(axis, 0, k)
    return x.gather(axis, indices), indices.to(torch.int32)


def math_sort(*operands: torch.Tensor, axis: int, keys: int, unsigned: Sequence[bool]):
    """Stable sort of all operands by the first `keys` of them: the last key first, each pass stable."""
    order = None
    parts = [
        (part, flip)
        for key, flip in zip(operands[:keys], unsigned)
        for part in ((key.real, key.imag) if key.is_complex() else (key,))
    ]
    for key, flip in reversed(parts):
        key = unsigned_order(key) if flip else key
        current = key if order is None else key.gather(axis, order)
        step = torch.sort(current, dim=axis, stable=True).indices
        order = step if order is None else order.gather(axis, step)
    return tuple(o.gather(axis, order) for o in operands)
