"""FP8 folders as DeepSeek-V3 is published (float8_e4m3fn with a float32 scale for each block of 128 x 128), to plain
bfloat16 and back.

A matrix `NAME.weight` has `NAME.weight_scale_inv`, (rows / 128, columns / 128) rounded up: the factor of each block.
Values are `float32(weight) * scale`, rounded once to bfloat16. Back, a block is divided by its scale and rounded to the
nearest float8. Scales of the original folder are used where their blocks still fit under them, so that an untouched
folder comes back in equal bytes; else a block's scale is its largest magnitude over 448, the largest float8.

Files are written tensor by tensor: host memory holds one tensor in both forms, whatever the folder's size.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_text

BLOCK = 128
FLOAT8, BFLOAT16 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.bfloat16)
LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448
SCALE = "_scale_inv"
INDEX = "model.safetensors.index.json"
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
_DTYPES = {"F8_E4M3": FLOAT8, "BF16": BFLOAT16, "F16": np.dtype("float16"), "F32": np.dtype("float32")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _spread(scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each weight."""
    return scales.repeat(BLOCK, 0)[: shape[0]].repeat(BLOCK, 1)[:, : shape[1]]


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """bfloat16 (rows, columns) of a float8 matrix and its blocks' scales.

    Raises:
      ValueError: shapes that do not belong together.
    """
    if weight.ndim != 2 or scales.shape != scale_shape(weight.shape):
        raise ValueError(
            f"scales {list(scales.shape)} of a weight {list(weight.shape)}; expected {list(scale_shape(weight.shape))}"
        )
    return (weight.astype(np.float32) * _spread(scales, weight.shape)).astype(BFLOAT16)


def quantize(weight: np.ndarray, scales: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, int]:
    """float8 weights, their blocks' scales, and how many blocks needed another scale than the given one.

    Args:
      weight: (rows, columns). scales: of the folder that the weights come from.
    """
    rows, columns = scale_shape(weight.shape)
    padded = np.zeros((rows * BLOCK, columns * BLOCK), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = np.abs(padded).reshape(rows, BLOCK, columns, BLOCK).max((1, 3))
    own = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    changed = 0
    if scales is not None:
        # Rounding to bfloat16 may lift the largest weight by 2 ** -9, far below half a step of float8 there.
        holds = (scales > 0) & (largest <= scales * np.float32(LARGEST * (1 + 2.0**-8)))
        changed = int(np.sum(~holds))
        own = np.where(holds, scales, own)
    ratio = padded[: weight.shape[0], : weight.shape[1]] / _spread(own, weight.shape)
    return np.clip(ratio, -LARGEST, LARGEST).astype(FLOAT8), own, changed


# ---- folders


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor on disk."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        count = int(np.prod(self.shape, dtype=np.int64))
        with open(self.file, "rb") as file:
            file.seek(self.start)
            return np.fromfile(file, self.dtype, count).reshape(self.shape)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder's safetensors files, in the order of files and of bytes inside them.

    Raises:
      UserError: no weights, damaged files, a dtype that none of these folders has, a name twice.
    """
    found: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors files")
    for path in files:
        try:
            with safe_open(path, framework="numpy"):  # checks header and sizes
                pass
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error})") from error
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])[0]):
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
            if name in found:
                raise UserError(f"{path}: {name} is there twice (also in {found[name].file.name})")
            start = 8 + length + entry["data_offsets"][0]
            found[name] = Tensor(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return found


def _write(path: Path, outlines: Mapping[str, tuple[np.dtype, tuple[int, ...]]], make: Callable) -> None:
    """A safetensors file, one tensor after another: `make(name)` is asked when its turn has come."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in outlines.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in outlines.items():
            value = make(name)
            assert (value.dtype, value.shape) == (dtype, shape), name
            file.write(np.ascontiguousarray(value).view(np.uint8).data)


def _by_file(names: Mapping[str, Tensor]) -> Iterator[tuple[Path, list[str]]]:
    files: dict[Path, list[str]] = {}
    for name, tensor in names.items():
        files.setdefault(tensor.file, []).append(name)
    yield from files.items()


def dequantize_folder(source: Path, out: Path, *, left_out: Callable[[str], bool] = lambda name: False) -> int:
    """Write a plain bfloat16 folder from an FP8 one; returns the number of matrices.

    Args:
      left_out: names of tensors that are not written (an MTP layer).

    Raises:
      UserError: nothing in FP8, a scale that is missing or misshapen, another block size; nothing is written then.
    """
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if not left_out(name)}
    quantised = {name for name, tensor in tensors.items() if tensor.dtype == FLOAT8}
    if not quantised:
        raise UserError(f"{source}: no weights in FP8 (F8_E4M3)")
    _require_blocks(source)
    for name in quantised:
        scale = tensors.get(name + SCALE)
        if scale is None:
            raise UserError(f"{source}: {name} has no {name + SCALE}")
        if len(tensors[name].shape) != 2 or scale.shape != scale_shape(tensors[name].shape):
            raise UserError(
                f"{source}: {name + SCALE} is {list(scale.shape)}, but {name} is {list(tensors[name].shape)} in blocks "
                f"of {BLOCK} x {BLOCK}"
            )

    def make(name: str) -> np.ndarray:
        value = tensors[name].read()
        return dequantize(value, tensors[name + SCALE].read()) if name in quantised else value

    out.mkdir(parents=True, exist_ok=True)
    hidden = {name + SCALE for name in quantised}
    kept = {name: tensor for name, tensor in tensors.items() if name not in hidden}
    for path, names in _by_file(kept):
        outlines = {name: (BFLOAT16 if name in quantised else kept[name].dtype, kept[name].shape) for name in names}
        _write(out / path.name, outlines, make)
    _copy_rest(source, out, {name: tensor.file.name for name, tensor in kept.items()}, None)
    return len(quantised)


@dataclasses.dataclass
class Quantised:
    """What quantising a folder did.

    Attributes:
      matrices, blocks: in FP8. new_scales: blocks that the original's scales did not hold. largest: relative error of a
        weight against the largest of its block.
    """

    matrices: int = 0
    blocks: int = 0
    new_scales: int = 0
    largest: float = 0.0


def quantize_folder(source: Path, out: Path, like: Path) -> Quantised:
    """Write a plain folder in FP8, matrix by matrix as the FP8 folder `like` has them, with its scales where they hold.

    Raises:
      UserError: a matrix of `like` that is missing or has another shape; `like` has nothing in FP8.
    """
    tensors, model = tensors_of(source), tensors_of(like)
    wanted = {name: tensor for name, tensor in model.items() if tensor.dtype == FLOAT8}
    if not wanted:
        raise UserError(f"{like}: no weights in FP8 (F8_E4M3)")
    _require_blocks(like)
    for name, tensor in wanted.items():
        if name not in tensors:
            raise UserError(f"{source}: {name} is missing, which {like} holds in FP8")
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} is {list(tensors[name].shape)}, in {like} {list(tensor.shape)}")
        if name + SCALE not in model:
            raise UserError(f"{like}: {name} has no {name + SCALE}")
    done, scales = Quantised(), {}

    def make(name: str) -> np.ndarray:
        if name in scales:
            return scales.pop(name)
        value = tensors[name].read()
        if name not in wanted:
            return value
        codes, own, changed = quantize(value, model[name + SCALE].read())
        scales[name + SCALE] = own
        done.matrices, done.blocks = done.matrices + 1, done.blocks + own.size
        done.new_scales += changed
        error = np.abs(codes.astype(np.float32) * _spread(own, value.shape) - value.astype(np.float32))
        done.largest = max(done.largest, float((error / (_spread(own, value.shape) * LARGEST)).max()))
        return codes

    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    for path, names in _by_file(tensors):
        outlines: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        for name in names:
            shape = tensors[name].shape
            outlines[name] = (FLOAT8 if name in wanted else tensors[name].dtype, shape)
            if name in wanted:
                outlines[name + SCALE] = (np.dtype("float32"), scale_shape(shape))
        _write(out / path.name, outlines, make)
        files |= dict.fromkeys(outlines, path.name)
    _copy_rest(source, out, files, QUANTIZATION)
    return done


def _require_blocks(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, which says how the weights are quantised")
    content = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    size = content.get("weight_block_size")
    if content.get("quant_method") != "fp8" or size != [BLOCK, BLOCK]:
        raise UserError(
            f"{path}: quantization_config is {json.dumps(content)[:200]}; expected quant_method fp8 and "
            f"weight_block_size [{BLOCK}, {BLOCK}]"
        )


def _copy_rest(source: Path, out: Path, files: Mapping[str, str], quantization: Mapping[str, Any] | None) -> None:
    """Everything but weights; index and config.json say what the folder holds now."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix == ".safetensors":
            continue
        if path.name == INDEX:
            index = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
            write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
        elif path.name == "config.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("quantization_config", None)
            if quantization is not None:
                content["quantization_config"] = dict(quantization)
            write_text(out / "config.json", json.dumps(content, indent=2) + "\n")
        else:
            shutil.copyfile(path, out / path.name)
