"""`ModelSpec`: all that the rest of the project knows of a model family. Imports no jax.

A family is one folder `models/<family>/`, whose `__init__` defines `SPEC`. What needs jax or files is named there and
imported at its first use (`Named`), so that reading a configuration loads configuration classes alone.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from mindvl_jax.config.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class Named:
    """An object by name ("package.module:attribute"), imported when it is first used; calls go to it."""

    path: str

    def get(self) -> Any:
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.get()(*arguments, **options)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One model family.

    Attributes:
      name: value of `model.family`.
      config: class of the `model` section.
      presets: name -> function that makes a published size; names are unique over all families.
      build: (config, nnx.Rngs) -> nnx.Module with values; traced under `nnx.eval_shape` it needs no memory.
      processor: class of the family's `data.processor.Processor`, called with (whole Config, index of the phase).
      counts: `models.counts.Counts` of a batch, for objectives that do not count themselves.
      objective: name of the loss that the family trains with unless the configuration names another.
      hf: HFMapping of the published files; None where there are none.
      parts: name -> parameter glob of the parts that people freeze, profile or give a rate of their own.
      flops: (config, parameter shapes, trained paths) -> function of a step's counts; see `models.counts.StepFlops`;
        None counts nothing.
      adapters: whether low-rank adapters work on the family's layers, which its tests compare with PEFT. False where a
        layer reads a kernel by itself: an adapter on it would do nothing.
    """

    name: str
    config: type[ModelConfig]
    presets: Mapping[str, Callable[[], ModelConfig]]
    build: Callable[..., Any]
    processor: Named
    counts: Named | None
    objective: str
    hf: Named | None
    parts: Mapping[str, str]
    flops: Callable[..., Any] | None
    adapters: bool = False
