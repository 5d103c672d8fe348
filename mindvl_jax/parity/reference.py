"""Reference models: the family's own, or transformers' class of the folder's model_type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from mindvl_jax.weights.errors import WeightsError, read_json
from mindvl_jax.weights.mapping import mapping_of, read_config


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The reference model of a folder, in evaluation mode, with eager attention.

    Raises:
      WeightsError: a model_type that neither its family nor transformers has a reference for.
    """
    mapping, content = mapping_of(read_config(folder)), read_json(folder / "config.json")
    model = mapping.reference(folder, content, dtype) if mapping.reference is not None else None
    if model is None:
        kind = mapping.model_types[content["model_type"]]
        if not kind.in_transformers:
            raise WeightsError(f"{folder}: there is no reference for {kind.label} ({content['model_type']})")
        model = getattr(transformers, kind.architecture).from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
    return model.eval()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()
