"""Published tensors as a frozen network reads them, and the layers that such networks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mindvl_jax.core.errors import UserError


class Tensors:
    """Tensors by name. Remembers which were read, so that a folder can be checked by tracing its network once."""

    def __init__(self, values: Mapping[str, jax.Array], prefix: str = "", read: set[str] | None = None):
        self._values, self._prefix = values, prefix
        self.read: set[str] = set() if read is None else read

    def at(self, prefix: str) -> Tensors:
        """The same tensors under a longer prefix."""
        return Tensors(self._values, f"{self._prefix}{prefix}.", self.read)

    def has(self, name: str) -> bool:
        return self._prefix + name in self._values

    def __call__(self, name: str) -> jax.Array:
        """A tensor.

        Raises:
          UserError: there is none of this name.
        """
        full = self._prefix + name
        if full not in self._values:
            raise UserError(f"tensor {full} is missing")
        self.read.add(full)
        return self._values[full]

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        """`x @ weight.T (+ bias)` with accumulation in float32."""
        y = jnp.einsum("...i,oi->...o", x, self(f"{name}.weight"), preferred_element_type=jnp.float32).astype(x.dtype)
        return y + self(f"{name}.bias") if self.has(f"{name}.bias") else y

    def layer_norm(self, name: str, x: jax.Array, eps: float) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean, variance = jnp.mean(wide, -1, keepdims=True), jnp.var(wide, -1, keepdims=True)
        return ((wide - mean) / jnp.sqrt(variance + eps) * self(f"{name}.weight") + self(f"{name}.bias")).astype(
            x.dtype
        )


def check(network: Callable[[Tensors], Any], values: Mapping[str, Any], where: str) -> None:
    """Trace a network once, without computing anything.

    Raises:
      UserError: a tensor that is missing, has a shape that does not fit, or belongs to nothing.
    """

    def trace(values: Mapping[str, jax.Array]) -> Any:
        tensors = Tensors(values)
        out = network(tensors)
        unread = sorted(values.keys() - tensors.read)
        if unread:
            more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
            raise UserError(f"tensors that belong to nothing in this network: {', '.join(unread[:5])}{more}")
        return out

    try:
        jax.eval_shape(trace, dict(values))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: the tensors' shapes do not fit config.json ({error})") from error
