"""Our mathematics against transformers' own, on the same weights and the same inputs.

The only place that imports torch.
"""
