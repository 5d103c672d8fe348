"""Four-bit weights of bitsandbytes (NF4, as QLoRA's bases are published) into a plain folder, in equal bits to its own
dequantisation.

A matrix is stored as `NAME` (two codes a byte, the first in the high half) with siblings: `absmax` of each block of 64
weights, the 16 values of `quant_map`, and `quant_state.bitsandbytes__nf4`, JSON with shape, dtype and block sizes. With
double quantisation `absmax` is
itself a byte a block: an index into `nested_quant_map`, times `nested_absmax` of its block of 256, plus
`nested_offset`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import write_text

STATE = ".quant_state.bitsandbytes__nf4"
SIBLINGS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}
INDEX = "model.safetensors.index.json"


def dequantize(codes: np.ndarray, siblings: Mapping[str, np.ndarray]) -> np.ndarray:
    """The matrix of one quantised tensor.

    Args:
      codes: uint8, two weights each. siblings: by suffix (see `SIBLINGS`).

    Products are float32 and rounded once to the dtype of the quantisation, as bitsandbytes does.

    Raises:
      ValueError: sizes that do not belong together.
    """
    state: dict[str, Any] = json.loads(siblings[STATE].tobytes())
    sizes = [state["blocksize"], state.get("nested_blocksize", 1), *state["shape"]]
    if not all(type(size) is int and 0 < size < 2**31 for size in sizes) or max(sizes[:2]) > 2**16:
        raise ValueError(f"sizes {sizes}; expected whole numbers, blocks of at most 65,536")
    if state["quant_type"] != "nf4" or state["dtype"] not in _DTYPES:
        raise ValueError(
            f"quant_type {state['quant_type']!r} of {state['dtype']}; expected nf4 of {', '.join(_DTYPES)}"
        )
    count = int(np.prod(state["shape"], dtype=np.int64))
    absmax = siblings[".absmax"].reshape(-1)
    if "nested_blocksize" in state:
        nested = siblings[".nested_quant_map"].reshape(-1)[absmax]
        scale = np.repeat(siblings[".nested_absmax"].reshape(-1), state["nested_blocksize"])[: absmax.size]
        absmax = nested * scale + np.float32(state["nested_offset"])
    if codes.size != -(-count // 2) or absmax.size != -(-count // state["blocksize"]):
        raise ValueError(
            f"{codes.size} bytes and {absmax.size} blocks for {count} weights in blocks of {state['blocksize']}"
        )
    table, blocks = (
        siblings[".quant_map"].reshape(-1).astype(np.float32),
        np.repeat(absmax.astype(np.float32), state["blocksize"])[:count],
    )
    pairs = codes.reshape(-1)
    values = np.empty(2 * pairs.size, np.float32)
    values[0::2], values[1::2] = table[pairs >> 4], table[pairs & 15]
    return (values[:count] * blocks).astype(_DTYPES[state["dtype"]]).reshape(state["shape"])


def dequantize_folder(source: Path, out: Path) -> int:
    """Write a plain Hugging Face folder from one of bitsandbytes; returns the number of matrices.

    One weight file is in memory at a time.

    Raises:
      UserError: nothing quantised in it, another quantisation than NF4, siblings that are missing or damaged.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise UserError(f"{source}: no safetensors files")
    count, names = 0, {}
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                present = list(file.keys())
                _refuse_others(path, present)
                quantised = [name.removesuffix(STATE) for name in present if name.endswith(STATE)]
                hidden = {name + suffix for name in quantised for suffix in SIBLINGS}
                plain = [name for name in present if name not in hidden]
                made = {
                    name: _one(file, path, name, present) if name in quantised else file.get_tensor(name)
                    for name in plain
                }
                save_file(made, out / path.name, metadata=dict(file.metadata() or {"format": "pt"}))
        except SafetensorError as error:
            raise UserError(f"{path}: not a whole safetensors file ({error})") from error
        count += len(quantised)
        names |= dict.fromkeys(plain, path.name)
    if not count:
        raise UserError(f"{source}: no weights in NF4 of bitsandbytes")
    _copy_rest(source, out, names)
    return count


def _refuse_others(path: Path, present: list[str]) -> None:
    other = [
        name
        for name in present
        if name.endswith((".SCB", ".weight_format"))
        or (".quant_state.bitsandbytes__" in name and not name.endswith(STATE))
    ]
    if other:
        raise UserError(f"{path}: {other[0]} belongs to another quantisation of bitsandbytes; only NF4 is read")


def _one(file: Any, path: Path, name: str, present: list[str]) -> np.ndarray:
    found = {suffix: file.get_tensor(name + suffix) for suffix in SIBLINGS if name + suffix in present}
    try:
        return dequantize(file.get_tensor(name), found)
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {name} cannot be dequantised: {error}") from error


def _copy_rest(source: Path, out: Path, names: Mapping[str, str]) -> None:
    """Copy everything but weights; the index lists the plain tensors, config.json says nothing of a quantisation any
    more.
    """
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix == ".safetensors":
            continue
        if path.name == INDEX:
            write_text(
                out / INDEX, json.dumps({"metadata": {}, "weight_map": dict(sorted(names.items()))}, indent=2) + "\n"
            )
        elif path.name == "config.json":
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("quantization_config", None)
            write_text(out / "config.json", json.dumps(content, indent=2) + "\n")
        else:
            shutil.copyfile(path, out / path.name)
