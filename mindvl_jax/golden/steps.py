"""The doctor's training: a small MindVL, twenty steps, random images and text; its losses on XLA are stored in
golden.json.

`python -m mindvl_jax.golden.steps --store` trains on XLA and writes them; `--device npu` trains through the bridge and
prints one line of JSON. Everything that decides the losses is in this file: no data set, no tokenizer, no weights.

B rows, T tokens, P patches.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindvl_jax.config import loader as config_loader
from mindvl_jax.config.schema import Config, ModelConfig
from mindvl_jax.data.media.image import visual_layout
from mindvl_jax.models.vision_language.collate import collate, shape_for
from mindvl_jax.models.vision_language.example import Example
from mindvl_jax.models.vision_language.positions import rotary_positions

STORED = Path(__file__).with_name("golden.json")
STEPS, ROWS, TOKENS, PATCHES, SAMPLES, BATCHES, LEARNING_RATE = 20, 8, 64, 64, 3, 4, 1e-3
MIN_PIXELS = 28 * 28
# Larger than usual: with 1e-8 AdamW turns gradients that are nothing but rounding into steps of full length, and no two
# devices agree.
EPSILON = 1e-6

# Both towers with everything the published models have: windows and whole images, grouped heads, three-row rotary
# positions, q and k norms, a head of its own. Head dims are multiples of 16, as fused attention wants them.
MODEL = {
    "vision": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "text": {
        "family": "qwen3",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "rope": "mrope",
        "mrope_section": [4, 6, 6],
    },
    "image_token_id": 508,
    "video_token_id": 509,
    "vision_start_token_id": 510,
    "vision_end_token_id": 511,
}


def configuration(*, compute_dtype: str, device: str | None, places: int = 1) -> Config:
    """A whole configuration; only its model, back end, mesh and phase are used. `device` None is XLA."""
    phase = {
        "name": "golden",
        "steps": STEPS,
        "mixture": [{"source": "random"}],
        "rows": ROWS,
        "sequence_length": TOKENS,
        "patches_per_row": PATCHES,
        "max_samples_per_row": SAMPLES,
        "min_pixels": MIN_PIXELS,
        "max_pixels": MIN_PIXELS * 16,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
    }
    mapping: dict[str, Any] = {
        "run": {"dir": "unused", "seed": 0},
        "model": MODEL | {"compute_dtype": compute_dtype},
        "tokenizer": {"path": "unused"},
        "data": {"sources": {"random": {"path": "unused"}}},
        "training": {"phases": [phase], "optimizer": {"eps": EPSILON}},
        "mesh": {"fsdp": places},
    }
    if device is not None:
        mapping |= {"backend": "npu_bridge", "bridge": {"device": device}}
    return config_loader.from_mapping(mapping)


def example(
    rng: np.random.Generator, model: ModelConfig, grid: tuple[int, int] | None, text: int, answer: int
) -> Example:
    """Make random pixels and tokens: an image of `grid` patches or none, `text` tokens, `answer` tokens with a loss."""
    vision, spans = model.vision, []
    tokens, index = [], []
    layout = None if grid is None else visual_layout((1, *grid), vision)
    if layout is not None:
        tokens = [model.vision_start_token_id, *[model.image_token_id] * layout.tokens, model.vision_end_token_id]
        index = [-1, *layout.token_index, -1]
        spans = [(1, layout.grid, None)]
    # Tokens follow one another by a rule, so that there is something to learn in twenty steps.
    first, stride = (int(n) for n in rng.integers(1, 40, 2))
    tokens = np.array([*tokens, *((first + stride * np.arange(text + answer)) % 500)], np.int32)
    index = np.array([*index, *[-1] * (text + answer)], np.int32)
    targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
    targets[:-1], weights[-answer - 1 : -1] = tokens[1:], 1
    return Example(
        id="random",
        origin="golden",
        tokens=tokens,
        targets=targets,
        loss_weights=weights,
        visual_index=index,
        visuals=(),
        positions=rotary_positions(
            len(tokens), spans, merge=vision.spatial_merge_size, tokens_per_second=vision.tokens_per_second, mrope=True
        ),
        patch_positions=np.zeros((0, 2), np.int32) if layout is None else layout.patch_positions,
        image_lengths=np.zeros(0, np.int32) if layout is None else layout.image_lengths,
        window_lengths=np.zeros(0, np.int32) if layout is None else layout.window_lengths,
        pixels=()
        if layout is None
        else (rng.integers(0, 256, (layout.patches, vision.in_channels * vision.patch_size**2), dtype=np.uint8),),
    )


def batches(model: ModelConfig):
    """-> the static shape and BATCHES batches: rows of two images and a text, of one image, and of text alone."""
    rng = np.random.default_rng(20260101)
    shape = shape_for(model.vision, rows=ROWS, tokens=TOKENS, patches=PATCHES, samples=SAMPLES, min_pixels=MIN_PIXELS)
    made = []
    for _ in range(BATCHES):
        rows = [
            [example(rng, model, (4, 6), 7, 5), example(rng, model, (2, 4), 4, 6), example(rng, model, None, 9, 5)]
            if row % 4 < 2
            else [example(rng, model, (6, 8), 11, 12)]
            if row % 4 == 2
            else [example(rng, model, None, 20, 17), example(rng, model, None, 8, 4)]
            for row in range(ROWS)
        ]
        made.append(collate(rows, shape, pad_id=0, vision=model.vision).batch)
    return shape, made


def digest(made) -> str:
    """Hash of every array of every batch: losses of other data are not compared."""
    whole = hashlib.sha256()
    for batch in made:
        for name, array in sorted(batch.fields().items()):
            whole.update(f"{name}{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()[:16]


class Training:
    """The training ready to step: parameters made, batches placed, programs of the back end.

    Attributes:
      state: after the last step; donated by the next. program: (state, batch, learning rate) -> (state, metrics).
        batches: placed.
      device_kind: name of the device that computes.
    """

    def __init__(self, config: Config):
        import jax

        from mindvl_jax.models.outline import outline_of
        from mindvl_jax.objectives.registry import make_objective
        from mindvl_jax.parallel.mesh import make_mesh
        from mindvl_jax.parallel.rules import row_sharding
        from mindvl_jax.training.backend import make_backend
        from mindvl_jax.training.state import initial_params, start_phase
        from mindvl_jax.training.step import make_programs

        self.backend = make_backend(config)
        self.backend.join()
        mesh = make_mesh(config.mesh, self.backend.devices())
        self.outline = outline_of(config.model, config.adapters)
        self.state = start_phase(
            initial_params(self.outline, mesh, config.run.seed), list(self.outline.shapes), [], mesh
        )
        shape, made = batches(config.model)

        def place(x):
            return jax.make_array_from_callback(x.shape, row_sharding(mesh), lambda part: x[part])

        self.batches = [jax.tree.map(place, batch) for batch in made]
        phase = config.training.phases[0]
        programs = make_programs(
            self.outline,
            phase=phase,
            objective=make_objective(config.model, phase, loss_chunk=ROWS * TOKENS),
            optimizer=config.training.optimizer,
            spec=shape.spec(),
            trained=list(self.outline.shapes),
            frozen=[],
            mesh=mesh,
            compile=functools.partial(self.backend.compile, mesh=mesh),
        )
        self.program, self.device_kind, self.steps = programs.train_step, self.backend.device_kind(mesh), 0

    def step(self) -> dict[str, Any]:
        """One step -> its metrics, which nobody has waited for."""
        with self.backend.precision():
            self.state, metrics = self.program(
                self.state, self.batches[self.steps % BATCHES], np.float32(LEARNING_RATE)
            )
        self.steps += 1
        return metrics


def train(config: Config, steps: int = STEPS) -> tuple[list[float], str]:
    """-> the loss of each step before its update, and the device's name."""
    training = Training(config)
    return [float(np.asarray(training.step()["loss"])) for _ in range(steps)], training.device_kind


def store() -> dict[str, Any]:
    """Train on XLA in both dtypes and write golden.json."""
    runs = {dtype: train(configuration(compute_dtype=dtype, device=None))[0] for dtype in ("float32", "bfloat16")}
    made = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    whole = {
        "made": made | {"machine": platform.machine(), "date": datetime.date.today().isoformat()},
        "batches": digest(batches(configuration(compute_dtype="float32", device=None).model)[1]), "losses": runs,
    }  # fmt: skip
    STORED.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mindvl_jax.golden.steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--store", action="store_true", help=f"train on XLA and write {STORED.name}")
    parser.add_argument("--device", choices=("npu", "cuda", "cpu"), help="train through the bridge")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(arguments)
    if given.store == (given.device is not None):
        parser.error("give either --store or --device")
    if given.store:
        whole = store()
        print(
            f"{STORED}: "
            + ", ".join(f"{dtype} {losses[0]:.4f} -> {losses[-1]:.4f}" for dtype, losses in whole["losses"].items())
        )
        return 0
    from mindvl_jax.parallel.distributed import launched_processes

    config = configuration(compute_dtype=given.compute_dtype, device=given.device, places=launched_processes())
    losses, kind = train(config, given.steps)
    print(json.dumps({"losses": losses, "execution": f"on {kind}"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
