"""Plans and counts a training step of MindVL-8B on one emulated device that computes nothing; prints a line of JSON.

Nothing of the model's size exists in memory: parameters are tensors of the device that nobody writes, batches are of
real lengths.
"""

import json
import sys
import time

import jax
import numpy as np
import torch
import torch_npu  # noqa: F401

import npu_bridge
import npu_bridge.emulator as emulator
from mindvl_jax.config import families
from mindvl_jax.config.schema import MeshConfig, OptimizerConfig, PhaseConfig
from mindvl_jax.models.outline import outline_of
from mindvl_jax.models.vision_language.collate import shape_for
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.training.state import abstract_state
from mindvl_jax.training.step import make_programs
from npu_bridge.runtime.api import Compiled
from npu_bridge.runtime.array import Array
from npu_bridge.runtime.conversion import storage_dtype

TOKENS, PATCHES, SAMPLES = 4096, 8192, 8
layers, blocks = (int(text) for text in sys.argv[1:])
model = families.preset("mindvl-8b")
vision = model.vision.model_copy(
    update=dict(depth=blocks, fullatt_block_indexes=tuple(i for i in model.vision.fullatt_block_indexes if i < blocks))
)
model = model.model_copy(
    update=dict(remat="full", text=model.text.model_copy(update=dict(num_layers=layers)), vision=vision)
)
mesh = make_mesh(MeshConfig(), jax.devices()[:1])
outline = outline_of(model)
shape = shape_for(model.vision, rows=1, tokens=TOKENS, patches=PATCHES, samples=SAMPLES, min_pixels=56 * 56)
phase = PhaseConfig(
    name="large",
    steps=1,
    mixture=({"source": "none"},),
    rows=1,
    sequence_length=TOKENS,
    patches_per_row=PATCHES,
    learning_rate=1e-5,
)
programs = make_programs(
    outline,
    phase=phase,
    objective=make_objective(model, phase, loss_chunk=1024),
    optimizer=OptimizerConfig(),
    spec=shape.spec(),
    trained=list(outline.shapes),
    frozen=[],
    mesh=mesh,
    compile=lambda function, *, in_shardings, out_shardings, donate_argnums=(): npu_bridge.jit(
        function, donate_argnums=donate_argnums, device="npu"
    ),
)
batch = shape.empty()
# Eight samples of 512 tokens and of 1,024 patches in windows of 64.
batch.segment_lengths[:], batch.image_lengths[:, :8], batch.window_lengths[:, : PATCHES // 64] = (
    TOKENS // SAMPLES,
    PATCHES // 8,
    64,
)
state = abstract_state(outline, list(outline.shapes), [], mesh)
start = time.process_time()
lowered = programs.train_step.lower(state, batch, np.float32(1e-5))
lowering = time.process_time() - start
compiled = Compiled(lowered, "npu", capture=False)  # what host and allocator do for each operator


def on_device(leaf):
    return Array(
        torch.empty(leaf.shape, dtype=storage_dtype(leaf.dtype), device="npu"),
        tuple(leaf.shape),
        leaf.dtype,
        ((),) * len(leaf.shape),
        compiled.runtime,
    )


held = [on_device(leaf) for leaf in jax.tree.leaves(state)]
rest = [*jax.tree.leaves(batch), np.float32(1e-5)]
counts = len(held)
torch.npu.synchronize()


def step(held):
    return compiled([*held, *rest])[:counts]


held = step(held)
torch.npu.synchronize()
torch.npu.reset_peak_memory_stats()
with emulator.count() as counted:
    start = time.process_time()
    held = step(held)
    host = time.process_time() - start
    torch.npu.synchronize()
plan = lowered.memory()
print(
    json.dumps(
        {
            "parameters": sum(int(np.prod(leaf.shape)) for leaf in outline.shapes.values()),
            "layers": layers,
            "blocks": blocks,
            "kernels": sum(counted.kernels.values()),
            "host seconds": host,
            "lowering seconds": lowering,
            "planned peak": plan["peak_bytes"],
            "planned arguments": plan["argument_bytes"],
            "allocator peak": torch.npu.max_memory_allocated(),
            "reserved": torch.npu.max_memory_reserved(),
            "execution": compiled.execution,
        }
    ),
    flush=True,
)
