"""Check the machine before anything is built. Imports neither torch nor torch_npu."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from npu_bridge.emulator.errors import EmulatorError, RealCannFound

PYTHON = (3, 11)
MACHINE = "x86_64"
VERSIONS = {"torch": "2.13.0", "torch_npu": "2.13.0"}
SETUP = "`make setup-npu` makes an environment with both"
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
CANN_FOLDERS = ("/usr/local/Ascend/ascend-toolkit", "/usr/local/Ascend/cann", "/usr/local/Ascend/driver")
DEVICE_NODE = "/dev/davinci_manager"


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """Inputs of a build: paths of the installed wheels, the compiler and its version line."""

    torch: Path
    torch_npu: Path
    versions: Mapping[str, str]
    compiler: str
    compiler_version: str


def installed_version(name: str) -> str | None:
    """Version of an installed distribution without importing it, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def folder_of(name: str) -> Path | None:
    """Folder of an installed package without importing it, or None."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_cann(
    environment: Mapping[str, str] = os.environ, folders=CANN_FOLDERS, device_node: str = DEVICE_NODE
) -> str | None:
    """Path of a real CANN or NPU driver, or None."""
    for name in CANN_VARIABLES:
        if environment.get(name):
            return f"{name}={environment[name]}"
    for folder in (*folders, device_node):
        if os.path.exists(folder):
            return folder
    return None


def refuse_beside_cann(environment: Mapping[str, str] = os.environ) -> None:
    """Raise RealCannFound if CANN is installed."""
    where = find_cann(environment)
    if where:
        raise RealCannFound(
            f"npu_bridge.emulator: a real CANN was found ({where}), and the emulator steps aside: two sets "
            "of the same libraries in one process "
            "give neither. Run the program plainly, or `mindvl doctor` to check the installation"
        )


def check(find=shutil.which, machine: str | None = None, python: tuple[int, int] | None = None) -> Toolchain:
    """Return the toolchain of this machine.

    Raises:
      EmulatorError: lists everything that is missing or does not fit.
    """
    problems = []
    machine, python = machine or platform.machine(), python or sys.version_info[:2]
    if machine != MACHINE:
        problems.append(
            f"the machine is {machine}; the calling convention was tested on {MACHINE} only, use such a "
            "machine or container"
        )
    if sys.platform != "linux":
        problems.append(f"the system is {sys.platform}; torch_npu's wheel is for Linux")
    if python != PYTHON:
        problems.append(
            f"Python is {'.'.join(map(str, python))}; the wheel that was tested is for {'.'.join(map(str, PYTHON))}"
        )
    versions = {}
    for name, wanted in VERSIONS.items():
        found = installed_version(name)
        versions[name] = found or ""
        if found is None:
            problems.append(f"{name} is not installed in {sys.prefix}; wanted {name}=={wanted} ({SETUP})")
        elif found.partition("+")[0] != wanted:
            problems.append(f"{name} is {found}; the operators were written for {wanted} ({SETUP})")
    compiler = find(os.environ.get("CXX", "g++"))
    if compiler is None:
        problems.append(
            "no C++ compiler: g++ was not found on PATH (Debian and Ubuntu: apt-get install g++; or name one in CXX)"
        )
    if problems:
        raise EmulatorError(
            "npu_bridge.emulator cannot be used here:\n" + "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        )
    line = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return Toolchain(folder_of("torch"), folder_of("torch_npu"), versions, compiler, line)
