"""Small configurations, images and samples for the tests of the data room."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindvl_jax.config.schema import Config, TokenizerConfig
from mindvl_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from mindvl_jax.models.mindvl.config import MindVLConfig

VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
TEXT = {
    "family": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rope": "mrope",
    "mrope_section": [2, 3, 3],
}
MODEL: dict[str, Any] = {
    "vision": VISION,
    "text": TEXT,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerConfig(path="qwen3"))


def model_config(**text: Any) -> MindVLConfig:
    return MindVLConfig.model_validate({**MODEL, "text": {**TEXT, **text}})


def picture(seed: int, height: int = 56, width: int = 56, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def record(index: int, *, words: int = 4, media: list[Any] | None = None) -> dict[str, Any]:
    """A sample of one exchange; with `media`, its placeholders come first."""
    media = media or []
    question = "<image>" * len(media) + f"What is shown in number {index}?"
    answer = " ".join(["seven", "small", "ships", "sail"][k % 4] for k in range(words)) + f" {index}"
    return {
        "id": f"s{index}",
        "images": media,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def write_mllm(folder: Path, count: int, *, seed: int = 0, name: str = "data.json") -> Path:
    """A MLLM JSON file with PNG files beside it; every fourth sample is text only."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(count):
        media = []
        if index % 4:
            file = folder / f"{name}-{index}.png"
            file.write_bytes(encoded(picture(index, int(rng.integers(20, 120)), int(rng.integers(20, 120)))))
            media = [file.name]
        records.append(record(index, words=int(rng.integers(1, 30)), media=media))
    path = folder / name
    path.write_text(json.dumps(records))
    return path


def config(tmp_path: Path, source: Path | dict[str, Any], **changes: Any) -> Config:
    """A whole configuration over one source (`a`) or several ({name: path}).

    `data__x`, `phase__x` and `run__x` set single keys.
    """
    sources = source if isinstance(source, dict) else {"a": {"path": str(source)}}

    def pick(prefix):
        return {key.removeprefix(prefix): value for key, value in changes.items() if key.startswith(prefix)}

    phase = {
        "name": "only",
        "steps": 10,
        "mixture": [{"source": name} for name in sources],
        "rows": 4,
        "sequence_length": 192,
        "patches_per_row": 256,
        "min_pixels": 784,
        "max_pixels": 28224,
        "learning_rate": 1e-3,
        **pick("phase__"),
    }
    return Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "run"), **pick("run__")},
            "model": MODEL,
            "tokenizer": {"path": "qwen3"},
            "data": {"sources": sources, "packing_buffer": 32, "prefetch": 2, **pick("data__")},
            "training": {"phases": [phase]},
        }
    )
