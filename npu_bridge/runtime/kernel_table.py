"""``rt.kernel.<name>``: the torch functions of fused operators, looked up once per program and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class KernelTable:
    """Attribute access by the operator's name with dots as underscores.

    The table itself lives in `npu_bridge.kernels`.
    """

    def __init__(self, device: str):
        self._device = device
        self._local: dict[str, Callable[..., Any]] = {}

    def bind(self, names: list[str]) -> None:
        """Look up every kernel of a program, so that a missing one shows before the first step.

        Raises KeyError-like errors of the kernel table.
        """
        for name in names:
            identifier = name.removeprefix("npu_bridge.").replace(".", "_")
            if not hasattr(self, identifier):
                setattr(self, identifier, _EXTRA.get(name) or _from_table(name, self._device))


def _from_table(name: str, device: str) -> Callable[..., Any]:
    from npu_bridge import kernels

    return kernels.lookup(name, device)


_EXTRA: dict[str, Callable[..., Any]] = {}


def provide(name: str, function: Callable[..., Any]) -> None:
    """Register a kernel outside the table (a user's own operator): ``function(*tensors, **params) -> tuple of
    tensors``.
    """
    _EXTRA[name if name.startswith("npu_bridge.") else "npu_bridge." + name] = function
