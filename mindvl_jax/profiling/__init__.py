"""Where the time of a step goes: traces of a running training, told in the names of the model's blocks."""

from mindvl_jax.profiling.profiler import StepProfiler, request

__all__ = ["StepProfiler", "request"]
