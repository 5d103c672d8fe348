"""Compatible versions of torch, torch_npu, CANN and Python, from COMPATIBILITY.md of github.com/Ascend/pytorch."""

from __future__ import annotations

import re

# torch_npu package -> CANN it was released with. The torch version is the package's without the suffix.
CANN_OF = {
    "2.12.0": "9.1.0", "2.11.0": "9.1.0", "2.10.0.post4": "9.1.0", "2.9.0.post6": "9.1.0", "2.7.1.post8": "9.1.0",
    "2.10.0": "9.0.0", "2.9.0.post2": "9.0.0", "2.8.0.post4": "9.0.0", "2.7.1.post4": "9.0.0",
    "2.9.0": "8.5.0", "2.8.0.post2": "8.5.0", "2.7.1.post2": "8.5.0", "2.6.0.post5": "8.5.0",
    "2.8.0": "8.3.RC1", "2.7.1": "8.3.RC1", "2.6.0.post3": "8.3.RC1",
}  # fmt: skip

# torch -> minor versions of Python 3.
PYTHON_OF = {
    "2.13.0": range(10, 15),
    "2.12.0": range(10, 15),
    "2.11.0": range(10, 15),
    "2.10.0": range(10, 14),
    "2.9.0": range(10, 14),
    "2.8.0": range(9, 14),
    "2.7.1": range(9, 14),
}

TESTED = "2.13.0"  # versions of torch and torch_npu that the bridge's operators were tested with
PYTHON_AT_LEAST = (3, 11)


def release(version: str) -> str:
    """Strip suffixes: `2.9.0.post2+cpu` -> `2.9.0`."""
    match = re.match(r"\d+\.\d+\.\d+", version)
    return match[0] if match else version


def cann_key(version: str) -> tuple[int, ...]:
    """Sort key of CANN versions: 8.3.RC1 before 8.3.0 before 8.5.0.

    Raises ValueError for anything that is not a CANN version.
    """
    match = re.match(r"(\d+)\.(\d+)\.(?:RC(\d+)|(\d+))", version, re.IGNORECASE)
    if not match:
        raise ValueError(f"{version!r} is not a version of CANN, such as 8.5.0 or 8.3.RC1")
    major, minor, candidate, patch = match.groups()
    return (int(major), int(minor), -1000 + int(candidate)) if candidate else (int(major), int(minor), int(patch))


def wanted_cann(torch_npu: str) -> tuple[str, bool]:
    """Return (oldest CANN for this torch_npu, whether the published table lists exactly this package)."""
    if torch_npu in CANN_OF:
        return CANN_OF[torch_npu], True
    same = [cann for package, cann in CANN_OF.items() if release(package) == release(torch_npu)]
    if same:
        return min(same, key=cann_key), False
    newest = max(CANN_OF, key=lambda package: tuple(map(int, release(package).split("."))))

    def numbers(version):
        return tuple(map(int, release(version).split(".")))

    if numbers(torch_npu) > numbers(newest):
        return CANN_OF[newest], False
    return min(CANN_OF.values(), key=cann_key), False
