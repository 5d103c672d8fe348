"""From encoded bytes and text to packed batches, on one core."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator

import numpy as np

from benchmarks.measure import Comparison, Side
from benchmarks.registry import Settings, case


@case("images")
def images_case(settings: Settings) -> Iterator[Comparison]:
    """Decode, resize, patchify: images a second of one core beside transformers' Pillow processor."""
    from benchmarks import images

    for name, size, kind, content, resample in images.CASES[-1:] if settings.dry else images.CASES:
        ours, theirs = images.sides(resample)
        data = images.picture(size, kind, content)
        made = ours(data), theirs(data)
        if made[0] != made[1]:
            raise AssertionError(f"{name}: ours makes {made[0]} patches, theirs {made[1]}")
        sides = [
            Side("ours", functools.partial(ours, data), {"pictures": 1.0}),
            Side("transformers, Pillow", functools.partial(theirs, data), {"pictures": 1.0}),
        ]
        yield Comparison(
            name,
            sides,
            unit="pictures",
            checked={"patches": float(made[0])},
            bars={"transformers, Pillow": 2.0},
            clock="cpu",
        )


WORDS = [
    "the",
    "a",
    "small",
    "red",
    "large",
    "picture",
    "shows",
    "what",
    "where",
    "of",
    "two",
    "people",
    "near",
    "old",
    "bicycle",
    "street",
    "and",
    "says",
    "number",
    "reading",
    "table",
    "in",
    "chart",
    "value",
    "left",
    "corner",
    "is",
    "are",
    "who",
]


@case("loader")
def loader_case(settings: Settings) -> Iterator[Comparison]:
    """Read, resize, patchify, tokenize and pack samples, against transformers' processor with padding."""
    from PIL import Image
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mindvl_jax.config import families
    from mindvl_jax.config.schema import TokenizerConfig
    from mindvl_jax.data.packing.rows import plan_rows
    from mindvl_jax.data.sample import Media, Message, Sample
    from mindvl_jax.data.text.tokenizer import load_tokenizer
    from mindvl_jax.models.vision_language.collate import budgets_of, collate, shape_for, size_of
    from mindvl_jax.models.vision_language.example import EncodeLimits, ExampleEncoder
    from mindvl_jax.models.vision_language.work import WorkModel

    model = families.preset("mindvl-8b")
    tokenizer = load_tokenizer(TokenizerConfig(path="qwen3"))
    count, side = (3, (56, 84)) if settings.dry else (24, (480, 640))
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        question, answer = (
            " ".join(rng.choice(WORDS, int(size))) for size in np.clip(rng.lognormal(4.2, 0.7, 2), 4, 600)
        )
        samples.append(
            Sample(
                str(number),
                (Message("user", f"<image>{question}"), Message("assistant", answer)),
                (Media(data=_photograph(rng, side)),),
            )
        )
    pixels = dict(min_pixels=3136, max_pixels=512 * 512)
    encoder = ExampleEncoder(model, tokenizer, EncodeLimits(**pixels))
    work_model = WorkModel.of(model)

    def ours():
        examples = [encoder.encode(sample) for sample in samples]
        sizes = np.array([size_of(example) for example in examples], np.int64)
        rows = max(1, int(np.ceil(sizes[:, 0].sum() / 4096)))
        patches = int(4 * np.ceil(1.1 * sizes[:, 1].sum() / rows / 4))
        shape = shape_for(
            model.vision, rows=rows + 1, tokens=4096, patches=patches, samples=64, min_pixels=pixels["min_pixels"]
        )
        loads = np.array([work_model.loads(example.length, example.image_lengths) for example in examples])
        plan = plan_rows(sizes, loads, budgets_of(shape), shape.rows)
        read = [example.with_pixels(model.vision, "bicubic") for example in examples]
        return collate(
            [[read[index] for index in row] for row in plan], shape, pad_id=tokenizer.pad_id, vision=model.vision
        )

    published = Qwen2VLImageProcessorPil(**pixels)
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer.file), pad_token="<|endoftext|>")

    def theirs():
        # The steps of transformers' processor for this family: pixels first, then each mark becomes as many
        # placeholders as it has tokens.
        visual = published([Image.open(io.BytesIO(sample.images[0].data)) for sample in samples], return_tensors="np")
        texts = []
        for sample, grid in zip(samples, visual["image_grid_thw"], strict=True):
            places = "<|vision_start|>" + "<|image_pad|>" * (int(np.prod(grid)) // 4) + "<|vision_end|>"
            turns = [
                f"<|im_start|>{message.role}\n{message.content.replace('<image>', places)}<|im_end|>\n"
                for message in sample.messages
            ]
            texts.append("".join(["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", *turns]))
        return text_tokenizer(texts, padding=True, return_tensors="np"), visual

    batch, (encoded, visual) = ours(), theirs()
    mine, their = (
        _ids_of(batch, samples),
        [row[mask > 0] for row, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)],
    )
    pictures = int((batch.batch.patch_segment_ids > 0).sum()), len(visual["pixel_values"])
    if pictures[0] != pictures[1]:
        raise AssertionError(f"ours makes {pictures[0]} patches of the samples, transformers {pictures[1]}")
    for sample, a, b in zip(samples, mine, their, strict=True):
        # Ids after the system turn, which the templates word differently, must be equal; ours drops the last newline.
        first = int(np.flatnonzero(np.asarray(b) == model.vision_start_token_id)[0])
        tail = list(b[first:-1])
        if list(a[-len(tail) :]) != tail:
            raise AssertionError(
                f"sample {sample.id}: our ids after the system turn are not those of transformers' tokenizer"
            )
    work = {"samples": float(count), "tokens": float(sum(map(len, mine))), "patches": float(pictures[0])}
    sides = [
        Side("ours: packed, uint8 patches in window order", ours, work),
        Side("transformers: padded, float32 patches", theirs, work),
    ]
    yield Comparison(
        "LLaVA-like conversations",
        sides,
        unit="samples",
        checked={"patches": float(pictures[0])},
        bars={sides[1].name: 2.0},
        clock="cpu",
        note=f"{count} conversations with one JPEG of {side[1]} x {side[0]} each; processor time of one core.",
    )


def _ids_of(packed, samples) -> list[np.ndarray]:
    """Tokens of each sample, in the order of `samples`."""
    found = {}
    for row, names in enumerate(packed.sample_ids):
        for number, name in enumerate(names, 1):
            found[name] = packed.batch.tokens[row][packed.batch.segment_ids[row] == number]
    return [found[sample.id] for sample in samples]


def _photograph(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (max(1, size[0] // 16), max(1, size[1] // 16), 3), np.uint8))
    file = io.BytesIO()
    coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
