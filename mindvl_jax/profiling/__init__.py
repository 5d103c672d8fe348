"""Time of a training step by block of the model, from traces of a running training."""

from mindvl_jax.profiling.profiler import StepProfiler, request

__all__ = ["StepProfiler", "request"]
