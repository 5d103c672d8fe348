"""Published weights in and out, beside safetensors moving the same bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


@case("weights")
def weights_case(settings: Settings) -> Iterator[Comparison]:
    """Import and export of a Hugging Face folder in MB/s, beside safetensors alone, which neither turns matrices nor
    stacks layers.
    """
    import jax
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from benchmarks import ours, workloads
    from mindvl_jax.weights.load import load_parameters
    from mindvl_jax.weights.save import save_parameters

    config = workloads.MODELS["dry" if settings.dry else "small"]("float32")
    parameters = ours.initial(config)
    megabytes = sum(value.nbytes for value in parameters.values()) / 1e6
    work = {"MB": megabytes}
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain = Path(scratch) / "model", Path(scratch) / "plain.safetensors"
        save_parameters(folder, config, parameters)
        again = load_parameters(folder, config)
        different = [path for path, value in parameters.items() if not np.array_equal(value, again[path])]
        if different:
            raise AssertionError(f"{len(different)} parameters came back changed, such as {different[0]}")
        checked = {"parameters changed by the round trip": float(len(different))}
        note = (
            f"{megabytes:.0f} MB in float32, from and into the page cache. `python benchmarks/weights.py` "
            "measures peak memory and whole models."
        )
        yield Comparison(
            "import",
            [
                Side("ours, onto the device", lambda: jax.block_until_ready(load_parameters(folder, config)), work),
                Side("safetensors to numpy", lambda: load_file(folder / "model.safetensors"), work),
            ],
            unit="MB",
            checked=checked,
            note=note,
        )
        host = {path: np.asarray(value) for path, value in parameters.items()}
        yield Comparison(
            "export",
            [
                Side("ours", lambda: save_parameters(folder, config, parameters), work),
                Side("safetensors, our layout as it is", lambda: save_file(host, plain), work),
            ],
            unit="MB",
            checked=checked,
            note=note,
        )
