"""Weights as MindSpeed-MM keeps them: folders bound to a layout of tensor and pipeline parallelism."""
