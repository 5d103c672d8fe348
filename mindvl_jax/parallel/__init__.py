"""Mesh, sharding rules, processes. Knows no files and no tokens."""
