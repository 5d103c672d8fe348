"""A written program through `torch.compile`, where that can work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

from npu_bridge.errors import UnsupportedError

_CPP_COMPILERS = ("g++", "clang++", "c++")


def require_compiler(device: str, places: int) -> None:
    """Raise UnsupportedError with every reason why `torch.compile` cannot take the programs of a mesh with `places`
    devices.
    """
    problems = []
    if device == "npu":
        problems.append(
            "compile=True on npu: torch's compiler writes no code for it; leave it out, the step is captured "
            "in one NPU graph"
        )
    if places > 1:
        problems.append(
            f"compile=True on a mesh of {places} devices: exchanges under way cannot be traced by torch's "
            "compiler; leave it out, or use one device"
        )
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(_CPP_COMPILERS)
    if device == "cpu" and not any(shutil.which(name) for name in wanted):
        problems.append(
            f"compile=True on cpu needs a C++ compiler, none of {', '.join(wanted)} is on the path; install "
            "one, or name it in CXX"
        )
    if problems:
        raise UnsupportedError(problems, "a program through torch.compile")


def compiled(main: Callable[..., Any]) -> Callable[..., Any]:
    """`main` of a written program.

    Shapes are fixed; a kernel that reads numbers on the host breaks the graph in two, no more.
    """
    import torch

    return torch.compile(main, dynamic=False)
