"""Estimate the memory of a run before it starts, on any machine: `mindvl plan`, docs/plan.md."""
