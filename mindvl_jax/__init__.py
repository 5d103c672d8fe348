"""MindVL in JAX: a native-resolution vision-language model and the system that trains it."""

__version__ = "0.1.0"
