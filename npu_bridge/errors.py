"""Errors of the bridge. Each says what was found, where, what was expected and what to do next."""

from __future__ import annotations

from collections.abc import Sequence


class BridgeError(Exception):
    """Base of every error the bridge raises on purpose."""


class VersionError(BridgeError):
    """The installed jax is not one whose private interfaces were tested."""


class UnsupportedError(BridgeError):
    """A program the bridge cannot lower. `problems` lists all of them, each with its JAX source line."""

    def __init__(self, problems: Sequence[str], where: str = "this program"):
        self.problems = list(problems)
        count = len(self.problems)
        head = f"npu_bridge cannot lower {where}: {count} problem{'s' if count != 1 else ''} found"
        super().__init__("\n".join([head, *(f"  {i + 1}. {p}" for i, p in enumerate(self.problems))]))


class PlacementError(BridgeError):
    """An argument does not fit the compiled program: shape, dtype, sharding, device, or a donated array used again."""


class CollectiveError(BridgeError):
    """A rank died, hung, or runs another program than its peers."""
