"""Disk cache of written programs, keyed by lowered module, mesh, options, versions and the bridge's source."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import tempfile
import warnings
import zipfile
from typing import Any

import jax
import jaxlib
import numpy as np

from npu_bridge.compiler.codegen.printer import Source


def directory() -> pathlib.Path | None:
    """Return the cache folder: NPU_BRIDGE_CACHE, else the user's cache folder. ``NPU_BRIDGE_CACHE=off`` keeps none."""
    chosen = os.environ.get("NPU_BRIDGE_CACHE", "")
    if chosen == "off":
        return None
    base = chosen or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "npu_bridge")
    return pathlib.Path(base)


@functools.cache
def _own_source() -> str:
    """Return a digest of the compiler's source, so that programs of other versions are not reused."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).parents[1]
    for path in sorted(
        [*root.glob("*.py"), *root.glob("compiler/**/*.py"), *root.glob("runtime/*.py"), *root.glob("ops/*.py")]
    ):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _private(base: pathlib.Path) -> bool:
    """Whether nobody else can put programs into the folder: what is loaded from it is run."""
    try:
        found = base.stat()
    except OSError:
        return True  # not made yet
    own = not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)
    if not own:
        warnings.warn(
            f"{base} is not used as npu_bridge's cache: it belongs to another user, or others may write it; set "
            "NPU_BRIDGE_CACHE to a folder of your own",
            stacklevel=2,
        )
    return own


def key(module_text: str, **options: Any) -> str:
    versions = f"jax {jax.__version__} jaxlib {jaxlib.__version__}"
    text = "\n".join([module_text, versions, _own_source(), json.dumps(options, sort_keys=True, default=str)])
    return hashlib.sha256(text.encode()).hexdigest()


def load(name: str) -> tuple[Source, dict[str, Any]] | None:
    """Return the cached program and its extra data, or None. A damaged entry counts as missing."""
    base = directory()
    if base is None or not _private(base):
        return None
    try:
        meta = json.loads((base / f"{name}.json").read_text())
        with np.load(base / f"{name}.npz", allow_pickle=False) as stored:
            arrays = [stored[f"c{i}"].view(np.dtype(d)) for i, d in enumerate(meta["constant_dtypes"])]
        fields = meta["source"]
        fields["constants"] = [(a, [tuple(x) for x in dims]) for a, dims in zip(arrays, meta["constant_dims"])]
        fields["axes_used"] = [tuple(a) for a in fields["axes_used"]]
        return Source(**fields), meta["extra"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, zipfile.BadZipFile):
        return None


def store(name: str, source: Source, extra: dict[str, Any]) -> None:
    """Write an entry atomically. Failing to write is not an error."""
    base = directory()
    if base is None:
        return
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(Source) if f.name != "constants"}
    meta = {
        "source": fields,
        "extra": extra,
        "constant_dtypes": [a.dtype.name for a, _ in source.constants],
        "constant_dims": [dims for _, dims in source.constants],
    }
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _private(base):
            return
        with tempfile.NamedTemporaryFile(dir=base, suffix=".npz", delete=False) as f:
            raw = {
                f"c{i}": np.ascontiguousarray(a).view(np.uint8) if a.ndim else a.reshape(1).view(np.uint8)
                for i, (a, _) in enumerate(source.constants)
            }
            np.savez(f, **raw)
        os.replace(f.name, base / f"{name}.npz")
        with tempfile.NamedTemporaryFile("w", dir=base, suffix=".json", delete=False) as f:
            json.dump(meta, f)
        os.replace(f.name, base / f"{name}.json")
    except OSError:
        return
