"""One encoded sample: token ids, targets, positions and media whose pixels are read when they are needed.

Encoding reads image headers only, so lengths are known (and rows can be planned) without decoding a pixel.
T tokens and P patches of this one sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.data.marks import IMAGE, marks
from mindvl_jax.data.media import image as image_files
from mindvl_jax.data.media import video as videos
from mindvl_jax.data.media.geometry import PatchGeometry
from mindvl_jax.data.sample import Media, Message, Sample, SampleError
from mindvl_jax.data.text.chat import ChatEncoder, TextTokenizer, Turn, check_turn_order
from mindvl_jax.models.vision_language.positions import rotary_positions


@dataclasses.dataclass(frozen=True)
class EncodeLimits:
    """Limits of one sample, and the preparation of its pixels. Sizes in pixels are areas of one frame.

    Attributes:
      max_tokens, max_patches: budgets of one sample; None does not limit (inference).
      limit_image_patches: hard limit of one image, which is shrunk to it; None follows the published rule alone.
      refuse_shrunk: refuse a sample whose images would be shrunk below their max_pixels by a budget.
    """

    min_pixels: int
    max_pixels: int
    max_tokens: int | None = None
    max_patches: int | None = None
    limit_image_patches: int | None = None
    refuse_shrunk: bool = False
    train_on: str = "answers"
    resample: str = "bicubic"
    video_fps: float = 2.0
    video_max_frames: int = 64


@dataclasses.dataclass(frozen=True, eq=False)
class VisualItem:
    """One image or video of a sample: where its pixels come from and how they are laid out."""

    media: Media
    kind: str  # "image" or "video"
    layout: image_files.VisualLayout
    frames: tuple[int, ...] = ()  # frame numbers taken from a video, an even count
    seconds: float | None = None  # seconds between frame pairs of a video
    shrunk: bool = False  # smaller than min_pixels and max_pixels alone would make it
    labels: tuple[str, ...] = ()  # what stands before each frame pair, where they are images of their own

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Return its placeholders in the text: (text before, placeholders) of each part."""
        if not self.labels:
            return [("", self.layout.tokens)]
        return [(label, self.layout.tokens // len(self.labels)) for label in self.labels]


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An encoded sample. Arrays are what one segment of a packed row holds.

    Attributes:
      tokens: (T,) int32.
      targets: (T,) int32, the next token, 0 at the end.
      loss_weights: (T,) float32, where the target is learned its turn's weight (1 unless the sample says otherwise),
        else 0.
      positions: (3, T) int32, from 0.
      visual_index: (T,) int32, merged patch group of this sample in window order, -1 for text.
      visuals: media in the order of their patches.
      patch_positions: (P, 2) int32; image_lengths, window_lengths: patches of each segment and window in order.
      truncated: turns that were left out to fit.
      shrunk: images and videos that a budget made smaller than max_pixels allows.
      source_turns: turns before truncation.
    """

    id: str
    origin: str
    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    positions: np.ndarray
    visual_index: np.ndarray
    visuals: tuple[VisualItem, ...]
    patch_positions: np.ndarray
    image_lengths: np.ndarray
    window_lengths: np.ndarray
    truncated: int = 0
    shrunk: int = 0
    task: str | None = None
    answers: tuple[str, ...] = ()
    source: int = 0  # place of its source among the phase's (`PhaseConfig.sources`)
    number: int = 0  # position in the phase's data stream
    pixels: tuple[np.ndarray, ...] | None = None  # one (P_i, ...) array a medium, once read

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def patches(self) -> int:
        return len(self.patch_positions)

    @property
    def loaded(self) -> bool:
        return self.pixels is not None

    @property
    def nbytes(self) -> int:
        # Arrays of a layout are shared by all images of its size and count nothing.
        return 1024 + self.tokens.nbytes * 7 + sum(pixels.nbytes for pixels in self.pixels or ())

    def with_pixels(self, vision: PatchGeometry, resample: str) -> Example:
        """Read the pixels of all media. Raises SampleError when one does not decode."""
        if self.pixels is not None:
            return self
        return dataclasses.replace(self, pixels=tuple(read_pixels(item, vision, resample) for item in self.visuals))

    def for_cache(self) -> Example:
        """The same with the encoded media let go, to be kept in memory beside its pixels."""
        light = tuple(dataclasses.replace(item, media=Media(path=item.media.path)) for item in self.visuals)
        return dataclasses.replace(self, visuals=light)


def read_pixels(item: VisualItem, vision: PatchGeometry, resample: str) -> np.ndarray:
    """uint8 patches of a medium in window order: one frame's for an image, one channel's without colour (see
    `image.frames_to_patches`).
    """
    if item.kind == "video":
        frames = videos.read_frames(item.media, item.frames, item.layout.grid, vision, resample)
    else:
        _, height, width = item.layout.grid
        size = (height * vision.patch_size, width * vision.patch_size)
        reduced = resample == "reduced" and vision.image_side is None
        picture = image_files.load_image(item.media, keep_grey=True, at_least=size if reduced else None)
        frames = image_files.image_frames(picture, item.layout.grid, vision, resample)
    return image_files.frames_to_patches(frames, item.layout, vision)


class ExampleEncoder:
    """Encode samples for one model, tokenizer and set of limits."""

    def __init__(self, model: ModelConfig, tokenizer: TextTokenizer, limits: EncodeLimits):
        self._model = model
        self._limits = limits
        self._chat = ChatEncoder(tokenizer, model)

    def encode(self, sample: Sample) -> Example:
        """Encode a sample for training.

        Raises SampleError with the reason: media and placeholders that do not match, no answer, longer than the budget
        even with all turns but the first exchange left out, nothing to learn, media that cannot be opened.
        """
        check_turn_order(sample.messages)
        turns, visuals = self._turns(sample)
        kept, truncated = self._fit(turns, visuals)
        return self._build(sample, kept, visuals, truncated, prompt=False)

    def encode_prompt(
        self,
        messages: Sequence[Message],
        image_media: Sequence[Media] = (),
        video_media: Sequence[Media] = (),
        *,
        tools: Sequence[str] = (),
        id: str = "prompt",
    ) -> Example:
        """Encode a conversation whose answer is asked for: it ends with an opened assistant turn, nothing is learned.

        Images without any placeholder in the text are put before the first user turn's text.
        Raises SampleError as `encode`, and when the prompt is longer than max_tokens (prompts are never cut).
        """
        messages = tuple(messages)
        if not messages or messages[-1].role not in ("user", "tool"):
            raise SampleError("malformed", "a prompt must end with a user or tool turn")
        if image_media and not any(marks(message.content) for message in messages):
            first = next(index for index, message in enumerate(messages) if message.role != "system")
            placed = dataclasses.replace(messages[first], content=IMAGE * len(image_media) + messages[first].content)
            messages = messages[:first] + (placed,) + messages[first + 1 :]
        sample = Sample(id, messages, tuple(image_media), tuple(video_media), tools=tuple(tools))
        turns, visuals = self._turns(sample, prompt=True)
        example = self._build(sample, turns, visuals, 0, prompt=True)
        if self._limits.max_tokens is not None and example.length > self._limits.max_tokens:
            raise SampleError(
                "too_long",
                f"the prompt has {example.length} tokens, the limit is {self._limits.max_tokens}; shorten it "
                "or lower max_pixels",
            )
        return example

    # --- steps ---

    def _turns(self, sample: Sample, *, prompt: bool = False) -> tuple[list[Turn], list[VisualItem]]:
        text = [mark for message in sample.messages for mark in marks(message.content)]
        counts = {"image": text.count(IMAGE), "video": len(text) - text.count(IMAGE)}
        for kind, found in (("image", sample.images), ("video", sample.videos)):
            if counts[kind] != len(found):
                raise SampleError(
                    "media_mismatch",
                    f"the text has {counts[kind]} <{kind}> placeholder(s) but the sample has {len(found)} {kind}(s)",
                )
        by_kind = {
            # Pictures of a sample share the most tiles while learning; a prompt's have them each.
            "image": [self._image_item(media, 1 if prompt else len(sample.images)) for media in sample.images],
            "video": [self._video_item(media) for media in sample.videos],
        }
        parts = {kind: iter([item.parts for item in items]) for kind, items in by_kind.items()}
        turns = self._chat.turns(sample.messages, parts["image"], parts["video"], sample.tools, prompt=prompt)
        # Media in the order in which the text names them: that is the order of their patches.
        order = {kind: iter(items) for kind, items in by_kind.items()}
        return turns, [next(order[kind]) for turn in turns for _, kind in turn.media]

    def _image_item(self, media: Media, images: int) -> VisualItem:
        height, width = image_files.image_size(media)
        limits = self._limits
        grid = image_files.image_grid(
            height,
            width,
            self._model.vision,
            min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels,
            limit_patches=limits.limit_image_patches,
            images=images,
        )
        shrunk = self._shrunk(height, width, grid[0] * grid[1] * grid[2], images)
        return VisualItem(media, "image", image_files.visual_layout(grid, self._model.vision), shrunk=shrunk)

    def _shrunk(self, height: int, width: int, patches: int, images: int = 1) -> bool:
        """Return whether a budget made an image or a frame smaller than its own limits do.

        Raises SampleError when such samples are refused.
        """
        limits, vision = self._limits, self._model.vision
        if limits.limit_image_patches is None and limits.max_patches is None:
            return False
        # The rule itself passes max_pixels for thin images.
        if vision.image_side is None and patches >= limits.max_pixels // vision.patch_size**2:
            return False
        views, rows, columns = image_files.image_grid(
            height, width, vision, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels, images=images
        )
        needed = views * rows * columns
        if needed <= patches:
            return False
        if limits.refuse_shrunk:
            raise SampleError(
                "shrunk",
                f"an image of {width}x{height} needs {needed} patches and has room for {patches}; "
                "raise patches_per_row, lower max_pixels, or set data.on_shrink to allow",
            )
        return True

    def _video_item(self, media: Media) -> VisualItem:
        if self._model.video_token_id is None:
            raise SampleError("unsupported_field", f"the model family {self._model.family} has no place for videos")
        limits = self._limits
        plan = videos.plan_frames(
            media,
            self._model.vision,
            fps=limits.video_fps,
            max_frames=limits.video_max_frames,
            min_pixels=limits.min_pixels,
            max_pixels=limits.max_pixels,
            limit_patches=limits.limit_image_patches,
            total_patches=limits.max_patches,
        )
        text = self._model.vision.frame_text
        labels = (
            ()
            if text is None
            else tuple(
                text.format(time=time, number=number, line="\n" if number > 1 else "")
                for number, time in enumerate(plan.pair_times, 1)
            )
        )
        shrunk = self._shrunk(*plan.size, plan.grid[1] * plan.grid[2])
        return VisualItem(
            media,
            "video",
            image_files.visual_layout(plan.grid, self._model.vision),
            plan.frames,
            plan.seconds_per_pair,
            shrunk,
            labels,
        )

    def _fit(self, turns: list[Turn], visuals: list[VisualItem]) -> tuple[list[Turn], int]:
        """The longest run of turns from the start that ends with an answer and fits both budgets."""
        max_tokens, max_patches = self._limits.max_tokens, self._limits.max_patches
        tokens = patches = seen = 0
        best = 0
        first = None
        for index, turn in enumerate(turns):
            tokens += len(turn.tokens)
            patches += sum(item.layout.patches for item in visuals[seen : seen + len(turn.media)])
            seen += len(turn.media)
            if turn.role == "assistant":
                needed = tokens - 1  # the closing newline of the last turn is not kept
                first = first or (needed, patches)
                if (max_tokens is None or needed <= max_tokens) and (max_patches is None or patches <= max_patches):
                    best = index + 1
        # Turns after the last answer teach nothing.
        last_answer = max(index for index, turn in enumerate(turns) if turn.role == "assistant") + 1
        if best == 0:
            reason = "too_long" if max_tokens is not None and first[0] > max_tokens else "too_many_patches"
            raise SampleError(
                reason,
                f"up to its first answer the sample has {first[0]} tokens and {first[1]} patches; the "
                f"budgets are {max_tokens} and {max_patches}: raise them or lower max_pixels",
            )
        return turns[:best], last_answer - best

    def _build(
        self, sample: Sample, turns: list[Turn], visuals: list[VisualItem], truncated: int, *, prompt: bool
    ) -> Example:
        vision, text = self._model.vision, self._model.text
        ids: list[int] = []
        learned: list[float] = []
        starts: list[list[int]] = []  # of each medium: the first placeholder of each of its parts
        for index, turn in enumerate(turns):
            starts.extend([len(ids) + offset for offset in offsets] for offsets, _ in turn.media)
            ids.extend(turn.tokens)
            if self._limits.train_on == "all":
                learned.extend([turn.weight] * len(turn.tokens))
            elif self._limits.train_on == "last_answer" and index != len(turns) - 1:
                learned.extend([0.0] * len(turn.tokens))
            else:
                learned.extend(turn.weight if answer else 0.0 for answer in turn.learned)
        if prompt:
            ids.extend(self._chat.answer_header(sample.messages))
        else:
            newline = self._chat.encode_text("\n")
            if tuple(ids[-len(newline) :]) == newline:
                del ids[-len(newline) :]  # after the last turn: nothing attends to it and no answer contains it
        tokens = np.array(ids, np.int32)
        count = len(tokens)
        visuals = visuals[: len(starts)]
        visual_index = np.full(count, -1, np.int32)
        base = 0
        spans = []
        for parts, item in zip(starts, visuals, strict=True):
            indexes = np.split(base + item.layout.token_index, len(parts))
            for start, index in zip(parts, indexes, strict=True):
                visual_index[start : start + len(index)] = index
            base += item.layout.tokens
            frames, height, width = item.layout.grid
            spans += [(start, (frames // len(parts), height, width), item.seconds) for start in parts]
        targets = np.zeros(count, np.int32)
        weights = np.zeros(count, np.float32)
        if not prompt and count > 1:
            targets[:-1] = tokens[1:]
            weights[:-1] = np.array(learned[1:count], np.float32) * (visual_index[1:] < 0)
            if not weights.any():
                raise SampleError("nothing_to_learn", "no token of the sample is learned")
        positions = rotary_positions(
            count,
            spans,
            merge=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
            mrope=text.rope == "mrope",
        )
        layouts = [item.layout for item in visuals]
        return Example(
            id=sample.id,
            origin=sample.origin,
            tokens=tokens,
            targets=targets,
            loss_weights=weights,
            positions=positions,
            visual_index=visual_index,
            visuals=tuple(visuals),
            patch_positions=_joined([layout.patch_positions for layout in layouts], (0, 2)),
            image_lengths=_joined([layout.image_lengths for layout in layouts], (0,)),
            window_lengths=_joined([layout.window_lengths for layout in layouts], (0,)),
            truncated=truncated,
            shrunk=sum(item.shrunk for item in visuals),
            task=sample.task,
            answers=sample.answers,
        )


def _joined(arrays: list[Any], empty: tuple[int, ...]) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.zeros(empty, np.int32)


def encode_sample(sample: Sample, model: ModelConfig, tokenizer: TextTokenizer, limits: EncodeLimits) -> Example:
    """Encode one sample for training. For many samples keep one `ExampleEncoder`, which builds its tables once."""
    return ExampleEncoder(model, tokenizer, limits).encode(sample)


def encode_prompt(
    messages: Sequence[Message],
    image_media: Sequence[Media] = (),
    video_media: Sequence[Media] = (),
    *,
    model: ModelConfig,
    tokenizer: TextTokenizer,
    limits: EncodeLimits,
    id: str = "prompt",
) -> Example:
    """Encode one conversation for inference; see `ExampleEncoder.encode_prompt`."""
    return ExampleEncoder(model, tokenizer, limits).encode_prompt(messages, image_media, video_media, id=id)
