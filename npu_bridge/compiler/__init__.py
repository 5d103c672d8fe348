"""A sharded JAX program to torch source: lowering, partitioning, passes, memory, code generation."""
