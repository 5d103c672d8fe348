"""The compact vocabulary that a run learns, kept in its folder: data that are built anew may bring another table of the same name,
under which the run's weights would read and write other words without an error."""

from __future__ import annotations

import json
from pathlib import Path

from mindvl_jax.config import TokenizerConfig
from mindvl_jax.data.tokenizer import read_id_table
from mindvl_jax.errors import UserError

KEPT = "id_table.json"


def keep(run_dir: Path, config: TokenizerConfig, *, resumed: bool, write: bool) -> None:
    """Copies the table into the run's folder. Nothing to do for a whole vocabulary.

    Args:
      resumed: the run goes on from a checkpoint, so the table must be the one it began with.
      write: whether this process writes the run's files; the check is everybody's.

    Raises:
      UserError: no readable table, or another one than the run began with.
    """
    if config.id_table is None:
        return
    table, kept = read_id_table(config.id_table), run_dir / KEPT
    if resumed and kept.is_file() and read_id_table(kept) != table:
        raise UserError(f"{config.id_table} is not the vocabulary that this run began with ({kept}): its tokens would mean other words. "
                        f"Set tokenizer.id_table={kept}, or begin a new run in another run.dir")
    if write:
        kept.write_text(json.dumps(table) + "\n", encoding="utf-8")


def of_run(checkpoints: Path, config: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer settings of the run whose folder of checkpoints is given, with the table that it kept."""
    kept = checkpoints.parent / KEPT
    return config.model_copy(update=dict(id_table=str(kept))) if config.id_table is not None and kept.is_file() else config
