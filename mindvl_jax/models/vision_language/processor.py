"""Conversations with images and videos to packed batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mindvl_jax.config.schema import Config, PhaseConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.processor import BatchSpec, Cost, MediaArea, PackedBatch
from mindvl_jax.data.sample import Sample, SampleError
from mindvl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mindvl_jax.models.vision_language.collate import batch_shape, budgets_of, collate, size_of, write_pixels
from mindvl_jax.models.vision_language.example import EncodeLimits, Example, ExampleEncoder, VisualItem, read_pixels
from mindvl_jax.models.vision_language.work import WorkModel


class VisionLanguageProcessor:
    """See `data.processor.Processor`.

    Raises:
      UserError: the tokenizer has more ids than the model.
    """

    works = ("language", "vision")

    def __init__(self, config: Config, phase_index: int):
        phase, model = config.training.phases[phase_index], config.model
        self.tokenizer = fitting_tokenizer(config)
        self.limits = training_limits(config, phase_index)
        self.encoder = ExampleEncoder(model, self.tokenizer, self.limits)
        self._vision, self._work = model.vision, WorkModel.of(model)
        self._shape = batch_shape(config, phase)
        self.budgets = budgets_of(self._shape)
        self.media = MediaArea((self._shape.patches, self._shape.patch_dim), "uint8")
        self.encoding = (model.model_dump_json(), config.tokenizer.model_dump_json(), self.limits)
        self.lengths = lengths_key(config, self.limits, self.budgets)

    @staticmethod
    def batch_spec(config: Config, phase: PhaseConfig) -> BatchSpec:
        return batch_shape(config, phase).spec()

    def encode(self, sample: Sample) -> Example:
        return self.encoder.encode(sample)

    def cost(self, example: Example) -> Cost:
        return Cost(size_of(example), self._work.loads(example.length, example.image_lengths))

    def load(self, example: Example) -> Example:
        return example.with_pixels(self._vision, self.limits.resample)

    def media_of(self, example: Example) -> tuple[VisualItem, ...]:
        return example.visuals

    def fill(self, area: np.ndarray, media: Sequence[Sequence[VisualItem]]) -> list[SampleError | None]:
        errors: list[SampleError | None] = []
        cursor = 0
        for items in media:
            start = cursor
            try:
                for item in items:
                    write_pixels(
                        area[cursor : cursor + item.layout.patches],
                        read_pixels(item, self._vision, self.limits.resample),
                        self._vision,
                    )
                    cursor += item.layout.patches
                errors.append(None)
            except SampleError as error:
                area[start:cursor] = 0
                cursor = start
                errors.append(error.with_traceback(None))
        return errors

    def collate(self, rows: Sequence[Sequence[Example]], *, media: np.ndarray | None = None) -> PackedBatch:
        shape = dataclasses.replace(self._shape, rows=len(rows))
        return collate(rows, shape, pad_id=self.tokenizer.pad_id, vision=self._vision, patches=media)


@functools.lru_cache(maxsize=4)
def cached_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load a tokenizer once: reading 151,000 entries takes a second, and every phase asks for the same ones."""
    return load_tokenizer(config)


def fitting_tokenizer(config: Config) -> Tokenizer:
    """Return the configuration's tokenizer; UserError when it has more ids than the model."""
    tokenizer, size = cached_tokenizer(config.tokenizer), config.model.text.vocab_size
    if tokenizer.vocab_size > size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.text.vocab_size is {size}; the model must not be "
            "smaller"
        )
    return tokenizer


def lengths_key(config: Config, limits: EncodeLimits, budgets: Budgets) -> dict[str, Any]:
    """Return all that the lengths of examples depend on, for `Processor.lengths`."""
    return {
        "model": config.model.model_dump(mode="json", exclude={"compute_dtype", "param_dtype", "remat"}),
        "tokenizer": config.tokenizer.model_dump(mode="json"),
        "limits": dataclasses.asdict(limits),
        "budgets": dict(zip(budgets.names, budgets.capacities, strict=True)),
    }


def training_limits(config: Config, phase_index: int) -> EncodeLimits:
    """Budgets and pixel rules of a phase for one sample."""
    phase, vision, data = config.training.phases[phase_index], config.model.vision, config.data
    largest = phase.max_image_patches or vision.image_patches or phase.max_pixels // vision.patch_size**2
    return EncodeLimits(
        min_pixels=phase.min_pixels,
        max_pixels=phase.max_pixels,
        max_tokens=min(phase.max_sample_length or phase.sequence_length, phase.sequence_length),
        max_patches=phase.patches_per_row,
        limit_image_patches=min(largest, phase.patches_per_row),
        refuse_shrunk=data.on_shrink == "refuse",
        train_on=data.train_on,
        resample=data.resample,
        video_fps=data.video_fps,
        video_max_frames=data.video_max_frames,
    )
