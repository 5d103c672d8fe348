"""One side of suite npu-emulated, run inside the emulator on a device that computes nothing; prints a line of JSON.

    .venv-npu/bin/python -m npu_bridge.emulator --no-execute --memory 64GiB -- python -m benchmarks.npu bridge 2 4

A slice of MindVL-8B (layers of the decoder, blocks of the tower, one row of 4,096 tokens and 8,192 patches, remat full,
bfloat16 over float32 masters): through the bridge, or written by hand for torch_npu. Counts kernels, synchronisations
and copies of one step, and the peak of torch_npu's allocator. Host time is that of this processor; nothing here is the
speed of an NPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

TOKENS, PATCHES, SAMPLES = 4096, 8192, 8
Facts = Callable[[], dict[str, Any]]
"""Extra facts about a side, asked after its steps."""


def slice_of(layers: int, blocks: int, full_every: int = 8):
    """MindVL-8B with fewer layers and a tied head, so that masters, moments and gradients fit 64 GiB."""
    from mindvl_jax.config import families

    model = families.preset("mindvl-8b")
    full = tuple(range(min(blocks, full_every) - 1, blocks, full_every))
    vision = model.vision.model_copy(update=dict(depth=blocks, fullatt_block_indexes=full))
    text = model.text.model_copy(update=dict(num_layers=layers, tie_word_embeddings=False))
    return model.model_copy(update=dict(remat="full", vision=vision, text=text))


def batch_of(model):
    """Eight samples of 512 tokens and one image of 1,024 patches each, in windows of 64."""
    from mindvl_jax.models.vision_language.collate import shape_for

    shape = shape_for(model.vision, rows=1, tokens=TOKENS, patches=PATCHES, samples=SAMPLES, min_pixels=56 * 56)
    batch = shape.empty()
    batch.loss_weights[:] = 1.0
    for ids, lengths, places, size in (
        (batch.segment_ids, batch.segment_lengths, TOKENS, TOKENS // SAMPLES),
        (batch.patch_segment_ids, batch.image_lengths, PATCHES, PATCHES // SAMPLES),
        (batch.patch_window_ids, batch.window_lengths, PATCHES, 64),
    ):
        ids[:] = np.arange(places) // size + 1
        lengths[:, : places // size] = size
    return shape, batch


def through_bridge(model) -> tuple[Callable[[], Any], Facts]:
    """Run the trainer's step as the bridge's program over uninitialised tensors."""
    import jax
    import torch

    import npu_bridge
    from mindvl_jax.config.schema import MeshConfig, OptimizerConfig, PhaseConfig
    from mindvl_jax.models.outline import outline_of
    from mindvl_jax.objectives.registry import make_objective
    from mindvl_jax.parallel.mesh import make_mesh
    from mindvl_jax.training.state import abstract_state
    from mindvl_jax.training.step import make_programs
    from npu_bridge.runtime.api import Compiled
    from npu_bridge.runtime.array import Array
    from npu_bridge.runtime.conversion import storage_dtype

    mesh, outline = make_mesh(MeshConfig(), jax.devices()[:1]), outline_of(model)
    shape, batch = batch_of(model)
    phase = PhaseConfig(
        name="benchmark",
        steps=1,
        mixture=({"source": "none"},),
        rows=1,
        sequence_length=TOKENS,
        patches_per_row=PATCHES,
        learning_rate=1e-5,
    )

    def on_npu(function, *, in_shardings, out_shardings, donate_argnums=()):
        return npu_bridge.jit(function, donate_argnums=donate_argnums, device="npu")

    programs = make_programs(
        outline,
        phase=phase,
        objective=make_objective(model, phase, loss_chunk=1024),
        optimizer=OptimizerConfig(),
        spec=shape.spec(),
        trained=list(outline.shapes),
        frozen=[],
        mesh=mesh,
        compile=on_npu,
    )
    state = abstract_state(outline, list(outline.shapes), [], mesh)
    lowered = programs.train_step.lower(state, batch, np.float32(1e-5))
    compiled = Compiled(lowered, "npu")

    def empty(leaf) -> Array:
        tensor = torch.empty(leaf.shape, dtype=storage_dtype(leaf.dtype), device="npu")
        return Array(tensor, tuple(leaf.shape), leaf.dtype, ((),) * len(leaf.shape), compiled.runtime)

    held = [empty(leaf) for leaf in jax.tree.leaves(state)]
    rest, count = [*jax.tree.leaves(batch), np.float32(1e-5)], len(held)

    def step():
        nonlocal held
        held = compiled([*held, *rest])[:count]

    return step, lambda: {"planned MiB": lowered.memory()["peak_bytes"] / 2**20, "runs as": compiled.execution}


def by_hand(model) -> tuple[Callable[[], Any], Facts]:
    """The same model with torch_npu's fused calls, activation checkpointing by layer, autocast and the fused AdamW."""
    import torch
    import torch_npu  # noqa: F401
    from torch.utils.checkpoint import checkpoint

    from mindvl_jax.models.outline import outline_of
    from tests.emulator.device.handwritten import Handwritten

    class Checkpointed(Handwritten):
        def block(self, *arguments, **named):
            return checkpoint(super().block, *arguments, use_reentrant=False, **named)

    shapes = outline_of(model).shapes
    parameters = {path: np.zeros(s.shape, s.dtype) for path, s in shapes.items()}
    written = Checkpointed(model, parameters, batch_of(model)[1])
    leaves = list(written.leaves.values())
    optimizer = torch.optim.AdamW(leaves, lr=1e-5, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("npu", torch.bfloat16):
            loss = written.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()

    return step, dict


SIDES = {"bridge": through_bridge, "hand": by_hand}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("layers", type=int)
    parser.add_argument("blocks", type=int)
    args = parser.parse_args()
    import torch
    import torch_npu  # noqa: F401

    import npu_bridge.emulator as emulator

    torch.set_num_threads(1)
    step, facts = SIDES[args.side](slice_of(args.layers, args.blocks))
    for _ in range(2):  # the first step allocates persistent memory, such as the optimizer's moments
        step()
    torch.npu.synchronize()
    torch.npu.reset_peak_memory_stats()
    with emulator.count() as counts:
        start = time.process_time()
        step()
        host = time.process_time() - start
    torch.npu.synchronize()
    counted = {what: sum(getattr(counts, what).values()) for what in ("kernels", "synchronisations", "copies")}
    print(
        json.dumps(
            {**counted, "host us": host * 1e6, "peak MiB": torch.npu.max_memory_allocated() / 2**20, "facts": facts()}
        )
    )


if __name__ == "__main__":
    main()
