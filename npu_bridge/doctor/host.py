"""Check Python, torch, driver and CANN.

Everything is checked from outside first, because importing torch_npu fails without naming what is missing. The import
itself comes last, in a subprocess.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from npu_bridge.doctor import versions
from npu_bridge.doctor.findings import Finding, Group
from npu_bridge.emulator.settings import active

GROUP = Group("host")
IN_SOFTWARE = "without an NPU: `make setup-npu`, then `.venv-npu/bin/python -m npu_bridge.emulator -- mindvl doctor`"
CANN_HOMES = (
    "/usr/local/Ascend/cann",
    "/usr/local/Ascend/ascend-toolkit/latest",
    "~/Ascend/cann",
    "~/Ascend/ascend-toolkit/latest",
)
HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")

_PROBE = """
import json, sys
out = {}
import torch
out["torch"] = torch.__version__
if KIND == "npu":
    import torch_npu
    out["devices"] = [torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]
    if out["devices"]:
        out["memory"] = torch.npu.get_device_properties(0).total_memory
        x = torch.arange(4.0, device="npu:0")
        out["sum"] = float((x * 2).sum())
elif KIND == "cuda":
    out["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print("PROBE" + json.dumps(out))
"""

# Message of the loader or torch_npu -> what to do. The first match counts.
_CAUSES = (
    (
        r"No module named 'torch_npu'",
        "install torch_npu {tested} beside torch {tested} (pip install torch=={tested} torch_npu=={tested})",
    ),
    (r"No module named 'torch'", "install torch {tested}"),
    (
        r"libascend_hal\.so",
        "the driver's libraries are not found: install the driver, or in a container mount "
        "/usr/local/Ascend/driver and source set_env.sh",
    ),
    (
        r"lib(hccl|ascendcl|acl_\w+|ge_\w+|graph|opapi|hcomm)\.so",
        "CANN's libraries are not found: `source <CANN>/set_env.sh` in this shell and in the script that starts jobs",
    ),
    (
        r"undefined symbol",
        "two versions do not fit: install the torch, torch_npu and CANN of one line of the compatibility table",
    ),
    (r"GLIBCXX|CXXABI|GLIBC_", "the C++ runtime is too old for the wheel: use a newer system or container"),
    (
        r"[Pp]ermission denied|drvErr|507[0-9]{3}|107001",
        "the devices cannot be opened: add the user to the group that owns /dev/davinci*, or give the "
        "container these devices",
    ),
)


@dataclasses.dataclass(frozen=True)
class Host:
    """The host that is checked. Tests pass another root, environment or set of versions."""

    root: Path = Path("/")
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    python: tuple[int, int] = sys.version_info[:2]
    machine: str = platform.machine()
    find: Callable[[str], str | None] = shutil.which
    installed: Callable[[str], str | None] = lambda name: _installed(name)

    @property
    def emulated(self) -> bool:
        return active(self.environment)

    def at(self, path: str) -> Path:
        """Return a path below the host's root; `~` is its user's home."""
        if path.startswith("~"):
            path = self.environment.get("HOME", "/root") + path[1:]
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str | None:
        try:
            return self.at(path).read_text(errors="replace")
        except OSError:
            return None

    def run(self, command: list[str], timeout: float = 30.0) -> subprocess.CompletedProcess | None:
        """Run a program. Returns None if it does not exist or does not end in time."""
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=dict(self.environment))
        except (OSError, subprocess.TimeoutExpired):
            return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python(host: Host) -> Finding:
    found = f"Python {'.'.join(map(str, host.python))} on {host.machine}"
    if host.python < versions.PYTHON_AT_LEAST:
        return GROUP.failed("Python", found, f"use Python {'.'.join(map(str, versions.PYTHON_AT_LEAST))} or newer")
    torch = host.installed("torch")
    fits = versions.PYTHON_OF.get(versions.release(torch)) if torch else None
    if fits is not None and host.python[1] not in fits:
        return GROUP.failed(
            "Python", found, f"torch {torch} has wheels of torch_npu for Python 3.{fits[0]} to 3.{fits[-1]}"
        )
    if host.machine not in ("x86_64", "aarch64"):
        return GROUP.unsure("Python", found, "torch_npu is published for x86_64 and aarch64")
    return GROUP.ok("Python", found)


def check_torch(host: Host, kind: str) -> Finding:
    """Check torch and, for an NPU, that torch_npu matches it."""
    torch, npu = host.installed("torch"), host.installed("torch_npu")
    install = f"pip install torch=={versions.TESTED} torch_npu=={versions.TESTED}"
    if torch is None:
        return GROUP.failed(
            "torch",
            f"torch is not installed in {sys.prefix}",
            install if kind == "npu" else f"pip install torch=={versions.TESTED}",
        )
    if kind != "npu":
        return GROUP.ok("torch", f"torch {torch}")
    if npu is None:
        return GROUP.failed(
            "torch_npu",
            f"torch {torch}, but torch_npu is not installed in {sys.prefix}",
            f"{install}; or {IN_SOFTWARE}",
        )
    found = f"torch {torch}, torch_npu {npu}"
    if versions.release(torch) != versions.release(npu):
        return GROUP.failed(
            "torch_npu", found, f"both must have one version: pip install torch=={versions.release(npu)}"
        )
    if versions.release(npu) != versions.TESTED:
        return GROUP.unsure(
            "torch_npu",
            found,
            f"the bridge was run with {versions.TESTED}; its operators below say whether this one does, too",
        )
    return GROUP.ok("torch_npu", found)


def check_driver(host: Host) -> list[Finding]:
    """Check device files, their permissions and the driver's version."""
    if host.emulated:
        return [GROUP.ok("driver", "the emulated runtime stands in for it")]
    devices = sorted(path for path in host.at("/dev").glob("davinci*") if path.name[7:].isdigit())
    if not host.at("/dev/davinci_manager").exists() or not devices:
        fix = (
            "install driver and firmware of the chip (npu-smi info must list it); in a container pass --device "
            "/dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc"
        )
        return [
            GROUP.failed(
                "driver",
                "no NPU is visible: there is no /dev/davinci<N> with /dev/davinci_manager",
                f"{fix}; or {IN_SOFTWARE}",
            )
        ]
    findings = []
    closed = [
        path.name for path in (*devices, host.at("/dev/davinci_manager")) if not os.access(path, os.R_OK | os.W_OK)
    ]
    if closed:
        findings.append(
            GROUP.failed(
                "device files",
                f"{', '.join(closed)} cannot be opened by this user",
                "add the user to the group that owns them (usually HwHiAiUser): usermod -aG HwHiAiUser "
                "$USER, then log in anew",
            )
        )
    text = host.text("/usr/local/Ascend/driver/version.info")
    version = re.search(r"^Version=(\S+)", text or "", re.MULTILINE)
    if version:
        findings.append(
            GROUP.ok("driver", f"version {version[1]}, {len(devices)} device{'s' if len(devices) > 1 else ''}")
        )
    else:
        findings.append(
            GROUP.unsure(
                "driver",
                f"{len(devices)} devices, but /usr/local/Ascend/driver/version.info does not say a version",
                "in a container mount /usr/local/Ascend/driver read-only",
            )
        )
    return findings


def cann_version(host: Host, home: Path) -> str | None:
    """Read CANN's version from the file that its installer writes."""
    for path in sorted(home.glob("*-linux/ascend_toolkit_install.info")) + sorted(
        home.glob("*/*/ascend_toolkit_install.info")
    ):
        found = re.search(r"^version=(\S+)", path.read_text(errors="replace"), re.MULTILINE | re.IGNORECASE)
        if found:
            return found[1]
    return None


def check_cann(host: Host) -> list[Finding]:
    """Check the environment of set_env.sh, CANN's version against torch_npu's, and the binary kernels."""
    if host.emulated:
        return [GROUP.ok("CANN", f"the emulated runtime of {host.environment['NPU_EMULATOR_LIBRARIES']}")]
    torch_npu = host.installed("torch_npu")
    wanted, published = versions.wanted_cann(torch_npu or versions.TESTED)
    said = next((host.environment[name] for name in HOME_VARIABLES if host.environment.get(name)), None)
    there = [home for home in CANN_HOMES if host.at(home).exists()]
    if said is None:
        if there:
            script = there[0].removesuffix("/latest") + "/set_env.sh"
            return [
                GROUP.failed(
                    "CANN",
                    f"installed at {there[0]}, but its environment is not set (ASCEND_HOME_PATH is empty)",
                    f"source {script}, in this shell and in the script that starts jobs",
                )
            ]
        return [
            GROUP.failed(
                "CANN",
                "not installed: ASCEND_HOME_PATH is empty and none of " + ", ".join(CANN_HOMES) + " exists",
                f"install CANN {wanted} or newer, toolkit and kernels of this chip, then source its "
                f"set_env.sh; or {IN_SOFTWARE}",
            )
        ]
    home = host.at(said)
    if not home.exists():
        return [
            GROUP.failed(
                "CANN",
                f"ASCEND_HOME_PATH={said} does not exist",
                "source the set_env.sh of the CANN that is installed" + (f": {there[0]}" if there else ""),
            )
        ]
    findings = [_cann_version_finding(host, home, said, torch_npu, wanted, published)]
    folders = [host.at(folder) for folder in host.environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    if not any((folder / "libascendcl.so").exists() for folder in folders):
        findings.append(
            GROUP.failed(
                "CANN libraries",
                "libascendcl.so lies in no folder of LD_LIBRARY_PATH",
                f"source {said}/set_env.sh, or {said}/../set_env.sh (a later export of LD_LIBRARY_PATH may "
                "have dropped it)",
            )
        )
    kernels = home / "opp/built-in/op_impl/ai_core/tbe/kernel"
    chips = sorted(p.name for p in kernels.glob("ascend*")) if kernels.exists() else []
    findings.append(
        GROUP.ok("CANN kernels", ", ".join(chips))
        if chips
        else GROUP.unsure(
            "CANN kernels",
            f"no binary kernels in {kernels}",
            "install CANN's kernels (ops) package of this chip: without it operators are missing or "
            "compiled at first use",
        )
    )
    return findings


def _cann_version_finding(
    host: Host, home: Path, said: str, torch_npu: str | None, wanted: str, published: bool
) -> Finding:
    version = cann_version(host, home)
    if version is None:
        return GROUP.unsure(
            "CANN", f"{said} does not say its version", f"torch_npu {torch_npu} wants CANN {wanted} or newer"
        )
    found = f"CANN {version} at {said}"
    try:
        older, same = (
            versions.cann_key(version) < versions.cann_key(wanted),
            versions.cann_key(version) == versions.cann_key(wanted),
        )
    except ValueError:
        return GROUP.unsure("CANN", found, f"expected a version such as {wanted}")
    if older:
        return GROUP.failed(
            "CANN",
            found,
            f"torch_npu {torch_npu} was released with CANN {wanted}: install that, or a torch and torch_npu "
            f"of CANN {version}'s line in the compatibility table",
        )
    if same and published:
        return GROUP.ok("CANN", f"{found}, which torch_npu {torch_npu} was released with")
    advice = (
        f"the published table pairs torch_npu {torch_npu} with CANN {wanted}; the operators below say whether this one "
        "does, too"
        if published
        else f"the published table does not list torch_npu {torch_npu} yet (its neighbour wants {wanted}); the "
        "operators below say whether they fit"
    )
    return GROUP.unsure("CANN", found, advice)


def probe(host: Host, kind: str) -> tuple[Finding, list[str]]:
    """Import torch (and torch_npu) in a subprocess and use the device once.

    Returns the finding and the names of the devices.
    """
    if kind == "cpu":
        return GROUP.ok("device", f"the CPU, {os.cpu_count()} cores"), ["cpu"]
    done = host.run([sys.executable, "-c", f"KIND = {kind!r}\n{_PROBE}"], timeout=180)
    if done is None:
        return GROUP.failed(
            "device",
            "a process that uses the device did not end within 180 s",
            "the device hangs: look at npu-smi info for its health, and for processes that hold it",
        ), []
    for line in done.stdout.splitlines():
        if line.startswith("PROBE"):
            out = json.loads(line[5:])
            devices = out.get("devices", [])
            if not devices:
                return GROUP.failed(
                    "device",
                    f"torch {out['torch']} sees no device of kind {kind}",
                    "look at ASCEND_RT_VISIBLE_DEVICES (or CUDA_VISIBLE_DEVICES), and npu-smi info",
                ), []
            if kind == "npu" and out["sum"] != 12.0:
                return GROUP.failed(
                    "device",
                    f"0 + 2 + 4 + 6 on {devices[0]} is {out['sum']}",
                    "the device computes wrongly: npu-smi info for its health, then the driver",
                ), []
            memory = f", {out['memory'] / 2**30:.0f} GiB each" if "memory" in out else ""
            return GROUP.ok("device", f"{len(devices)} x {devices[0]}{memory}"), devices
    text = done.stderr + done.stdout
    words = [line for line in text.strip().splitlines() if line.strip()]
    said = words[-1].strip()[:300] if words else f"exit code {done.returncode} and no word"
    fix = next(
        (fix for pattern, fix in _CAUSES if re.search(pattern, text)),
        f"run it by hand to see all: {sys.executable} -c 'import torch, torch_npu; print(torch.npu.device_count())'",
    )
    return GROUP.failed(
        "device",
        f"a process that imports {'torch_npu' if kind == 'npu' else 'torch'} and uses the device ended with "
        f"{done.returncode}: {said}",
        fix.format(tested=versions.TESTED),
    ), []


def check(host: Host, kind: str) -> tuple[list[Finding], list[str]]:
    """Run all checks of this module.

    Returns the findings and the names of the devices of that kind ("npu", "cuda", "cpu").
    """
    findings = [check_python(host), check_torch(host, kind)]
    if kind == "npu":
        findings += [*check_driver(host), *check_cann(host)]
    last, devices = probe(host, kind)
    return [*findings, last], devices
