"""Arrays of numpy and JAX as torch tensors of the storage type, and back."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from npu_bridge.compiler.codegen.operands import STORAGE
from npu_bridge.compiler.lower import mlir_dtype
from npu_bridge.errors import PlacementError

# numpy has no such dtypes; torch exports them as integer bits.
_AS_BITS = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: (torch.uint8, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: (torch.uint8, ml_dtypes.float8_e5m2fnuz),
}
_NARROWED = {torch.float64: torch.float32, torch.int64: torch.int32, torch.complex128: torch.complex64}


def storage_dtype(dtype: Any) -> torch.dtype:
    """Return torch's storage dtype of a numpy dtype: unsigned integers wider than a byte are stored as signed bits."""
    return getattr(torch, STORAGE[mlir_dtype(dtype)])


def to_numpy(x: torch.Tensor, dtype: Any) -> np.ndarray:
    """Copy to the host (no copy for a CPU tensor) with the array's own dtype."""
    x = x.detach().cpu()
    if x.is_complex() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    if x.dtype in _AS_BITS:
        bits, named = _AS_BITS[x.dtype]
        return x.contiguous().view(bits).numpy().view(named)
    return x.contiguous().numpy().view(np.dtype(dtype)) if np.dtype(dtype).kind == "u" else x.numpy()


def to_torch(x: Any, dtype: Any) -> torch.Tensor:
    """Convert a host or device array to a torch tensor of the storage type, without a copy if DLPack or numpy allow it.

    Raises PlacementError for something that is no array or has another dtype.
    """
    wanted = storage_dtype(dtype)
    if isinstance(x, torch.Tensor):
        t = x
    else:
        if (
            isinstance(x, jax.Array)
            and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
            and x.is_fully_replicated
        ):
            try:
                t = torch.from_dlpack(x)
            except Exception:  # layouts and dtypes DLPack does not carry
                t = None
        else:
            t = None
        if t is None:
            if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                x = jax.random.key_data(x)
            host = np.asarray(x, dtype=dtype if np.isscalar(x) or isinstance(x, (bool, int, float)) else None)
            if host.dtype.kind == "O":
                raise PlacementError(
                    f"npu_bridge: a non-array leaf of type {type(x).__name__} was passed; mark it static or remove it"
                )
            bits = {named: (b, t) for t, (b, named) in _AS_BITS.items()}.get(host.dtype.type)
            host = np.ascontiguousarray(host) if host.ndim else host
            if bits is not None:
                view = {torch.int16: np.int16, torch.uint8: np.uint8}[bits[0]]
                t = torch.from_numpy(host.view(view).copy()).view(bits[1])
            else:
                signed = {"uint16": np.int16, "uint32": np.int32, "uint64": np.int64}.get(host.dtype.name)
                host = host.view(signed) if signed else host
                t = torch.from_numpy(host if host.flags.writeable else host.copy())
    if t.dtype in (torch.uint16, torch.uint32, torch.uint64):
        t = t.view({torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}[t.dtype])
    if (
        t.dtype != wanted and t.dtype.itemsize == 8 and wanted == _NARROWED.get(t.dtype)
    ):  # jax without x64 takes 64 bits as 32
        t = t.to(wanted)
    if t.dtype != wanted:
        raise PlacementError(
            f"npu_bridge: array of dtype {t.dtype} found, the program was compiled for {np.dtype(dtype).name}"
        )
    return t
