"""Errors of the emulator, in the project's manner: what was found, what was expected, what to do next."""

from __future__ import annotations

from npu_bridge.errors import BridgeError


class EmulatorError(BridgeError):
    """The emulator cannot be built or started here."""


class RealCannFound(EmulatorError):
    """CANN is installed: the emulator steps aside."""
