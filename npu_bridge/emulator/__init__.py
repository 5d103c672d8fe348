"""Run torch_npu without an NPU: CANN's libraries in software, so that the wheel from PyPI runs on a CPU.

    python -m npu_bridge.emulator --devices 4 -- python anything.py

`docs/emulator.md` says what a green run proves and what it does not.
"""

from npu_bridge.emulator.counters import Counts, count, counters
from npu_bridge.emulator.errors import EmulatorError, RealCannFound
from npu_bridge.emulator.settings import Settings, active, environment_for

__all__ = ["Counts", "EmulatorError", "RealCannFound", "Settings", "active", "count", "counters", "environment_for"]
