"""The configuration that a folder of weights brings with it: model sizes and tokenizer.

Does not load jax or any weight.
"""

from __future__ import annotations

from typing import Any

from mindvl_jax.checkpoints.names import run_folder
from mindvl_jax.config import loader
from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.weights.mapping import read_config

_OWN = ("remat", "compute_dtype", "param_dtype", "matmul_precision", "attention", "preset")
"""Keys of the model section that say how a run computes. A folder does not decide them."""


def described(folder: str) -> dict[str, Any]:
    """Return the sections `model` and, when the folder has one, `tokenizer` of a run or a Hugging Face folder.

    Raises:
      UserError: no such folder, not a vision-language model, or settings that are not built.
    """
    path = run_folder(folder)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; expected one of our runs or a Hugging Face folder (download one with "
            f"`hf download NAME --local-dir {path.name}`)"
        )
    run = next(
        (place / "config.yaml" for place in (path, *path.parents[:2]) if (place / "config.yaml").is_file()), None
    )
    if not (path / "config.json").is_file() and run is not None:
        config = loader.load(run)
        sections: dict[str, Any] = {
            "model": _sizes(config.model),
            "tokenizer": config.tokenizer.model_dump(mode="json"),
        }
        if config.tokenizer.id_table is not None and (run.parent / "id_table.json").is_file():
            sections["tokenizer"]["id_table"] = str(run.parent / "id_table.json")
        return sections
    model = read_config(path)
    if not hasattr(model, "vision"):
        raise UserError(
            f"{path} holds a language model alone; join it with a vision tower first: mindvl export --vision "
            f"DIR --language {path} --out DIR"
        )
    sections = {"model": _sizes(model)}
    if (path / "tokenizer.json").is_file():
        table = path / "mindvl_id_table.json"
        sections["tokenizer"] = {"path": str(path)} | ({"id_table": str(table)} if table.is_file() else {})
    return sections


def _sizes(model: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in model.model_dump(mode="json").items() if key not in _OWN}
