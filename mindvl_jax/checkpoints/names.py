"""How people name weights, and the files beside them that say what their token ids mean."""

from __future__ import annotations

from pathlib import Path

ID_TABLE = "mindvl_id_table.json"
"""Compact vocabulary of an exported model, beside the full tokenizer.json."""
EMA = ":ema"
"""Ends the name of a run whose moving average is meant."""


def is_run(folder: Path) -> bool:
    """Whether a folder is one of our runs or checkpoints rather than a Hugging Face folder."""
    return not (folder / "config.json").is_file() and (
        (folder / "checkpoints").is_dir() or (folder / "params").exists() or (folder / "_CHECKPOINT_METADATA").exists()
    )


def named_folder(name: str | Path) -> tuple[Path, bool]:
    """(folder, whether its moving average is meant) of `DIR` or `DIR:ema`."""
    text = str(name)
    return Path(text.removesuffix(EMA)).expanduser(), text.endswith(EMA)
