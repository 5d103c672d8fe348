"""Slices at device indices, padding, gather and scatter as StableHLO defines them.

`shards` maps an indexed dimension to (first global index of this shard, size of the whole dimension). Indices are
clamped or dropped by the global size, then each device handles its own shard only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from npu_bridge.runtime.arithmetic import unsigned_order

Shards = Mapping[int, tuple[int, int]]


def write(base: torch.Tensor, view: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """Copy `update` into `view`, a view of `base`, and return `base`."""
    view.copy_(update)
    return base


def _clamped(start, size: int, whole: int):
    if isinstance(start, torch.Tensor):  # widened first: the bound may not fit into a narrow index
        return start.long().clamp(0, whole - size)
    return min(max(int(start), 0), whole - size)


def dynamic_slice(x: torch.Tensor, starts: Sequence, sizes: Sequence[int]) -> torch.Tensor:
    for d, (start, size) in enumerate(zip(starts, sizes)):
        if size == x.shape[d]:
            continue
        start = _clamped(start, size, x.shape[d])
        if isinstance(start, torch.Tensor):
            x = x.index_select(d, start + torch.arange(size, device=x.device, dtype=start.dtype))
        else:
            x = x.narrow(d, start, size)
    return x


def dynamic_update_slice(x: torch.Tensor, update: torch.Tensor, starts: Sequence) -> torch.Tensor:
    """Write into `x` and return it."""
    moved = [d for d in range(x.dim()) if update.shape[d] != x.shape[d]]
    index = [
        _clamped(starts[d], update.shape[d], x.shape[d]) + torch.arange(update.shape[d], device=x.device) for d in moved
    ]
    if len(moved) == 1:
        return x.index_copy_(moved[0], index[0].long(), update)
    whole: list = []
    for d in range(x.dim()):
        line = index[moved.index(d)] if d in moved else torch.arange(x.shape[d], device=x.device)
        whole.append(line.long().view([-1 if k == d else 1 for k in range(x.dim())]))
    return x.index_put_(tuple(whole), update)


def pad(
    x: torch.Tensor, fill: torch.Tensor, low: Sequence[int], high: Sequence[int], inner: Sequence[int]
) -> torch.Tensor:
    """StableHLO pad: `inner` fill elements between neighbours, then edges, which may be negative (cropping)."""
    spread = [n + max(n - 1, 0) * i for n, i in zip(x.shape, inner)]
    total = [max(a, 0) + n + max(b, 0) for n, a, b in zip(spread, low, high)]
    out = fill.to(x.dtype).expand(total).clone()
    place = tuple(slice(max(a, 0), max(a, 0) + n, i + 1) for n, a, i in zip(spread, low, inner))
    if x.numel():
        out[place] = x
    for d, (a, b) in enumerate(zip(low, high)):
        if a < 0 or b < 0:
            begin = max(-a, 0)
            out = out.narrow(d, begin, max(out.shape[d] - begin - max(-b, 0), 0))
    return out


def take(x: torch.Tensor, indices: torch.Tensor, dim: int, shards: Shards | None = None) -> torch.Tensor:
    """Take whole slices of `x` along `dim`; indices (..., 1) are clamped."""
    indices = indices.squeeze(-1).long()
    start, whole = (shards or {}).get(dim, (0, x.shape[dim]))
    rows = indices.clamp(0, whole - 1) - start
    if shards:
        mine = (rows >= 0) & (rows < x.shape[dim])
        rows = rows.clamp(0, x.shape[dim] - 1)
    y = x.index_select(dim, rows.reshape(-1)).reshape((*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]))
    if not shards:
        return y
    return torch.where(
        mine.reshape((*indices.shape, *[1] * (x.dim() - dim - 1))), y, torch.zeros((), dtype=x.dtype, device=x.device)
    )


def _in_last(x: torch.Tensor, index: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (index into the last dimension of this shard, clamped; whether it was inside).

    `index` is constant along its last dimension.
    """
    index = index[..., :1].long() - first
    return index.clamp(0, x.shape[-1] - 1), (index >= 0) & (index < x.shape[-1])


def pick(x: torch.Tensor, index: torch.Tensor, first: int) -> torch.Tensor:
    """Return the element of each row at its index; 0 where the index is outside."""
    index, inside = _in_last(x, index, first)
    return torch.where(inside, x.gather(-1, index), 0).squeeze(-1)


def add_at(x: torch.Tensor, index: torch.Tensor, first: int, number: float) -> torch.Tensor:
    """Add to the element of each row at its index, if it is in the row; overwrite `x` and return it."""
    index, inside = _in_last(x, index, first)
    return x.scatter_add_(-1, index, torch.where(inside, number, 0.0).to(x.dtype))


def _place(t: torch.Tensor, dims: Sequence[int], rank: int) -> torch.Tensor:
    """Move the dimensions of `t` to dimensions `dims` of a tensor of `rank` dimensions."""
    shape = [1] * rank
    for n, d in zip(t.shape, dims):
        shape[d] = n
    return t.reshape(shape)


def _indices(
    indices: torch.Tensor,
    operand: Sequence[int],
    sizes: Sequence[int],
    window_places: Mapping[int, int],
    batch_places: Sequence[int],
    rank: int,
    start_map: Sequence[int],
    vector_dim: int,
    batching: Mapping[int, int],
    shards: Shards,
    clamp: bool,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return local indices of every element per operand dimension, and a mask of valid elements (None: all).

    sizes: window size per operand dimension. window_places: operand dimension -> result dimension. batching: operand
    dimension -> result dimension of a batch.
    """
    device = indices.device
    indices = indices.unsqueeze(-1) if vector_dim == indices.dim() else indices.movedim(vector_dim, -1)
    valid: torch.Tensor | None = None

    def also(condition: torch.Tensor) -> None:
        nonlocal valid
        valid = condition if valid is None else valid & condition

    found = []
    for d, n in enumerate(operand):
        if d in batching:
            place = batching[d]
            found.append(_place(torch.arange(n, device=device), [place], rank))
            continue
        index = torch.zeros([1] * rank, dtype=torch.int64, device=device)
        first, whole = shards.get(d, (0, n))
        if d in start_map:
            start = indices[..., start_map.index(d)].long()
            if clamp:
                start = start.clamp(0, whole - sizes[d])
            else:
                also(_place((start >= 0) & (start <= whole - sizes[d]), batch_places, rank))
            index = index + _place(start, batch_places, rank) - first
        if d in window_places:
            index = index + _place(torch.arange(sizes[d], device=device), [window_places[d]], rank)
        if d in shards:
            also((index >= 0) & (index < n))
        if d in shards or not clamp:
            index = index.clamp(0, n - 1)
        found.append(index)
    return found, valid


def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    *,
    offset_dims: Sequence[int],
    collapsed_slice_dims: Sequence[int],
    operand_batching_dims: Sequence[int],
    start_indices_batching_dims: Sequence[int],
    start_index_map: Sequence[int],
    index_vector_dim: int,
    slice_sizes: Sequence[int],
    shards: Shards | None = None,
) -> torch.Tensor:
    batch_rank = indices.dim() - (index_vector_dim < indices.dim())
    rank = batch_rank + len(offset_dims)
    batch_places = [d for d in range(rank) if d not in offset_dims]
    windows = [d for d in range(x.dim()) if d not in collapsed_slice_dims and d not in operand_batching_dims]
    batching = {
        d: batch_places[s - (s > index_vector_dim)] for d, s in zip(operand_batching_dims, start_indices_batching_dims)
    }
    index, valid = _indices(
        indices,
        x.shape,
        slice_sizes,
        dict(zip(windows, offset_dims)),
        batch_places,
        rank,
        list(start_index_map),
        index_vector_dim,
        batching,
        shards or {},
        clamp=True,
    )
    shape = [0] * rank
    for d, place in zip(windows, offset_dims):
        shape[place] = slice_sizes[d]
    batch_shape = [n for d, n in enumerate(indices.shape) if d != index_vector_dim]
    for n, place in zip(batch_shape, batch_places):
        shape[place] = n
    y = x[tuple(index)] if x.dim() else x
    if valid is None:  # contiguous copy: later statements may overwrite it
        return y.expand(shape).clone() if not x.dim() or list(y.shape) != shape else y
    return torch.where(valid, y.expand(shape), torch.zeros((), dtype=x.dtype, device=x.device))


_NEUTRAL = {"multiply": ("prod", 1), "maximum": ("amax", None), "minimum": ("amin", None)}


def scatter_(
    x: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    mode: str | Callable[..., Sequence[torch.Tensor]],
    *,
    update_window_dims: Sequence[int],
    inserted_window_dims: Sequence[int],
    input_batching_dims: Sequence[int],
    scatter_indices_batching_dims: Sequence[int],
    scattered_dims_to_operand_dims: Sequence[int],
    index_vector_dim: int,
    shards: Shards | None = None,
    unsigned: bool = False,
    unique: bool = False,
) -> torch.Tensor:
    """Write into `x` and return it. A window that leaves the array is dropped whole, as XLA does.

    mode: how updates combine with elements, a name or a function of both. unsigned: compare as unsigned bits.
    unique: no index occurs twice.
    """
    if unsigned:
        scattered = scatter_(
            unsigned_order(x),
            indices,
            unsigned_order(updates),
            mode,
            update_window_dims=update_window_dims,
            inserted_window_dims=inserted_window_dims,
            input_batching_dims=input_batching_dims,
            scatter_indices_batching_dims=scatter_indices_batching_dims,
            scattered_dims_to_operand_dims=scattered_dims_to_operand_dims,
            index_vector_dim=index_vector_dim,
            shards=shards,
        )
        return x.copy_(unsigned_order(scattered))
    rank = updates.dim()
    scatter_places = [d for d in range(rank) if d not in update_window_dims]
    windows = [d for d in range(x.dim()) if d not in inserted_window_dims and d not in input_batching_dims]
    sizes = [1] * x.dim()
    for d, place in zip(windows, update_window_dims):
        sizes[d] = updates.shape[place]
    batching = {
        d: scatter_places[s - (s > index_vector_dim)]
        for d, s in zip(input_batching_dims, scatter_indices_batching_dims)
    }
    index, valid = _indices(
        indices,
        x.shape,
        sizes,
        dict(zip(windows, update_window_dims)),
        scatter_places,
        rank,
        list(scattered_dims_to_operand_dims),
        index_vector_dim,
        batching,
        shards or {},
        clamp=False,
    )
    valid = torch.ones([1] * rank, dtype=torch.bool, device=x.device) if valid is None else valid
    if (
        mode == "add"
        and x.dim()
        and _row_scatter(x, sizes, windows, update_window_dims, scattered_dims_to_operand_dims, batching, rank)
    ):
        rows = torch.broadcast_to(
            index[0], [n if d in scatter_places else 1 for d, n in enumerate(updates.shape)]
        ).reshape(-1)
        kept = torch.where(valid, updates, torch.zeros((), dtype=updates.dtype, device=x.device))
        return x.index_add_(0, rows, kept.reshape(-1, *x.shape[1:]))
    flat = x.contiguous().view(-1)
    linear = torch.zeros([1] * rank, dtype=torch.int64, device=x.device)
    for d, i in enumerate(index):
        linear = linear * x.shape[d] + i
    linear, valid = (t.expand(updates.shape).reshape(-1) for t in (linear, valid))
    values = updates.reshape(-1)
    numbers = flat
    if x.dtype == torch.bool and not callable(mode):  # or, and
        mode = {"add": "maximum", "multiply": "minimum"}.get(mode, mode)
        numbers, values = flat.view(torch.uint8), values.view(torch.uint8)
    if callable(mode):
        _scatter_with(mode, flat, linear, values, valid, unique)
    elif mode == "add":
        values = torch.where(valid, values, torch.zeros((), dtype=values.dtype, device=x.device))
        flat.index_add_(0, linear, values)
    elif mode == "replace":
        spare = torch.cat([numbers, numbers.new_zeros(1)])  # dropped updates go to one extra element at the end
        spare[torch.where(valid, linear, flat.numel())] = values
        numbers.copy_(spare[:-1])
    else:
        name, neutral = _NEUTRAL[mode]
        if neutral is None:
            limits = torch.finfo(x.dtype) if x.dtype.is_floating_point else torch.iinfo(values.dtype)
            neutral = limits.min if mode == "maximum" else limits.max
            if x.dtype.is_floating_point:
                neutral = float("-inf") if mode == "maximum" else float("inf")
        values = torch.where(valid, values, torch.full((), neutral, dtype=values.dtype, device=x.device))
        numbers.scatter_reduce_(0, linear, values, name, include_self=True)
    if flat.data_ptr() != x.data_ptr() or not x.is_contiguous():
        x.copy_(flat.view(x.shape))
    return x


def _scatter_with(
    body: Callable, flat: torch.Tensor, linear: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, unique: bool
) -> None:
    """Combine by any body.

    Updates of one element are applied in order: the n-th round applies every element's n-th update.
    """
    linear = torch.where(valid, linear, flat.numel())
    if unique:
        rounds, number = 1, torch.zeros_like(linear)
    else:
        order = torch.sort(linear, stable=True).indices
        ordered = linear[order]
        number = torch.empty_like(linear)
        number[order] = torch.arange(linear.numel(), device=flat.device) - torch.searchsorted(ordered, ordered)
        rounds = int(torch.where(valid, number, -1).max()) + 1 if linear.numel() else 0  # reads the device
    spare = torch.cat([flat, flat.new_zeros(1)])  # dropped updates go to one extra element at the end
    for n in range(rounds):
        now = torch.where(number == n, linear, flat.numel())
        spare[now] = body(spare[now], values)[0]
    flat.copy_(spare[:-1])


def _row_scatter(x, sizes, windows, update_window_dims, scattered, batching, rank) -> bool:
    """Add whole rows along dimension 0, with the row's dimensions last and in order: an embedding's gradient."""
    whole = all(sizes[d] == x.shape[d] for d in range(1, x.dim()))
    trailing = list(update_window_dims) == list(range(rank - len(update_window_dims), rank))
    return list(scattered) == [0] and whole and trailing and windows == list(range(1, x.dim())) and not batching
