"""Folders of torch.distributed.checkpoint (DCP), as FSDP2 runs write them: read without torch.

`.metadata` is a pickle that names every tensor, its shape and its chunks; each chunk is a whole torch file at some
place of a `*.distcp` file. A tensor is assembled from its chunks when it is asked for, whatever mesh wrote them.
Optimizer states, counters and random states stand in the same folder and are not read.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.hf import HFMapping
from mindvl_jax.weights.mindspeed import torch_zip
from mindvl_jax.weights.mindspeed.convert import HEAD, refuse

METADATA = ".metadata"
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A box of a tensor and the torch file that holds it."""

    offsets: Shape
    sizes: Shape
    path: Path
    start: int
    length: int

    def read(self) -> torch_zip.LazyTensor:
        tensor = torch_zip.read(self.path, self.start, self.length)
        if not isinstance(tensor, torch_zip.LazyTensor) or tensor.shape != self.sizes:
            raise UserError(f"{self.path}: no tensor of shape {list(self.sizes)} at byte {self.start}")
        return tensor


class Dcp:
    """Tensors of a DCP folder by published name.

    Attributes:
      prefix: of the model's keys, `model.` in most folders. left_out: keys outside of it, which are not read.

    Raises:
      UserError: no `.metadata`; a damaged one; tensors missing, unexpected or misshapen, all of them at once; chunks
        that do not cover their tensor; two models in the folder and no `prefix`.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Shape], mapping: HFMapping, *, prefix: str | None = None):
        self.folder = folder
        tensors, others = _tensors(folder)
        names = {key: _suffixes(key, shapes, mapping) for key in tensors}
        self.prefix = _prefix(folder, names, len(shapes)) if prefix is None else prefix
        self._chunks, unexpected, self.left_out = {}, [], list(others)
        sizes = {}
        for key, (size, chunks) in tensors.items():
            if not key.startswith(self.prefix):
                self.left_out.append(key)
                continue
            name = mapping.canonical(key.removeprefix(self.prefix))
            if name in shapes:
                self._chunks[name], sizes[name] = chunks, size
            elif name != HEAD:  # a tied head is the embedding
                unexpected.append(key)
        problems = [f"missing    {self.prefix}{name}" for name in shapes if name not in sizes]
        problems += [f"unexpected {key}" for key in unexpected]
        problems += [
            f"misshapen  {name}: {list(size)}, expected {list(shapes[name])}"
            for name, size in sizes.items()
            if size != tuple(shapes[name])
        ]
        refuse(f"{folder}: not this model's weights", problems)
        for name, chunks in self._chunks.items():
            _require_cover(folder, name, sizes[name], chunks)
        self._sizes = sizes

    def dtype(self, name: str) -> np.dtype:
        return self._chunks[name][0].read().dtype

    def tensor(self, name: str) -> np.ndarray:
        whole = np.empty(self._sizes[name], self.dtype(name))
        for chunk in self._chunks[name]:
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            part = chunk.read()
            if part.dtype != whole.dtype:
                raise UserError(f"{chunk.path}: chunks of {name} in {part.dtype} and in {whole.dtype}")
            whole[box] = part.array()
        return whole


def _tensors(folder: Path) -> tuple[dict[str, tuple[Shape, list[_Chunk]]], list[str]]:
    """({key: (shape, chunks)}, keys of what is no tensor)."""
    path = folder / METADATA
    if not path.is_file():
        raise UserError(f"{folder}: no {METADATA}; expected a folder of torch.distributed.checkpoint")
    content = torch_zip.read_pickle(path)
    try:
        stored = {
            (index.state["fqn"], tuple(index.state.get("offset") or ())): info.state
            for index, info in content.state["storage_data"].items()
        }
        tensors, others = {}, []
        for key, entry in content.state["state_dict_metadata"].items():
            if "chunks" not in entry.state:
                others.append(key)
                continue
            chunks = []
            for chunk in entry.state["chunks"]:
                offsets, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
                info = stored[key, offsets]
                if info.get("transform_descriptors"):
                    raise UserError(
                        f"{folder}: {key} is stored with {info['transform_descriptors']}, which is not read"
                    )
                file = folder / Path(str(info["relative_path"])).name
                if file.name != info["relative_path"] or not file.is_file():
                    raise UserError(
                        f"{folder}: {key} lies in {info['relative_path']!r}, which is no file of the folder"
                    )
                chunks.append(_Chunk(offsets, sizes, file, int(info["offset"]), int(info["length"])))
            tensors[key] = (tuple(entry.state["size"]), chunks)
        return tensors, others
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not the metadata of a torch.distributed.checkpoint folder ({error!r})") from error


def _suffixes(key: str, shapes: Mapping[str, Shape], mapping: HFMapping) -> list[str]:
    """Prefixes of a key behind which a published name follows."""
    parts = key.split(".")
    cuts = (".".join([*parts[:count], ""]) if count else "" for count in range(len(parts)))
    return [prefix for prefix in cuts if mapping.canonical(key.removeprefix(prefix)) in shapes]


def _prefix(folder: Path, names: Mapping[str, Iterable[str]], count: int) -> str:
    """The prefix behind which most published names follow; the shortest of equal ones."""
    found = collections.Counter(prefix for prefixes in names.values() for prefix in prefixes)
    if not found:
        raise UserError(f"{folder}: none of its {len(names)} tensors has a name of this model")
    best = max(found.values())
    candidates = sorted((prefix for prefix, matches in found.items() if matches == best), key=len)
    # `model.model.x` read as `model.` + `model.x` and as `model.model.` + `x` is one set of tensors, not two.
    apart = [prefix for prefix in candidates if not prefix.startswith(candidates[0])]
    if apart and best >= count // 2:
        raise UserError(
            f"{folder}: holds the model {1 + len(apart)} times, under {', '.join(map(repr, [candidates[0], *apart]))}; "
            "say which with --prefix"
        )
    return candidates[0]


def _require_cover(folder: Path, name: str, size: Shape, chunks: list[_Chunk]) -> None:
    """Raise UserError unless the chunks are boxes of the tensor that do not overlap and leave no gap."""
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(size)
        and all(
            start >= 0 and start + own <= whole
            for start, own, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
        )
        for chunk in chunks
    )

    def overlap(one: _Chunk, two: _Chunk) -> bool:
        spans = zip(one.offsets, one.sizes, two.offsets, two.sizes, strict=True)
        return all(a < c + d and c < a + b for a, b, c, d in spans)

    filled = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not inside or filled != math.prod(size) or any(overlap(*pair) for pair in itertools.combinations(chunks, 2)):
        raise UserError(f"{folder}: the chunks of {name} do not cover its shape {list(size)} once")
