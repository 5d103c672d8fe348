"""The compact vocabulary that a run learns, kept in its folder: data that are built anew may bring another table of the
same name, under which the run's weights would read and write other words without an error.
"""

from __future__ import annotations

import json
from pathlib import Path

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.checkpoints.names import ID_TABLE, named_folder
from mindvl_jax.config.schema import RunConfig, TokenizerConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data.text.tokenizer import read_id_table

KEPT = "id_table.json"


def keep(run: RunConfig, config: TokenizerConfig, *, resumed: bool, write: bool) -> None:
    """Copy the table into the run's folder. Nothing to do for a whole vocabulary.

    Args:
      resumed: the run goes on from a checkpoint, its own or the one that `run.resume` names. Weights that bring no
        table of their own (a published model, a run of before tables were kept) are taken as they are.
      write: whether this process writes the run's files; the check is everybody's.

    Raises:
      UserError: no readable table, or another one than that of the weights which the run goes on from.
    """
    if config.id_table is None:
        return
    table, own = read_id_table(config.id_table), Path(run.dir) / KEPT
    kept = own if resumed and run.resume in ("auto", "never") else _of(run.resume if resumed else run.init_from)
    if kept is not None and kept.is_file() and read_id_table(kept) != table:
        raise UserError(
            f"{config.id_table} is not the vocabulary of the weights that this run goes on from ({kept}): "
            "its tokens would "
            f"mean other words. Set tokenizer.id_table={kept}, or begin anew, from other weights, in another run.dir"
        )
    # Never rewritten by a run that goes on: other processes are reading it.
    if write and not (resumed and own.is_file()):
        written = own.with_suffix(".new")
        written.write_text(json.dumps(table) + "\n", encoding="utf-8")
        written.replace(own)


def _of(weights: str | None) -> Path | None:
    """Return the path of the id table of a run or exported model, or None."""
    if weights is None:
        return None
    folder, _ = named_folder(weights)
    try:
        return checkpoint.locate(folder)[0].parent / KEPT
    except UserError:
        return folder / ID_TABLE  # a Hugging Face folder, or nothing: opening it says so


def of_run(checkpoints: Path, config: TokenizerConfig) -> TokenizerConfig:
    """The tokenizer settings of the run whose folder of checkpoints is given, with the table that it kept."""
    kept = checkpoints.parent / KEPT
    return (
        config.model_copy(update=dict(id_table=str(kept))) if config.id_table is not None and kept.is_file() else config
    )
