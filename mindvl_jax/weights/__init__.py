"""Published weights in and out, on any mesh."""

from mindvl_jax.weights.hf_config import WeightsError
from mindvl_jax.weights.load import load_parameters
from mindvl_jax.weights.resolve import OpenedModel, open_model
from mindvl_jax.weights.save import save_parameters

__all__ = ["OpenedModel", "WeightsError", "load_parameters", "open_model", "save_parameters"]
