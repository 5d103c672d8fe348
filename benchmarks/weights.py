"""How fast and in how much memory published weights come onto a mesh, beside safetensors reading the same bytes.

    python benchmarks/weights.py --preset qwen2.5-vl-3b                 # the whole model: 7.5 GB in bfloat16, as much memory
    python benchmarks/weights.py --preset qwen2.5-vl-3b --layers 6      # the same tensors, fewer layers

A folder of random weights is written first (unless --folder names one). Each measurement runs in a process of its own, in turn,
several times; the best time counts. All read from the page cache, so that the disk does not hide the work. Memory is the growth
of the process's peak over what it held before loading; mapped file pages are not counted, the kernel may drop them.
"""

from __future__ import annotations

import argparse
import json
import os
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


def write_folder(folder: Path, preset: str, layers: int | None) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mindvl_jax import presets
    from mindvl_jax.weights.load import outline
    from mindvl_jax.weights.save import save_parameters

    config = presets.get(preset)
    if layers is not None:
        text = config.text.model_copy(update=dict(num_layers=layers))
        vision = config.vision.model_copy(update=dict(depth=min(config.vision.depth, layers), fullatt_block_indexes=(0,)))
        config = config.model_copy(update=dict(text=text, vision=vision))
    rng = np.random.default_rng(0)
    values = {}
    for path, variable in outline(config)[1].items():
        bits = rng.integers(0, 2**16, variable.get_value().shape, np.uint16)
        values[path] = jnp.asarray((bits & 0xBFFF).view(jnp.bfloat16))  # any finite number will do
    save_parameters(folder, config, jax.device_put(values))


def measure(mode: str, folder: Path) -> dict[str, float]:
    import jax
    import numpy as np
    from safetensors import safe_open

    from mindvl_jax.config import MeshConfig
    from mindvl_jax.parallel.mesh import make_mesh
    from mindvl_jax.weights.load import load_parameters

    jax.devices()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2)) if "fsdp" in mode else None
    files = sorted(folder.glob("*.safetensors"))
    with Peak() as peak:
        start = time.perf_counter()
        if mode == "safetensors":
            held: dict[str, np.ndarray] = {}
            for path in files:
                with safe_open(path, framework="numpy") as file:
                    held |= {name: file.get_tensor(name) for name in file.keys()}
            size = sum(value.nbytes for value in held.values())
        else:
            held = load_parameters(folder, mesh=mesh)
            jax.block_until_ready(held)
            size = sum(shard.data.nbytes for value in held.values() for shard in value.addressable_shards)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": size, "peak": peak.growth}


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
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [environment.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if args.folder is None:
            write_folder(folder, args.preset, args.layers)
        best: dict[str, dict[str, float]] = {}
        for _ in range(args.repeats):
            for mode in MODES:
                child = [sys.executable, __file__, "--child", mode, "--folder", str(folder)]
                found = json.loads(subprocess.run(child, env=environment, capture_output=True, text=True, check=True).stdout)
                if mode not in best or found["seconds"] < best[mode]["seconds"]:
                    best[mode] = found
    print(f"{args.preset}{'' if args.layers is None else f', {args.layers} layers'}: {best['safetensors']['bytes'] / 1e9:.2f} GB, best of {args.repeats}")
    for mode, found in best.items():
        ratio = best["safetensors"]["seconds"] / found["seconds"]
        print(f"{mode:24s} {found['seconds']:6.2f} s  {found['bytes'] / found['seconds'] / 1e9:5.2f} GB/s  {ratio:4.2f}x of safetensors  peak {found['peak'] / found['bytes']:.2f}x of the arrays")


if __name__ == "__main__":
    main()
