"""Check every collective that compiled programs use against formulas, over all visible devices.

The job is `python -m npu_bridge.launch --nproc N -m npu_bridge.doctor.collectives --device npu`. Rank 0 prints one line
of JSON for
each collective: the largest error over all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from npu_bridge.compiler.ir import MeshShape
from npu_bridge.doctor.findings import Finding, Group
from npu_bridge.doctor.host import Host

GROUP = Group("collectives")
SECONDS = 300.0
_NAMES = {"npu": "HCCL", "cuda": "NCCL", "cpu": "gloo"}


def check(host: Host, kind: str, count: int, seconds: float = SECONDS) -> Iterator[Finding]:
    """Run all collectives over `count` devices; one finding for each."""
    if count < 2:
        yield GROUP.left_out(_NAMES[kind], "one device: nothing is exchanged")
        return
    environment = dict(host.environment) | {"NPU_BRIDGE_TIMEOUT": str(int(seconds / 3))}
    command = [
        sys.executable,
        "-m",
        "npu_bridge.launch",
        "--nproc",
        str(count),
        "-m",
        "npu_bridge.doctor.collectives",
        "--device",
        kind,
    ]
    advice = (
        "look at the network findings above; run it by hand with HCCL's log: ASCEND_GLOBAL_LOG_LEVEL=1 "
        f"ASCEND_SLOG_PRINT_TO_STDOUT=1 {' '.join(command)}"
        if kind == "npu"
        else f"run it by hand: {' '.join(command)}"
    )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        output, errors, ended = done.stdout, done.stderr, f"ended with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as expired:

        def decode(b):
            return b.decode(errors="replace") if isinstance(b, bytes) else b or ""

        output, errors, ended = decode(expired.stdout), decode(expired.stderr), f"did not end within {seconds:.0f} s"
    for line in output.splitlines():
        if line.startswith('{"collective"'):
            told = json.loads(line)
            found = f"{count} devices, error {told['error']:.1e}"
            yield (
                GROUP.ok(told["collective"], found)
                if told["error"] <= told["allowed"]
                else GROUP.failed(told["collective"], f"{found}, allowed {told['allowed']:.1e}", advice)
            )
    if ended:
        said = next((line.strip() for line in errors.splitlines() if "Error" in line), "") or next(
            (line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no word"
        )
        yield GROUP.failed(f"job of {count} processes", f"{ended}: {said[:300]}", advice)


def cases(
    rank: int, count: int, device
) -> Iterator[tuple[str, float, Callable[[object], object], Callable[[], object]]]:
    """Yield (name, allowed error, call on a Runtime -> result, formula) of each collective.

    All values are small integers: sums are exact in any order, in bfloat16 too while they stay below 256.
    """
    import torch

    everyone, axes = torch.arange(count), ("x",)

    def own(*shape, dtype=torch.float32):
        return torch.full(shape, float(rank + 1), dtype=dtype, device=device)

    total = float(count * (count + 1) // 2)
    yield "all_reduce", 0.0, lambda rt: rt.all_reduce(own(1000), axes, "add"), lambda: torch.full((1000,), total)
    # bfloat16 has eight significant bits: a sum above 256 is rounded at each addition.
    yield (
        "all_reduce bfloat16",
        0.0 if total <= 256 else total * 2**-7,
        lambda rt: rt.all_reduce(own(4097, dtype=torch.bfloat16), axes, "add"),
        lambda: torch.full((4097,), total),
    )
    yield (
        "all_reduce of 64 MiB",
        0.0,
        lambda rt: rt.all_reduce(own(1 << 24), axes, "add"),
        lambda: torch.full((1 << 24,), total),
    )
    yield (
        "all_reduce maximum",
        0.0,
        lambda rt: rt.all_reduce(own(7).int(), axes, "maximum"),
        lambda: torch.full((7,), count),
    )
    yield (
        "all_gather",
        0.0,
        lambda rt: rt.all_gather(own(2, 3), [axes, ()]),
        lambda: (everyone + 1.0).repeat_interleave(2)[:, None].expand(-1, 3),
    )
    yield (
        "reduce_scatter",
        0.0,
        lambda rt: rt.reduce_scatter(own(count * 2, 3) * 1.0, [axes, ()], "add"),
        lambda: torch.full((2, 3), total),
    )
    yield (
        "all_to_all",
        0.0,
        lambda rt: rt.all_to_all(own(2, count), axes, 0, 1),
        lambda: (everyone + 1.0).repeat_interleave(2)[:, None],
    )
    ring = [(i, (i + 1) % count) for i in range(count)]
    yield (
        "send and receive",
        0.0,
        lambda rt: rt.permute(own(5), ring),
        lambda: torch.full((5,), float((rank - 1) % count + 1)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m npu_bridge.doctor.collectives")
    parser.add_argument("--device", default="npu", choices=("npu", "cuda", "cpu"))
    given = parser.parse_args(arguments)
    import torch

    from npu_bridge.runtime.mesh import Runtime

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    runtime = Runtime(MeshShape((("x", count),)), given.device, [("x",)])
    for name, allowed, call, formula in cases(rank, count, runtime.device):
        result, wanted = call(runtime), formula()
        same = tuple(result.shape) == tuple(wanted.shape)
        error = (result.detach().cpu().double() - wanted.double()).abs().max() if same else torch.tensor(float("inf"))
        worst = runtime.all_reduce(error.float().reshape(1).to(runtime.device), ("x",), "maximum")
        if rank == 0:
            print(json.dumps({"collective": name, "error": float(worst.cpu()), "allowed": allowed}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
