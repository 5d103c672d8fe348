"""Published tensors onto a mesh.

Parameter by parameter: every layer's tensor is read in blocks of rows, turned and written once into the place where the
device array will lie, so that host memory holds one (stacked) parameter and a block for each thread. On CPU devices the
array is that memory. What needs no turning is read straight into its place.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.errors import shortened
from mindvl_jax.models.hf import Rows
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.rules import parameter_shardings
from mindvl_jax.weights.errors import WeightsError, listed, read_json
from mindvl_jax.weights.folder import Reader, WeightsFolder
from mindvl_jax.weights.mapping import Slot, mapping_of, read_config, slots

# rows of a published matrix turned at once: runs of a kilobyte in the turned one, and one line of each fits the
# first-level cache
_BLOCK_ROWS = 512
_TILE_BYTES = 1024  # of each of these rows at a time: together they stay in the second-level cache
_BLOCK_BYTES = 1 << 20  # read at once of what is not turned
_JOB_BYTES = 1 << 24  # what one thread takes at a time
_LARGE_PAGE = 1 << 21
_ALIGNMENT = 64  # of host memory that a CPU device takes over without a copy
_scratch = threading.local()


def load_parameters(
    folder: str | Path,
    config: ModelConfig | None = None,
    *,
    mesh: Mesh | None = None,
    dtype=None,
    parts: tuple[str, ...] | None = None,
) -> dict[str, jax.Array]:
    """Parameters by path, each where the mesh's rules put it.

    Args:
      folder: Hugging Face folder with safetensors.
      config: the model; None takes the folder's own.
      mesh: devices; None is the default device.
      dtype: of the parameters; None keeps the files' own (the widest of a stack).
      parts: only parameters under these prefixes ("vision/", "projector/" ...); what belongs to other parts is then not
        looked at.

    Raises:
      WeightsError: damaged files, or missing, unexpected and misshapen tensors, all of them at once; values that are
        NaN or infinite.
    """
    folder = Path(folder)
    config = read_config(folder) if config is None else config
    mapping = mapping_of(config)
    if (folder / "config.json").is_file() and (kind := read_json(folder / "config.json").get("quantization_config")):
        raise WeightsError(
            f"{folder}: config.json says that the weights are quantised ({shortened(str(kind), 80)}): their values "
            "mean something else than they say. `mindvl convert nf4` makes plain ones of bitsandbytes' NF4"
        )
    files, tied = WeightsFolder(folder, mapping), mapping.tied(config)
    outline = outline_of(config)
    shapes = {path: like.shape for path, like in outline.shapes.items()}
    wanted = {path for path in shapes if parts is None or path.startswith(parts)}
    all_slots = [slot for slot in slots(config, shapes) if wanted.intersection(slot.rule.ours)]
    copies = mapping.copies(config)
    _check(files, {*copies, *(tied or ())[:1]}, all_slots, whole=parts is None)

    by_path: dict[str, list[tuple[Slot, int]]] = {}
    for slot in all_slots:
        for member, path in enumerate(slot.rule.ours):
            by_path.setdefault(path, []).append((slot, member))
    shardings: Mapping[str, jax.sharding.Sharding] = {}
    if mesh is not None:
        shardings = parameter_shardings(outline.axis_names, shapes, mesh)
    default = SingleDeviceSharding(jax.local_devices()[0])
    with files.reader() as reader, concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        if tied is not None and tied[0] in files.entries and not _equal(reader, files, *tied):
            raise WeightsError(
                f"{folder}: config.json ties the word embeddings, but {tied[0]} differs from {tied[1]}; "
                f"set tie_word_embeddings to false, or remove {tied[0]}"
            )
        for copy, original in copies.items():
            if copy in files.entries and original in files.entries and not _equal(reader, files, copy, original):
                raise WeightsError(
                    f"{folder}: {copy} differs from {original}, which it repeats in published files; models with two "
                    "of them are not built"
                )
        parameters = {}
        for path in sorted(wanted):
            kind = jnp.dtype(dtype) if dtype is not None else _stored_dtype(files, by_path[path])
            parameters[path] = _place(reader, by_path[path], shapes[path], kind, shardings.get(path, default), pool)
    require_finite(parameters, folder)
    return parameters


@jax.jit
def _finite(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.all(jnp.isfinite(value)) for path, value in values.items()}


def require_finite(values: dict[str, jax.Array], folder: Path) -> None:
    """Raise WeightsError for weights with NaN or infinite values: every answer, score and average of them would be
    without meaning.
    """
    bad = [path for path, finite in jax.device_get(_finite(values)).items() if not finite]
    if bad:
        raise WeightsError(
            f"{folder}: {len(bad)} of {len(values)} parameters hold values that are NaN or infinite, such as "
            f"{bad[0]}; the weights are damaged, or their training diverged"
        )


def _check(files: WeightsFolder, optional: set[str], expected: list[Slot], *, whole: bool) -> None:
    """Raise one error with every missing, misshapen and unexpected tensor; `optional` names may be there or not."""
    problems = []
    for slot in expected:
        entry = files.entries.get(slot.name)
        if entry is None:
            problems.append(f"missing     {slot.name}: expected shape {list(slot.shape)}")
        elif entry.shape != slot.shape:
            problems.append(
                f"misshapen   {slot.name}: shape {list(entry.shape)} in {entry.file.name}, but config.json "
                f"asks for {list(slot.shape)}"
            )
    if whole:
        known = {slot.name for slot in expected} | optional
        problems += [
            f"unexpected  {entry.stored} in {entry.file.name}: no parameter of this model"
            for name, entry in files.entries.items()
            if name not in known
        ]
    if problems:
        raise WeightsError(
            "\n".join(
                [
                    f"{files.folder}: config.json and weights do not fit ({len(problems)} "
                    f"tensor{'s' if len(problems) > 1 else ''}):",
                    *listed(problems),
                ]
            )
        )


def _equal(reader: Reader, files: WeightsFolder, one: str, other: str) -> bool:
    a, b = files.entries[one], files.entries[other]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    step = max(1, _BLOCK_BYTES // a.row_bytes)

    def bits(name, start):
        return reader.rows(name, start, min(start + step, a.shape[0])).view(np.uint8)

    return all(np.array_equal(bits(one, start), bits(other, start)) for start in range(0, a.shape[0], step))


def _stored_dtype(files: WeightsFolder, pieces: list[tuple[Slot, int]]):
    kinds = {jnp.dtype(files.entries[slot.name].dtype) for slot, _ in pieces}
    widest = kinds.pop() if len(kinds) == 1 else jnp.result_type(*kinds)
    return jnp.dtype("float32") if widest == jnp.dtype("float64") else widest  # JAX computes in 32 bits


def _place(reader: Reader, pieces: list[tuple[Slot, int]], shape: tuple[int, ...], dtype, sharding, pool) -> jax.Array:
    """One parameter: allocate each distinct shard, copy every layer into them, hand them to their devices."""
    indices = {
        device: _bounds(index, shape) for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    shards = {
        bounds: _aligned_empty(tuple(stop - start for start, stop in bounds), dtype) for bounds in set(indices.values())
    }
    jobs = []
    for slot, member in pieces:
        axes = len(slot.index)
        targets = []
        for bounds, shard in shards.items():
            if all(low <= number < high for number, (low, high) in zip(slot.index, bounds, strict=False)):
                own = shard[tuple(number - low for number, (low, _) in zip(slot.index, bounds, strict=False))]
                targets.append((bounds[axes:], own))
        if targets:
            reader.announce(slot.name)
            jobs += (
                _copies(reader, slot, member, targets)
                if isinstance(slot.rule.form, Rows)
                else [_whole_copy(reader, slot, member, targets)]
            )
    for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
        done.result()
    arrays = [jax.device_put(shards[bounds], device) for device, bounds in indices.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (part.start or 0, size if part.stop is None else part.stop) for part, size in zip(index, shape, strict=True)
    )


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Memory as a CPU device wants it.

    Large arrays lie on large pages where the system has them: faulting in small ones costs as much as the copy that
    follows.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size >= 2 * _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        raw, alignment = np.frombuffer(pages, np.uint8), _LARGE_PAGE
    else:
        raw, alignment = np.empty(size + _ALIGNMENT, np.uint8), _ALIGNMENT
    offset = -raw.ctypes.data % alignment
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _scratch_of(use: str, size: int) -> np.ndarray:
    """This thread's memory for one use, kept from job to job."""
    memory = getattr(_scratch, use, None)
    if memory is None or len(memory) < size:
        memory = _aligned_empty((size,), np.dtype(np.uint8))
        setattr(_scratch, use, memory)
    return memory[:size]


def _whole_copy(reader: Reader, slot: Slot, member: int, targets) -> Callable[[], None]:
    """Job for the forms that no run of rows serves: read the tensor whole, take the member's part, copy each shard's
    block.
    """

    def copy() -> None:
        own = slot.rule.form.to_ours(reader.rows(slot.name, 0, slot.shape[0]), slot.shapes)[member]
        for bounds, memory in targets:
            np.copyto(memory, own[tuple(slice(begin, end) for begin, end in bounds)], casting="unsafe")

    return copy


def _copies(reader: Reader, slot: Slot, member: int, targets) -> list[Callable[[], None]]:
    """Jobs that copy one published tensor's part into (unstacked) shards: each block of rows is read once, for all of
    them.

    Args:
      targets: (bounds of each axis, memory) of each shard; at least one.
    """
    entry = reader.entry(slot.name)
    stored = jnp.dtype(entry.dtype)
    turned = slot.rule.form.transpose
    rows = slot.rule.form.rows(slot.shapes, member)
    # A turned parameter's last axis is the published rows; otherwise the first.
    axis = -1 if turned else 0
    low = min(bounds[axis][0] for bounds, _ in targets)
    high = max(bounds[axis][1] for bounds, _ in targets)
    whole = [(0, size) for size in entry.shape]
    step = _BLOCK_ROWS if turned else max(1, _BLOCK_BYTES // max(entry.row_bytes, 1))

    def copy(start: int, stop: int) -> None:
        if not turned and len(targets) == 1 and targets[0][1].dtype == stored and list(targets[0][0][1:]) == whole[1:]:
            bounds, memory = targets[0]
            reader.into(memory[start - bounds[0][0] : stop - bounds[0][0]], slot.name, rows.start + start)
            return
        block = _scratch_of("block", (stop - start) * entry.row_bytes).view(stored)
        block = block.reshape(stop - start, -1) if turned else block.reshape(stop - start, *entry.shape[1:])
        reader.into(block, slot.name, rows.start + start)
        for bounds, memory in targets:
            first, last = max(start, bounds[axis][0]), min(stop, bounds[axis][1])
            if first >= last:
                continue
            inner = bounds[:-1] if turned else bounds[1:]
            source = block[(slice(first - start, last - start), *(slice(begin, end) for begin, end in inner))]
            here = slice(first - bounds[axis][0], last - bounds[axis][0])
            place = memory[..., here] if turned else memory[here]
            if source.dtype == place.dtype:  # as plain integers: numpy copies them faster than bfloat16
                bits = np.dtype(f"u{place.dtype.itemsize}")
                source, place = source.view(bits), place.view(bits)
            if turned:
                _turn(place, source)
            else:
                np.copyto(place, source, casting="unsafe")

    def job(start: int, stop: int) -> None:
        for block in range(start, stop, step):
            copy(block, min(block + step, stop))

    stride = max(_JOB_BYTES // max(entry.row_bytes, 1) // step, 1) * step
    return [lambda start=start: job(start, min(start + stride, high)) for start in range(low, high, stride)]


def _turn(place: np.ndarray, source: np.ndarray) -> None:
    """place = source.T for a block of rows, tile by tile.

    Turning walks down the columns. Rows at a distance of large powers of two would all fall into the same few lines of
    the first-level cache, so a tile is first copied with its rows a line apart: that doubles the speed.
    """
    count = len(source)
    width = _TILE_BYTES // source.itemsize
    stride = _TILE_BYTES + _ALIGNMENT
    tile = _scratch_of("tile", count * stride).view(source.dtype).reshape(count, -1)
    for start in range(0, source.shape[1], width):
        part = source[:, start : start + width]
        spread = tile[:, : part.shape[1]]
        np.copyto(spread, part)
        np.copyto(place[start : start + width], spread.T, casting="unsafe")
