"""Compare training through npu_bridge with XLA: `python -m benchmarks.backends --config configs/smoke.yaml --out
FOLDER`.

XLA against itself on several devices is the control.

All runs start from the same weights and see the same batches. In float32: XLA on one device (the reference), XLA on 2 x
2 devices (the control: only the order of additions differs), the bridge in one process and in 2 x 2 (fsdp x tensor). In
bfloat16: the bridge against XLA, beside both against XLA in float32. The largest difference of a few losses is noisy:
`--seeds 0 1 2` trains from other weights on other batches and reports mean, minimum and maximum over them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mindvl_jax.cli.compare import fresh_weights, parameter_distance, read_losses, shortened, train_apart
from mindvl_jax.config import loader as config_loader

ROOT = Path(__file__).resolve().parents[1]
SPLIT = ("mesh.fsdp=2", "mesh.tensor=2")
FLOAT32, BFLOAT16 = "model.compute_dtype=float32", "model.compute_dtype=bfloat16"
BRIDGE = ("backend=npu_bridge", "bridge.device=cpu")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: overrides of the configuration, host devices of its process, number of processes."""

    overrides: tuple[str, ...]
    devices: int = 1
    processes: int = 1


RUNS = {
    "xla": Run((FLOAT32,)),
    "xla-2x2": Run((FLOAT32, *SPLIT), devices=4),
    "bridge": Run((FLOAT32, *BRIDGE)),
    "bridge-2x2": Run((FLOAT32, *BRIDGE, *SPLIT), processes=4),
    "xla-bfloat16": Run((BFLOAT16,)),
    "bridge-bfloat16": Run((BFLOAT16, *BRIDGE)),
}
PAIRS = (
    ("xla-2x2", "xla"), ("bridge", "xla"), ("bridge-2x2", "xla"),
    ("xla-bfloat16", "xla"), ("bridge-bfloat16", "xla"), ("bridge-bfloat16", "xla-bfloat16"),
)  # fmt: skip


def measure(config_path: str, overrides: Sequence[str], steps: int, out: Path, names: Sequence[str]) -> dict:
    """Train every named run that is missing and return the distance of each complete pair."""
    out.mkdir(parents=True, exist_ok=True)

    def load(name):
        return config_loader.load(config_path, ["model.matmul_precision=default", *overrides, *RUNS[name].overrides])

    start = out / "start"
    if not start.exists():
        fresh_weights(load("xla"), start)
    for name in names:
        if (out / name / "metrics.jsonl").exists():
            continue
        path = out / f"{name}.yaml"
        path.write_text(
            config_loader.dump(shortened(load(name), steps=steps, start=str(start), folder=str(out / name))),
            encoding="utf-8",
        )
        train_apart(name, path, ROOT, out / f"{name}.log", devices=RUNS[name].devices, processes=RUNS[name].processes)
        print(f"{name}: {steps} steps", flush=True)
    found = {}
    for a, b in PAIRS:
        if all((out / name / "metrics.jsonl").exists() for name in (a, b)):
            one, other = (read_losses(out / name / "metrics.jsonl", steps) for name in (a, b))
            relative = [abs(x - y) / abs(y) for x, y in zip(one, other, strict=True)]
            found[f"{a} against {b}"] = {
                "loss, first 20 steps": max(relative[:20]),
                f"loss, {steps} steps": max(relative),
                "mean loss difference": sum(relative) / steps,
                f"parameters at step {steps}": parameter_distance(out / a, out / b),
            }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides of all runs"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="run.seed of each series; default: the configuration's own, once",
    )
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(arguments)
    out = args.out.absolute()
    if args.seeds is None:
        series = [measure(args.config, args.set, args.steps, out, args.only)]
    else:
        series = [
            measure(args.config, [*args.set, f"run.seed={seed}"], args.steps, out / f"seed-{seed}", args.only)
            for seed in args.seeds
        ]
    (out / "backends.json").write_text(
        json.dumps(series[0] if args.seeds is None else dict(zip(map(str, args.seeds), series)), indent=2) + "\n"
    )
    print("| Runs | " + " | ".join(next(iter(series[0].values()), {})) + " |")
    for pair in series[0]:
        print(
            f"| {pair} | " + " | ".join(_over([one[pair][name] for one in series]) for name in series[0][pair]) + " |"
        )
    return 0


def _over(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1e}"
    return f"{sum(values) / len(values):.1e} [{min(values):.1e}, {max(values):.1e}]"


if __name__ == "__main__":
    sys.exit(main())
