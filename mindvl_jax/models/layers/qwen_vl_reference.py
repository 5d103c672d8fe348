"""transformers' own position rule of the Qwen-VL line, for comparisons.

Modules named `*reference` alone import torch in models/.
"""

from __future__ import annotations

import torch


def rope_index(model, input_ids, mm_token_type_ids, media) -> torch.Tensor:
    """(3, B, T) positions by transformers' own rule."""
    indexer = model.model if hasattr(model.model, "get_rope_index") else model
    return indexer.get_rope_index(
        input_ids,
        mm_token_type_ids=mm_token_type_ids,
        image_grid_thw=media.get("image_grid_thw"),
        video_grid_thw=media.get("video_grid_thw"),
        second_per_grid_ts=media.get("second_per_grid_ts"),
        attention_mask=torch.ones_like(input_ids),
    )[0]
