"""Names of weights (RUN:STEP, RUN:ema ..), and the files beside them that define token ids."""

from __future__ import annotations

from pathlib import Path

from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_json

ID_TABLE = "mindvl_id_table.json"
"""Compact vocabulary of an exported model, beside the full tokenizer.json."""
EMA = ":ema"
"""Ends the name of a run whose moving average is meant."""
BEST = ":best"
"""Ends the name of a run whose checkpoint with the lowest validation loss is meant (`checkpoint.keep_best`)."""
BEST_FILE = "best.json"
"""In a run folder: that step."""


def is_run(folder: Path) -> bool:
    """Whether a folder is one of our runs or checkpoints rather than a Hugging Face folder."""
    return not (folder / "config.json").is_file() and (
        (folder / "checkpoints").is_dir() or (folder / "params").exists() or (folder / "_CHECKPOINT_METADATA").exists()
    )


def named_folder(name: str | Path) -> tuple[Path, bool]:
    """(folder, whether its moving average is meant) of `DIR`, `DIR:ema`, or `DIR:best`, which is a checkpoint's folder.

    Raises:
      UserError: `DIR:best` of a run that keeps no best checkpoint.
    """
    text = str(name)
    if not text.endswith(BEST):
        return Path(text.removesuffix(EMA)).expanduser(), text.endswith(EMA)
    run = run_folder(name)
    try:
        best = read_json(run / BEST_FILE, None)
        folder = None if best is None else run / "checkpoints" / str(int(best["step"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{run / BEST_FILE} is damaged ({error}); name a checkpoint, such as {run}/checkpoints/STEP"
        ) from None
    if folder is None or not folder.is_dir():
        raise UserError(
            f"{text}: {run} has no best checkpoint; train with `validation` and checkpoint.keep_best, or leave out "
            f"{BEST}"
        )
    return folder, False


def run_folder(name: str | Path) -> Path:
    """Return the folder that a name is of, without `:ema` or `:best`."""
    return Path(str(name).removesuffix(EMA).removesuffix(BEST)).expanduser()


def variant(name: str | Path) -> str:
    """Return `-ema` or `-best` for a name that ends so, else an empty text: what its results are filed under."""
    return next((ending.replace(":", "-") for ending in (EMA, BEST) if str(name).endswith(ending)), "")
