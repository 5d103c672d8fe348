"""Speed and memory of loading published weights onto a mesh, against safetensors reading the same bytes.

    python benchmarks/weights.py                                      # Qwen2.5-VL-3B: 7.5 GB, needs 15 GB of memory
    python benchmarks/weights.py --preset qwen2.5-vl-3b --layers 6    # the same tensors, fewer layers

A folder of random weights in several files is written first (unless --folder names one). Each measurement runs in a
process of its own, in turn, several times. Both sides end with the same bytes of the same dtype in memory of their own,
and both read from the page cache (the files are read once before), so that the disk does not hide the work; if memory
is too small for arrays and files, the output says so. Ratios are medians over rounds of the two processes that ran
after each other: on a shared machine, times of different rounds do not compare. Memory is the growth of the process's
peak over what it held before loading; cached file pages are not counted, the kernel may drop them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MODES = ("safetensors", "ours", "ours, fsdp 2 x tensor 2")


def anonymous_bytes() -> int:
    """Memory of this process that is not mapped from files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not report RssAnon")


class Peak:
    """Largest anonymous memory while it is entered, sampled every five milliseconds."""

    def __enter__(self):
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    @property
    def growth(self) -> int:
        return self.peak - self.before


def write_folder(folder: Path, preset: str, layers: int | None, shard_bytes: int = 2 * 10**9) -> None:
    """A published folder of random bfloat16, written tensor by tensor: the model itself is never built."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from mindvl_jax.config import families
    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.weights.mapping import config_content, slots

    config = families.preset(preset)
    if layers is not None:
        text = config.text.model_copy(update=dict(num_layers=layers))
        vision = config.vision.model_copy(
            update=dict(depth=min(config.vision.depth, layers), fullatt_block_indexes=(0,))
        )
        config = config.model_copy(update=dict(text=text, vision=vision))
    rng = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    places, files = {}, []

    def write() -> None:
        files.append(f"model-{len(files) + 1:05d}.safetensors")
        save_file(shards[-1], folder / files[-1], metadata={"format": "pt"})
        places.update(dict.fromkeys(shards[-1], files[-1]))
        shards[-1] = {}

    for slot in slots(config, {path: like.shape for path, like in outline_of(config).shapes.items()}):
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(slot.shape))), np.uint16) & 0xBFFF  # any finite number
        shards[-1][slot.name] = bits.view(ml_dtypes.bfloat16).reshape(slot.shape)
        if sum(value.nbytes for value in shards[-1].values()) > shard_bytes:
            write()
    if shards[-1]:
        write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config_content(config, "bfloat16")))


def measure(mode: str, folder: Path) -> dict[str, float]:
    import jax
    import ml_dtypes  # noqa: F401  (numpy learns bfloat16, which safetensors asks it for)
    import numpy as np
    from safetensors import safe_open

    from mindvl_jax.config.schema import MeshConfig
    from mindvl_jax.parallel.mesh import make_mesh
    from mindvl_jax.weights.load import load_parameters

    jax.devices()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2)) if "fsdp" in mode else None
    files = sorted(folder.glob("*.safetensors"))
    with Peak() as peak:
        start, used = time.perf_counter(), time.process_time()
        if mode == "safetensors":
            held: dict[str, np.ndarray] = {}
            for path in files:
                with safe_open(path, framework="numpy") as file:
                    held |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            size = sum(value.nbytes for value in held.values())
        else:
            held = load_parameters(folder, mesh=mesh)
            jax.block_until_ready(held)
            size = sum(shard.data.nbytes for value in held.values() for shard in value.addressable_shards)
        seconds, used = time.perf_counter() - start, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": used, "bytes": size, "peak": peak.growth}


def warm(folder: Path) -> bool:
    """Read the files once; whether the page cache can hold them beside the arrays."""
    size = 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 26):
                pass
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    return available > 2.1 * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2.5-vl-3b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--folder", type=Path, help="measure this folder instead of writing one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.folder)))
        return
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.folder is None:
            write_folder(folder, args.preset, args.layers)
        cached = warm(folder)
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(args.repeats):
            for mode in MODES:
                child = [sys.executable, __file__, "--child", mode, "--folder", str(folder)]
                found[mode].append(
                    json.loads(
                        subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
                    )
                )
    report(f"{args.preset}{'' if args.layers is None else f', {args.layers} layers'}", found, cached)


def report(name: str, found: dict[str, list[dict[str, float]]], cached: bool) -> None:
    size = found["safetensors"][0]["bytes"]
    print(
        f"{name}: {size / 1e9:.2f} GB, {len(found['safetensors'])} rounds, load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
        + ("" if cached else "; memory is too small for files and arrays at once, so some reads came from the disk")
    )
    print(
        "| | s (median) | GB/s | speed against safetensors, wall (by round) | by processor time | peak "
        "memory / arrays |\n|---|---|---|---|---|---|"
    )
    for mode, rounds in found.items():
        wall = [one["seconds"] / other["seconds"] for one, other in zip(found["safetensors"], rounds)]
        cpu = [one["cpu_seconds"] / other["cpu_seconds"] for one, other in zip(found["safetensors"], rounds)]
        seconds = statistics.median(one["seconds"] for one in rounds)
        print(
            f"| {mode} | {seconds:.2f} | {rounds[0]['bytes'] / seconds / 1e9:.2f} | "
            f"{statistics.median(wall):.2f} ({', '.join(f'{value:.2f}' for value in wall)}) | "
            f"{statistics.median(cpu):.2f} | {max(one['peak'] / one['bytes'] for one in rounds):.2f} |"
        )


if __name__ == "__main__":
    main()
