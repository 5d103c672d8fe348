"""Files to packed batches. Knows nothing of models or devices; see docs/data.md."""
