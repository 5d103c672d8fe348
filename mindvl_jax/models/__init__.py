"""Model families (one folder each), the layers they share and the registry.

No mesh, no files; fused operators from npu_bridge.ops.

Importing this package, `spec` and `registry` loads no jax.
"""
