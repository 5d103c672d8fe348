"""Images with a class to batches of patches.

A sample is a conversation of two turns: the user names the class, the assistant answers with one image and nothing
else. So the files that vision-language models read serve here too.

B rows (images), P patches, C numbers a patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mindvl_jax.config.schema import Config, PhaseConfig
from mindvl_jax.data.marks import marks, plain
from mindvl_jax.data.media.image import RESAMPLE, load_image
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.processor import BatchSpec, Cost, Field, PackedBatch
from mindvl_jax.data.sample import Sample, SampleError
from mindvl_jax.models.dit.config import DiTConfig


@dataclasses.dataclass(frozen=True, eq=False)
class DiTExample:
    """One image, (P, C) uint8, and the index of its class."""

    id: str
    pixels: np.ndarray
    label: int
    source: int = 0
    number: int = 0
    truncated: int = 0
    shrunk: int = 0
    loaded: bool = True

    @property
    def nbytes(self) -> int:
        return 512 + self.pixels.nbytes

    def for_cache(self) -> DiTExample:
        return self


class DiTProcessor:
    """See `data.processor.Processor`. One image a row; images are small, so encoding reads their pixels."""

    works = ("model",)
    media = None

    def __init__(self, config: Config, phase_index: int):
        self._model, self._resample = config.model, config.data.resample
        self._labels = {name: index for index, name in enumerate(config.model.classes)}
        tokens = config.model.tokens
        self.budgets = Budgets(("tokens", "images"), (tokens, 1), filled=("token",))
        self.encoding = (config.model.model_dump_json(), config.data.resample)
        self.lengths: dict[str, Any] = {
            "model": config.model.model_dump(mode="json", exclude={"compute_dtype", "param_dtype", "remat"})
        }

    @staticmethod
    def batch_spec(config: Config, phase: PhaseConfig) -> BatchSpec:
        """pixels (B, P, C) uint8 in the order of `to_patches`, labels (B,), weights (B,; 0 for a row without an image),
        numbers (B,).
        """
        return batch_spec(config.model, phase.rows)

    def encode(self, sample: Sample) -> DiTExample:
        """Raise SampleError for another form of conversation, an unknown class, or an image that cannot be read."""
        turns = [message for message in sample.messages if message.role != "system"]
        if (
            [turn.role for turn in turns] != ["user", "assistant"]
            or len(sample.images) != 1
            or len(marks(turns[1].content)) != 1
        ):
            raise SampleError(
                "malformed",
                "a sample for this model is a user's turn with the name of a class, and an assistant's turn "
                "with one <image>",
            )
        name = plain(turns[0].content).strip()
        if name not in self._labels:
            raise SampleError(
                "unknown_class", f"class {name!r} is not in model.classes ({', '.join(list(self._labels)[:20])})"
            )
        image = load_image(sample.images[0], keep_grey=True)
        return DiTExample(sample.id, to_patches(image, self._model, self._resample), self._labels[name])

    def cost(self, example: DiTExample) -> Cost:
        return Cost((len(example.pixels), 1), (float(len(example.pixels)),))

    def load(self, example: DiTExample) -> DiTExample:
        return example

    def media_of(self, example: DiTExample) -> None:
        return None

    def fill(self, area: np.ndarray, media: Sequence[Any]) -> list[SampleError | None]:
        return [None] * len(media)

    def collate(self, rows: Sequence[Sequence[DiTExample]], *, media: np.ndarray | None = None) -> PackedBatch:
        batch = batch_spec(self._model, len(rows)).empty()
        for index, row in enumerate(rows):
            for example in row:
                batch["pixels"][index], batch["labels"][index] = example.pixels, example.label
                batch["weights"][index], batch["numbers"][index] = 1.0, example.number
        return PackedBatch(batch, tuple(tuple(example.id for example in row) for row in rows))


def batch_spec(model: DiTConfig, rows: int) -> BatchSpec:
    return BatchSpec((
        ("pixels", Field((rows, model.tokens, model.patch_dim), "uint8", ("rows", "tokens", None))),
        ("labels", Field((rows,), "int32", ("rows",))),
        ("weights", Field((rows,), "float32", ("rows",))),
        ("numbers", Field((rows,), "int32", ("rows",))),
    ))  # fmt: skip


def to_patches(image: Image.Image, model: DiTConfig, resample: str = "bicubic") -> np.ndarray:
    """(P, C) uint8: patches row by row, each in (row, column, channel) order."""
    image = image.convert("L" if model.channels == 1 else "RGB")
    if image.size != (model.image_size, model.image_size):
        image = image.resize((model.image_size, model.image_size), RESAMPLE[resample])
    side, patch = model.image_size // model.patch_size, model.patch_size
    pixels = np.asarray(image).reshape(side, patch, side, patch, model.channels)
    return np.ascontiguousarray(pixels.transpose(0, 2, 1, 3, 4)).reshape(model.tokens, model.patch_dim)


def from_patches(patches: np.ndarray, model: DiTConfig) -> np.ndarray:
    """(.., P, C) -> (.., height, width, channels), the inverse of `to_patches`."""
    side, patch, lead = model.image_size // model.patch_size, model.patch_size, patches.shape[:-2]
    grid = patches.reshape(*lead, side, side, patch, patch, model.channels)
    return np.moveaxis(grid, -3, -4).reshape(*lead, model.image_size, model.image_size, model.channels)
