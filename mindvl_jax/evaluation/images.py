"""Images of a few samples, kept beside the predictions for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation.items import Item
from mindvl_jax.inference.prompts import read_picture

SHOWN = 12  # samples a task


def keep_pictures(items: list[Item], rows: list[dict[str, Any]], folder: Path, most: int = SHOWN) -> None:
    """Save the images of at most `most` samples, right and wrong ones, below `folder` and note them in their rows as
    `shown`.
    """
    generator = np.random.default_rng(1)
    order = generator.permutation(len(rows))
    right = [index for index in order if rows[index]["score"] == 1]
    wrong = [index for index in order if rows[index]["score"] < 1]
    half = max(most // 2, most - len(wrong))
    shown = right[:half]
    for index in shown + wrong[: most - len(shown)]:
        names = []
        for number, media in enumerate(items[index].images):
            name = f"{index:06d}-{number}.png"
            try:
                picture = read_picture(media)
            except UserError:  # its row says why it could not be read
                continue
            folder.mkdir(parents=True, exist_ok=True)
            picture.thumbnail((512, 512))
            picture.save(folder / name)
            names.append(f"{folder.name}/{name}")
        rows[index]["shown"] = names
