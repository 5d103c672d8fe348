"""Errors of the emulator. Messages say what was found, what was expected and what to do next."""

from __future__ import annotations

from npu_bridge.errors import BridgeError


class EmulatorError(BridgeError):
    """The emulator cannot be built or started here."""


class RealCannFound(EmulatorError):
    """CANN is installed, so the emulator must not shadow it."""
