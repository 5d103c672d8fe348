"""Check every operator of npu_bridge.kernels on the device against its formula in float64.

Operators run in a subprocess, because a failing kernel can take down its process or the whole device context. The
remaining operators then continue in a new one.

The subprocess is `python -m npu_bridge.doctor.operators --device npu [NAME ...]`; it prints a line of JSON before and
after each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from npu_bridge.doctor.findings import Finding, Group
from npu_bridge.doctor.host import Host

GROUP = Group("operators")
DTYPES = ("float32", "bfloat16")
SECONDS = 300.0  # of silence; the first operator of a device may compile kernels


def names() -> list[str]:
    """Names of all operators of the table."""
    from npu_bridge.kernels import KERNELS

    return sorted(KERNELS)


def check(host: Host, kind: str, wanted: Sequence[str] | None = None, seconds: float = SECONDS) -> Iterator[Finding]:
    """Check operators; one finding for each. Raises KeyError for a name that is not in the table."""
    from npu_bridge.kernels import KERNELS

    left = list(wanted or names())
    unknown = sorted(set(left) - set(KERNELS))
    if unknown:
        raise KeyError(f"no operator {', '.join(unknown)}; there are {', '.join(names())}")
    while left:
        begun = None
        process = subprocess.Popen(
            [sys.executable, "-m", "npu_bridge.doctor.operators", "--device", kind, *left],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(host.environment),
        )
        complaints: list[str] = []
        reader = threading.Thread(target=complaints.extend, args=(process.stderr,), daemon=True)
        reader.start()
        for line in _lines(process, seconds):
            if not line.startswith('{"operator"'):
                continue
            told = json.loads(line)
            if "errors" not in told:
                begun = told["operator"]
                continue
            left.remove(told["operator"])
            begun = None
            yield finding(told)
        code = process.wait()
        reader.join(timeout=5)
        if begun is None and (code == 0 or not left):
            return
        said = next((line.strip() for line in reversed(complaints) if line.strip()), "no word")
        died = f"did not end within {seconds:.0f} s" if code == -9 else f"ended with {code}: {said[:200]}"
        if begun is None:
            yield GROUP.failed(
                "process",
                f"the process that runs the operators {died}",
                f"run it by hand: {sys.executable} -m npu_bridge.doctor.operators --device {kind}",
            )
            return
        left.remove(begun)
        yield GROUP.failed(begun, f"its process {died}", fix(begun))


def _lines(process: subprocess.Popen, seconds: float) -> Iterator[str]:
    """Yield lines of stdout. Kill the process after `seconds` of silence, or when the caller stops reading."""
    try:
        while True:
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                return
            yield line
    except GeneratorExit:
        process.kill()
        raise


def fix(name: str) -> str:
    from npu_bridge.kernels import KERNELS
    from npu_bridge.kernels.registry import SWITCH

    family = KERNELS[name].family
    return (
        f"export {SWITCH}={family} runs the torch equivalent of family {family} instead of {KERNELS[name].call}; "
        "report it with the versions above"
    )


def finding(told: dict) -> Finding:
    """Finding for one operator from its errors by dtype (numbers, or the message of an exception)."""
    from npu_bridge.kernels import KERNELS

    name, words, bad = told["operator"], [], False
    for dtype, error in told["errors"].items():
        allowed = KERNELS[name].tolerance[dtype]
        if isinstance(error, str):
            bad = True
            words.append(f"{dtype}: {error}")
        else:
            wrong = not error <= allowed
            bad |= wrong
            words.append(f"{dtype} {error:.1e}" + (f", allowed {allowed:.1e}" if wrong else ""))
    found = "; ".join(words)
    return GROUP.failed(name, found, fix(name)) if bad else GROUP.ok(name, found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m npu_bridge.doctor.operators")
    parser.add_argument("--device", default="npu", choices=("npu", "cuda", "cpu"))
    parser.add_argument("operators", nargs="*")
    given = parser.parse_args(arguments)
    import jax

    jax.config.update("jax_platforms", "cpu")  # the formulas are evaluated on the host
    import torch

    if given.device == "npu":
        from npu_bridge.kernels.registry import torch_npu

        torch_npu()
        torch.npu.set_device(0)
    from npu_bridge.kernels.check import measure

    for name in given.operators or names():
        print(json.dumps({"operator": name}), flush=True)
        errors: dict[str, float | str] = {}
        for dtype in DTYPES:
            try:
                with torch.inference_mode():
                    errors[dtype] = measure(name, dtype, given.device)
            except Exception as error:  # report whatever a kernel raises
                errors[dtype] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"
        print(json.dumps({"operator": name, "errors": errors}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
