"""Training objectives: loss terms of a micro-batch, their metrics, and updates that gradients do
not make.
"""
