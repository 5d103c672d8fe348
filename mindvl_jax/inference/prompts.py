"""Encode requests, and pack prompts into prefill batches, padded at the end."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mindvl_jax.core.errors import UserError
from mindvl_jax.data.marks import MEDIA_TOKENS, literal, plain
from mindvl_jax.data.media.files import named_file
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.media.image import load_image
from mindvl_jax.data.record import conversation
from mindvl_jax.data.sample import Media, Message
from mindvl_jax.data.text.tokenizer import TokenizerError
from mindvl_jax.inference.buckets import Bucket, bucket_of
from mindvl_jax.inference.request import Request
from mindvl_jax.models.vision_language.batch import Batch, BatchShape
from mindvl_jax.models.vision_language.collate import collate
from mindvl_jax.models.vision_language.example import EncodeLimits, Example, ExampleEncoder, VisualItem


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """An encoded prompt with its pixels.

    Attributes:
      tokens, patches: sizes. bucket: capacity of the row it is prefilled in.
    """

    id: str
    example: Example
    bucket: Bucket

    @property
    def tokens(self) -> int:
        return self.example.length

    @property
    def patches(self) -> int:
        return self.example.patches

    @functools.cached_property
    def identity(self) -> np.ndarray:
        """(tokens,) int64: what each token is. Text is its number; a token of an image or video is a negative hash of
        the medium's pixels, of its place in it and of its rotary position, so that two pictures of one size differ,
        whatever the text, and so does a video whose frames are told to be further apart.
        """
        example = self.example
        visual = np.asarray(example.visual_index)
        if not (visual >= 0).any():
            return np.asarray(example.tokens, np.int64)
        starts = np.cumsum([0, *(item.layout.tokens for item in example.visuals)])
        digests = self._digests
        if starts[-1] != visual.max() + 1:  # tokens that are not laid out medium by medium: share all media or none
            starts, digests = np.array([0, visual.max() + 1]), [hashlib.blake2b(b"".join(digests)).digest()]
        seeds = np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)
        owner = np.clip(np.searchsorted(starts, visual, side="right") - 1, 0, len(seeds) - 1)
        place = (visual - starts[owner]).astype(np.uint64)
        factors = np.array([[0xD6E8FEB86659FD93], [0xA0761D6478BD642F], [0xE7037ED1A0B428DB]], np.uint64)
        hashed = seeds[owner] + place * np.uint64(0x9E3779B97F4A7C15)  # wraps; odd factors keep places apart
        hashed += np.sum(example.positions.astype(np.uint64) * factors, axis=0, dtype=np.uint64)
        return np.where(visual >= 0, (hashed | np.uint64(1 << 63)).view(np.int64), example.tokens)

    @functools.cached_property
    def media(self) -> tuple[tuple[bytes, np.ndarray], ...] | None:
        """(digest of the pixels, places in the prompt) of each image and video; None where their tokens are not laid
        out medium by medium.
        """
        visual = np.asarray(self.example.visual_index)
        starts = np.cumsum([0, *(item.layout.tokens for item in self.example.visuals)])
        if starts[-1] != visual.max() + 1:
            return None
        spans = itertools.pairwise(starts)
        places = (np.flatnonzero((visual >= start) & (visual < end)) for start, end in spans)
        return tuple(zip(self._digests, places, strict=True))

    @functools.cached_property
    def _digests(self) -> list[bytes]:
        return [_digest(*medium) for medium in zip(self.example.visuals, self.example.pixels, strict=True)]

    @functools.cached_property
    def without_pixels(self) -> Prompt:
        """The same tokens and positions, for a reader who knows the visual tokens."""
        empty = {
            name: getattr(self.example, name)[:0] for name in ("patch_positions", "image_lengths", "window_lengths")
        }
        seen = dict(visual_index=np.full_like(self.example.visual_index, -1), visuals=(), pixels=())
        example = dataclasses.replace(self.example, **empty, **seen)
        return Prompt(self.id, example, bucket_of(self.tokens, 0, 0))


def _digest(item: VisualItem, pixels: np.ndarray) -> bytes:
    told = repr((item.kind, item.layout.grid, pixels.shape, str(pixels.dtype))).encode()
    return hashlib.blake2b(told + np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


class PromptEncoder:
    """Encode requests for one model and tokenizer, with one cached encoder for each image size in use.

    Args:
      model: the module; its configuration says how images become tokens.
      min_pixels, max_pixels: area of a resized image unless a request sets it.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        min_pixels: int,
        max_pixels: int,
        resample: str = "bicubic",
        video_fps: float = 2.0,
        video_max_frames: int = 64,
    ):
        self._model, self._tokenizer, self._resample = prompt_config(model, tokenizer), tokenizer, resample
        self._sees = hasattr(model.config, "vision")
        self._limits = EncodeLimits(
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            resample=resample,
            video_fps=video_fps,
            video_max_frames=video_max_frames,
        )
        self._encoders: dict[tuple[int, int], ExampleEncoder] = {}

    def __call__(self, request: Request) -> Prompt:
        """Read and encode everything that the request names.

        Raises:
          UserError: unreadable images, a number of marks that differs from the number of images, text outside the
            vocabulary.
        """
        try:
            given = ([_media(item) for item in items] for items in (request.images, request.videos))
            messages, images, videos = conversation(request.messages, *given, media_root=request.media_root)
            if not self._sees and (images or videos):
                raise UserError(
                    "the model is a language model alone and cannot see images; use the weights of a "
                    "vision-language model"
                )
            example = self._encoder(request).encode_prompt(messages, images, videos, tools=request.tools, id=request.id)
            example = example.with_pixels(self._model.vision, self._resample)
        except UserError as error:
            raise UserError(f"request {request.id}: {error}" if request.id else str(error)) from error
        bucket = bucket_of(example.length, example.patches, len(example.image_lengths))
        return Prompt(id=request.id, example=example, bucket=bucket)

    def text(self, request: Request) -> Prompt:
        """Encode the last turn's content without a chat template; the model continues it.

        Raises:
          UserError: empty text, or text outside the vocabulary.
        """
        tokens = np.asarray(self._tokenizer.encode(request.messages[-1]["content"]), np.int32)
        if not len(tokens):
            raise UserError("the prompt is empty: there is nothing to continue")
        zeros, running = np.zeros_like(tokens), np.arange(len(tokens), dtype=np.int32)
        template = self._encoder(request).encode_prompt([Message("user", "a")], id=request.id)
        example = dataclasses.replace(
            template,
            tokens=tokens,
            targets=zeros,
            loss_weights=zeros.astype(np.float32),
            positions=np.stack([running] * 3),
            visual_index=zeros - 1,
        ).with_pixels(self._model.vision, self._resample)
        return Prompt(id=request.id, example=example, bucket=bucket_of(len(tokens), 0, 0))

    def _encoder(self, request: Request) -> ExampleEncoder:
        low = self._limits.min_pixels if request.min_pixels is None else request.min_pixels
        high = self._limits.max_pixels if request.max_pixels is None else request.max_pixels
        if low > high:
            raise UserError(f"min_pixels ({low}) is larger than max_pixels ({high}); give a range")
        if (low, high) not in self._encoders:
            limits = dataclasses.replace(self._limits, min_pixels=low, max_pixels=high)
            self._encoders[low, high] = ExampleEncoder(self._model, self._tokenizer, limits)
        return self._encoders[low, high]


# Sizes of the one empty patch group in a batch for a language model alone; it is never read.
_NO_VISION = PatchGeometry()


@dataclasses.dataclass(frozen=True)
class _TextModel:
    """The configuration fields that the chat encoder reads, for a text-only model."""

    vision: PatchGeometry
    text: Any
    image_token_id: int | None
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    media_tokens: Mapping[str, str]


def vision_of(model) -> PatchGeometry:
    """Patches of a module's images; a placeholder for a language model alone."""
    return getattr(model.config, "vision", _NO_VISION)


def prompt_config(model, tokenizer) -> Any:
    """Configuration for the chat encoder. A language model alone takes its unused media tokens from the tokenizer
    where that has them.
    """
    if hasattr(model.config, "vision"):
        return model.config
    try:
        ids = {key: tokenizer.token_id(name) for key, name in MEDIA_TOKENS.items()}
        names = MEDIA_TOKENS
    except TokenizerError:  # a vocabulary without them, such as DeepSeek's
        ids, names = dict.fromkeys(MEDIA_TOKENS), {}
    return _TextModel(vision=_NO_VISION, text=model.config.text, media_tokens=names, **ids)


def without_media(request: Request) -> Request:
    """Return the request without images and videos, for language-only scores."""
    messages = [{**turn, "content": literal(plain(text_of(turn["content"])).lstrip("\n"))} for turn in request.messages]
    return dataclasses.replace(request, messages=messages, images=(), videos=())


def text_of(content: str | Sequence[Any]) -> str:
    """Return a turn's content without the media parts of a list."""
    if isinstance(content, str):
        return content
    return "".join(literal(part["text"]) for part in content if isinstance(part.get("text"), str))


def _media(item: Any) -> Media:
    if isinstance(item, Media):
        return item
    if isinstance(item, (bytes, Image.Image)):
        return Media(data=item)
    if hasattr(item, "read"):  # an object that returns the bytes when they are needed
        return Media(data=item.read())
    return named_file(str(item))


def read_picture(item: Any) -> Image.Image:
    """Decode an image from anything that a request may name. Raises UserError."""
    return load_image(_media(item))


def samples_of(bucket: Bucket) -> int:
    """Largest number of prompts in a row."""
    return max(1, bucket.tokens // 16)


def pack_bucket(rows_of_prompts: Sequence[Sequence[Prompt]], bucket: Bucket, rows: int, vision: PatchGeometry) -> Batch:
    """Build a host batch of `rows` rows: the given ones, then padding.

    Raises:
      ValueError: a row of prompts larger than the bucket (a bug of the caller).
    """
    P = max(bucket.patches, vision.merge_unit)
    # A window holds at least one visual token, so there are at most as many windows as visual tokens.
    shape = BatchShape(
        rows=rows,
        tokens=bucket.tokens,
        patches=P,
        samples=samples_of(bucket),
        images=max(bucket.images, 1),
        windows=P // vision.merge_unit,
        patch_dim=vision.patch_dim,
    )
    padded = [[prompt.example for prompt in row] for row in rows_of_prompts] + [
        [] for _ in range(rows - len(rows_of_prompts))
    ]
    return collate(padded, shape, pad_id=0, vision=vision).batch
