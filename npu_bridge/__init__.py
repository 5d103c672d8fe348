"""Any sharded JAX step as a torch program: `npu_bridge.jit` compiles it, `npu_bridge.ops` holds fused operators.

Importing this package imports neither torch nor the compiler: names are resolved when they are first used, so that code
which only calls `npu_bridge.ops` on XLA stays free of torch.
"""

import importlib

_PUBLIC = {
    "jit": "npu_bridge.runtime.api",
    "Lowered": "npu_bridge.runtime.api",
    "Array": "npu_bridge.runtime.array",
    "BridgeError": "npu_bridge.errors",
    "UnsupportedError": "npu_bridge.errors",
    "VersionError": "npu_bridge.errors",
    "use": "npu_bridge.runtime.use",
    "record_scopes": "npu_bridge.runtime.scopes",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'npu_bridge' has no attribute {name!r}; public names: {', '.join(__all__)}")
