"""Text conversations to packed batches, for language models alone. Imports no jax.

B rows, T token positions, S samples a row. The batch is the vision-language families' without what images fill: those
fields are None, which is an empty subtree of the pytree, so programs take no arrays for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from mindvl_jax.config.schema import Config, ModelConfig, PhaseConfig
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.packing.rows import Budgets
from mindvl_jax.data.processor import BatchSpec, Cost, Field, PackedBatch
from mindvl_jax.data.sample import Sample, SampleError
from mindvl_jax.data.text.tokenizer import Tokenizer
from mindvl_jax.models.vision_language.batch import Batch
from mindvl_jax.models.vision_language.collate import write_text
from mindvl_jax.models.vision_language.example import EncodeLimits, Example, ExampleEncoder
from mindvl_jax.models.vision_language.processor import fitting_tokenizer, lengths_key
from mindvl_jax.models.vision_language.work import WorkModel


class TextProcessor:
    """See `data.processor.Processor`.

    Raises:
      UserError: the tokenizer has more ids than the model.
    """

    works = ("language",)
    media = None

    def __init__(self, config: Config, phase_index: int):
        phase, model = config.training.phases[phase_index], config.model
        self.tokenizer = fitting_tokenizer(config)
        self.limits = text_limits(config, phase_index)
        self.encoder = TextEncoder(model, self.tokenizer, self.limits)
        self._work = WorkModel.of(model)
        self._phase = phase
        self.budgets = Budgets(
            ("tokens", "samples"), (phase.sequence_length, phase.max_samples_per_row), filled=("token",)
        )
        self.encoding = (model.model_dump_json(), config.tokenizer.model_dump_json(), self.limits)
        self.lengths = lengths_key(config, self.limits, self.budgets)

    @staticmethod
    def batch_spec(config: Config, phase: PhaseConfig) -> BatchSpec:
        return text_spec(phase.rows, phase.sequence_length, phase.max_samples_per_row)

    def encode(self, sample: Sample) -> Example:
        """Raise SampleError as `ExampleEncoder.encode`, and for a sample with images or videos."""
        return self.encoder.encode(sample)

    def cost(self, example: Example) -> Cost:
        language, _ = self._work.loads(example.length, example.image_lengths)
        return Cost((example.length, 1), (language,))

    def load(self, example: Example) -> Example:
        return dataclasses.replace(example, pixels=())

    def media_of(self, example: Example) -> None:
        return None

    def fill(self, area: np.ndarray, media: Sequence[Any]) -> list[SampleError | None]:
        return [None] * len(media)

    def collate(self, rows: Sequence[Sequence[Example]], *, media: np.ndarray | None = None) -> PackedBatch:
        """Raise ValueError when a row is over a budget."""
        batch = text_spec(len(rows), self._phase.sequence_length, self._phase.max_samples_per_row).empty()
        if self.tokenizer.pad_id:
            batch.tokens[:] = self.tokenizer.pad_id
        for index, row in enumerate(rows):
            used = (sum(example.length for example in row), len(row))
            if any(size > room for size, room in zip(used, self.budgets.capacities, strict=True)):
                raise ValueError(
                    f"row {index} needs {used} (tokens, samples), the budgets are {self.budgets.capacities}: "
                    f"{[example.id for example in row]}"
                )
            if row:
                write_text(batch, index, row)
        return PackedBatch(batch, tuple(tuple(example.id for example in row) for row in rows))


@dataclasses.dataclass(frozen=True)
class _ChatModel:
    """Stand in for a model before the chat encoder. Without media tokens, so the tokenizer needs none either."""

    media_tokens: ClassVar[dict[str, str]] = {}

    family: str
    text: Any
    chat_template: str | None
    vision: PatchGeometry
    image_token_id: None = None
    video_token_id: None = None
    vision_start_token_id: None = None
    vision_end_token_id: None = None


class TextEncoder(ExampleEncoder):
    """Encode samples without media for one model, tokenizer and set of limits."""

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer, limits: EncodeLimits):
        stand_in = _ChatModel(model.family, model.text, getattr(model, "chat_template", None), PatchGeometry())
        super().__init__(stand_in, tokenizer, limits)

    def encode(self, sample: Sample) -> Example:
        for name, found in (("image", sample.images), ("video", sample.videos)):
            if found:
                raise SampleError(
                    "unsupported_field",
                    f"model.family={self._model.family} is a language model alone and cannot read the sample's "
                    f"{len(found)} {name}(s); leave such samples out, or train a vision-language family",
                )
        return super().encode(sample)


def text_limits(config: Config, phase_index: int) -> EncodeLimits:
    """Budgets of a phase for one sample."""
    phase = config.training.phases[phase_index]
    return EncodeLimits(
        min_pixels=phase.min_pixels,
        max_pixels=phase.max_pixels,
        max_tokens=min(phase.max_sample_length or phase.sequence_length, phase.sequence_length),
        train_on=config.data.train_on,
    )


def text_spec(rows: int, tokens: int, samples: int) -> BatchSpec:
    """The fields of `vision_language.batch.Batch` that text fills."""

    def field(dtype: str = "int32", fill: int = 0) -> Field:
        return Field((rows, tokens), dtype, ("rows", "tokens"), fill)

    return BatchSpec((
        ("tokens", field()),
        ("targets", field()),
        ("loss_weights", field("float32")),
        ("segment_ids", field()),
        ("positions", Field((rows, 3, tokens), "int32", ("rows", None, "tokens"))),
        ("source_ids", field(fill=-1)),
        ("segment_lengths", Field((rows, samples), "int32", ("rows", None), -1)),
    ), make=text_batch, capacities=(("tokens", "token_efficiency"),))  # fmt: skip


def text_batch(**fields: Any) -> Batch:
    """Return a batch of text alone."""
    return Batch(**{field.name: fields.get(field.name) for field in dataclasses.fields(Batch)})
