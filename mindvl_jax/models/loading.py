"""A family's batches: its batch spec and its loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.data import epochs, loader
from mindvl_jax.data.processor import BatchSpec
from mindvl_jax.models.registry import spec_of
from mindvl_jax.models.spec import Named


def processor_of(config: Config) -> Named:
    """Processor class of the model's family."""
    return spec_of(config.model).processor


def batch_spec(config: Config, phase: PhaseConfig) -> BatchSpec:
    """Arrays of the global batch of one micro-step."""
    return processor_of(config).get().batch_spec(config, phase)


def make_loader(config: Config, phase_index: int, **options: Any) -> loader.Loader:
    """`data.loader.make_loader` with the processor of the model's family."""
    return loader.make_loader(config, phase_index, processor_of(config), **options)


def resolve_epochs(config: Config, say: Callable[[str], None] = lambda line: None) -> Config:
    """`data.epochs.resolve_epochs` with the processor of the model's family."""
    return epochs.resolve_epochs(config, processor_of(config), say)
