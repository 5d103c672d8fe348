"""torch's zip files without torch: tensors read by memory map, pickles read without running anything, files written as
a stream.

A `.pt` file is a zip of stored (not compressed) records: `<top>/data.pkl`, the pickled object in which each tensor
refers to a storage by key, and `<top>/data/<key>`, the bytes of each storage. An unpickler may call whatever a file
names; this one builds tensors and containers itself and turns every other name into an inert placeholder, so a hostile
file can do no more than be refused.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import ml_dtypes
import numpy as np

from mindvl_jax.core.errors import UserError

_STORAGES = {
    "BFloat16Storage": ml_dtypes.bfloat16, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "DoubleStorage": np.float64, "LongStorage": np.int64,
    "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    }  # fmt: skip
_DTYPES = {np.dtype(kind): name for name, kind in _STORAGES.items()}
_ALIGNMENT = 64
_CHUNK = 1 << 24


class _Outside(OSError):
    """A seek before the first byte of a `_Window`."""


_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, struct.error,
    _Outside,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file. Nothing is read before `array`.

    Attributes:
      start: first byte in the file. strides: in elements.
    """

    file: Path
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The values as a read-only view of the mapped file."""
        size = np.dtype(self.dtype).itemsize
        if not all(self.shape):
            return np.zeros(self.shape, self.dtype)
        extent = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        flat = np.memmap(self.file, np.uint8, "r", self.start, (extent * size,)).view(self.dtype)
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, [stride * size for stride in self.strides], writeable=False
        )


class Inert:
    """Stands for an object of a class that is not read: takes any construction and state, keeps a Namespace's
    attributes.
    """

    state: dict[str, Any]

    def __new__(cls, *arguments: Any, **options: Any):
        made = super().__new__(cls)  # pickles may make an object without calling its __init__
        made.state = {}
        return made

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype | None
    count: int


class _Window(io.RawIOBase):
    """Bytes `start` to `start + length` of an open file, as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int | None):
        self._file, self._start, self._place = file, start, 0
        self._length = file.seek(0, io.SEEK_END) - start if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise _Outside("refers to a place before its first byte")  # an OSError: what zipfile expects
        self._place = base + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._place)
        self._file.seek(self._start + self._place)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._place += len(data)
        return data


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, file: Path, records: Mapping[str, tuple[int, int]]):
        super().__init__(io.BytesIO(data))
        self._file, self._records = file, records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda value, *rest: value
        if module in ("torch", "torch.storage") and (name in _STORAGES or name == "UntypedStorage"):
            return np.dtype(_STORAGES[name]) if name in _STORAGES else None
        if (module, name) == ("torch", "Size"):
            return tuple
        return Inert

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count = identity
        if kind != "storage" or key not in self._records:
            raise pickle.UnpicklingError(f"refers to {kind} {key!r}, which the file does not hold")
        return _Storage(str(key), dtype if isinstance(dtype, np.dtype) else None, int(count))

    def _tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *rest: Any) -> LazyTensor:
        if storage.dtype is None:
            raise pickle.UnpicklingError("holds a tensor of a dtype that is not read")
        begin, length = self._records[storage.key]
        size = storage.dtype.itemsize
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        last = (
            offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
            if all(shape)
            else offset - 1
        )
        if (
            offset < 0
            or any(count < 0 for count in shape)
            or any(stride < 0 for stride in strides)
            or (last + 1) * size > length
        ):
            raise pickle.UnpicklingError(f"holds a tensor of shape {list(shape)} that reaches past its storage")
        return LazyTensor(self._file, storage.dtype, begin + offset * size, shape, strides)


def read(path: Path, start: int = 0, length: int | None = None) -> Any:
    """The object of a torch file, with a `LazyTensor` in place of each tensor and an `Inert` for every class that is
    not data.

    Args:
      start, length: bytes of the file that hold it; a distributed checkpoint has many in one file.

    Raises:
      UserError: not a zip of torch's, compressed records, a damaged pickle, tensors outside their storage.
    """
    try:
        with path.open("rb") as file, _Window(file, start, length) as raw, zipfile.ZipFile(raw) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            top = next(
                (name.removesuffix("data.pkl") for name in infos if name.endswith("data.pkl") and name.count("/") <= 1),
                None,
            )
            if top is None:
                raise UserError(f"{path}: a zip without data.pkl; expected a file of torch.save")
            if f"{top}byteorder" in infos and archive.read(f"{top}byteorder").strip() != b"little":
                raise UserError(f"{path}: written on a big-endian machine, which is not read")
            records = {}
            for name, info in infos.items():
                if name.startswith(f"{top}data/"):
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise UserError(f"{path}: {name} is compressed; torch writes storages as they are")
                    raw.seek(info.header_offset + 26)
                    name_length, extra_length = struct.unpack("<HH", raw.read(4))
                    records[name.removeprefix(f"{top}data/")] = (
                        start + info.header_offset + 30 + name_length + extra_length,
                        info.file_size,
                    )
            return _Unpickler(archive.read(f"{top}data.pkl"), path, records).load()
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path}: not a zip file ({error}). Files of torch older than 1.6 are pickles, which are "
            "refused: load and save them with a newer torch"
        ) from error
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged or hostile: {error}") from error


def read_pickle(path: Path) -> Any:
    """The object of a plain pickle without tensors, with an `Inert` for every class that is not data.

    Raises:
      UserError: damaged, or refers to storages.
    """
    try:
        return _Unpickler(path.read_bytes(), path, {}).load()
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged or hostile: {error}") from error


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor to write: `make` is called when its turn comes, so that one is in memory at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


class _Global:
    """A name in a pickle that is not imported here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self) -> None:
        """The pickler asks for something that can be called."""


class _Pickler(pickle._Pickler):
    """Pickle of nested dicts with `Written` leaves. The Python class: the C one insists on importing what it names."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.tensors: list[Written] = []

    def _save_global(self, value: _Global) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    dispatch[_Global] = _save_global

    def _save_tensor(self, value: Written) -> None:
        strides = tuple(int(np.prod(value.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(value.shape)))
        key = len(self.tensors)
        self.tensors.append(value)
        self.save_reduce(
            _Global("torch._utils", "_rebuild_tensor_v2"),
            (_Key(key, value), 0, value.shape, strides, False, collections.OrderedDict()),
        )

    dispatch[Written] = _save_tensor

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Key):
            return None
        count = int(np.prod(value.tensor.shape, dtype=np.int64))
        return ("storage", _Global("torch", _DTYPES[np.dtype(value.tensor.dtype)]), str(value.number), "cpu", count)


@dataclasses.dataclass(frozen=True)
class _Key:
    number: int
    tensor: Written


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested dicts with `Written` leaves as `torch.save` does; each storage begins at a multiple of 64 bytes."""
    top, buffer = path.stem, io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(dict(content))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{top}/data.pkl", buffer.getvalue())
        archive.writestr(f"{top}/byteorder", b"little")
        for number, tensor in enumerate(pickler.tensors):
            array = tensor.make()
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise ValueError(f"a tensor announced as {tensor.shape} {tensor.dtype} is {array.shape} {array.dtype}")
            info = zipfile.ZipInfo(f"{top}/data/{number}")
            info.file_size = array.nbytes
            zip64 = 20 if array.nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0
            padding = -(archive.fp.tell() + 30 + len(info.filename) + 4 + zip64) % _ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            with archive.open(info, "w") as record:
                for start in range(0, max(1, flat.size), _CHUNK):
                    record.write(flat[start : start + _CHUNK])
        archive.writestr(f"{top}/version", b"3\n")
