"""Configuration schema, loading and validation. Imports no jax."""
