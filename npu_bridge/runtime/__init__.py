"""Run a written program: process groups, collectives, helpers, random bits.

The only part of the bridge that imports torch.
"""
