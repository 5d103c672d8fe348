"""How people name weights, and the files beside them that say what their token ids mean."""

from __future__ import annotations

from pathlib import Path

EMA = ":ema"
ID_TABLE = "mindvl_id_table.json"
"""Compact vocabulary of an exported model, beside the full tokenizer.json."""


def named_folder(name: str | Path) -> tuple[Path, bool]:
    """(folder, whether its moving average is meant) of `DIR` or `DIR:ema`."""
    text = str(name)
    return Path(text.removesuffix(EMA)).expanduser(), text.endswith(EMA)
