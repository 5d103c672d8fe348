"""Start a run: from scratch, or exactly from its newest complete checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mindvl_jax.checkpoints import checkpoint
from mindvl_jax.checkpoints.checkpoint import CheckpointReader, DamagedCheckpoint, Progress
from mindvl_jax.checkpoints.names import named_folder
from mindvl_jax.config import families
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline, Params
from mindvl_jax.models.vision_language.processor import cached_tokenizer
from mindvl_jax.training import metrics
from mindvl_jax.training.muon import optimizer_init
from mindvl_jax.training.state import TrainState, abstract_state, optimizer_arrays, state_of

# May change between a checkpoint and its continuation silently: they do not change what is learned.
SILENT = (
    "run",
    "mesh",
    "distributed",
    "checkpoint",
    "validation",
    "logging",
    "evaluation",
    "backend",
    "bridge",
    "model.remat",
    "data.workers",
    "data.prefetch",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Start of a run.

    Attributes:
      state: restored, or None to start anew. phase, phase_step, step: where it stands.
      ema: the moving average to go on with; None when none was saved.
      loader: the loader's state to restore, None at the border of a phase.
      notes: lines that the user should read.
    """

    state: TrainState | None = None
    ema: Params | None = None
    step: int = 0
    phase: int = 0
    phase_step: int = 0
    loader: dict | None = None
    totals: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan(config: Config, outline: Outline, mesh: Mesh, parts: Sequence[tuple[list[str], list[str]]]) -> Plan:
    """Decides by `run.resume`: `auto`, `never`, or the path of a checkpoint or run folder.

    Raises:
      UserError: `never` and the folder holds a run; nothing can be restored; or the checkpoint belongs to another model
        or plan.
    """
    run_dir = Path(config.run.dir)
    own = checkpoint.has_checkpoints(run_dir)
    recorded = (run_dir / metrics.FILE).exists() and (run_dir / metrics.FILE).stat().st_size > 0
    if config.run.resume == "never":
        if own or recorded:
            raise UserError(
                f"run.resume=never, but run.dir={run_dir} already holds a run; choose another folder, delete this one, "
                "or use run.resume=auto to continue it"
            )
        return Plan()
    if config.run.resume == "auto":
        if own:
            return _restore(config, outline, mesh, parts, run_dir)
        notes = (f"{run_dir} has metrics but no checkpoint: starting anew",) if recorded else ()
        return Plan(notes=notes)
    source, average = named_folder(config.run.resume)
    if average:
        raise UserError(
            f"run.resume={config.run.resume}: a moving average has no optimizer state to go on with; resume "
            f"{source}, or start a new run from the average with run.init_from"
        )
    folder, _ = checkpoint.locate(source)
    if own and folder.resolve() != (run_dir / checkpoint.FOLDER).resolve():
        raise UserError(
            f"run.resume={source} would be continued in run.dir={run_dir}, which holds another run; choose "
            "an empty run.dir"
        )
    return _restore(config, outline, mesh, parts, source)


def _restore(
    config: Config, outline: Outline, mesh: Mesh, parts: Sequence[tuple[list[str], list[str]]], source: Path
) -> Plan:
    damaged: list[tuple[int, DamagedCheckpoint]] = []
    found: tuple[Progress, TrainState, dict, Params | None] | None = None
    with CheckpointReader(source) as reader:
        folder = reader.folder
        for step in reader.candidates:
            try:
                progress, prints, plain = reader.progress(step)
                _require_same_run(config, progress, plain, parts, folder / str(step))
                target = abstract_state(
                    outline,
                    *parts[progress.phase],
                    mesh,
                    init=optimizer_init(config.training.optimizer),
                    spread=config.training.optimizer.shard_over_data,
                )
                state = state_of(target, *reader.state(step, target.params, optimizer_arrays(target), prints))
                ema = (
                    reader.ema(step, checkpoint.abstract_params(outline, mesh), prints)
                    if config.training.ema_decay is not None
                    else None
                )
                found = progress, state, plain, ema
                break
            except DamagedCheckpoint as error:
                damaged.append((step, error))
    if found is None:
        raise UserError(
            f"{folder}: no checkpoint can be read whole; delete the folder to start anew, or restore it from "
            "a copy:\n  " + "\n  ".join(str(error) for _, error in damaged)
        )
    progress, state, plain, ema = found
    notes = [f"damaged checkpoint passed over: {error}" for _, error in damaged]
    inside = folder.resolve() == (Path(config.run.dir) / checkpoint.FOLDER).resolve()
    if inside:
        notes += _set_aside(folder, [step for step, _ in damaged], newest=progress.step, run_dir=Path(config.run.dir))
    notes.append(f"continuing {folder / str(progress.step)}: phase {progress.phase_name}, step {progress.step}")
    notes += [f"changed since that checkpoint: {line}" for line in _changes(config, plain)]
    return Plan(
        state=state,
        ema=ema,
        step=progress.step,
        phase=progress.phase,
        phase_step=progress.phase_step,
        loader=progress.loader,
        totals=progress.totals,
        notes=tuple(notes),
    )


def _set_aside(folder: Path, damaged: Sequence[int], newest: int, run_dir: Path) -> list[str]:
    """Move damaged checkpoints out of the way of those that the run will save again, and keep them for a look."""
    if jax.process_index() != 0:
        return []
    notes = []
    for step in damaged:
        target = run_dir / "damaged" / str(step)
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(folder / str(step), target)
        notes.append(f"moved to {target}")
    # A run that was told to continue from an older checkpoint of its own walks the same steps again.
    for child in folder.iterdir():
        if child.name.isdigit() and int(child.name) > newest:
            shutil.rmtree(child)
            notes.append(f"removed {child}: it lies beyond the checkpoint that is continued")
    return notes


def _require_same_model(config: Config, plain: dict, where: Path) -> None:
    """Raise UserError when model, adapters or optimizer differ from the checkpoint's."""
    ours, theirs = config.model.model_dump(mode="json"), {"family": families.DEFAULT, **plain["model"]}
    free = {"remat", "compute_dtype", "preset"}
    other = [line for line in _differences(theirs, ours, "model") if line.split(":")[0].split(".")[1] not in free]
    if other:
        raise UserError(f"{where} holds another model than the configuration:\n  " + "\n  ".join(other))
    mine = None if config.adapters is None else config.adapters.model_dump(mode="json")
    other = [
        line
        for line in _differences(plain.get("adapters"), mine, "adapters")
        if not line.startswith("adapters.init_from:")
    ]
    if other:
        raise UserError(f"{where} holds other adapters than the configuration:\n  " + "\n  ".join(other))
    own, stored = config.training.optimizer, {"name": "adamw", **plain["training"]["optimizer"]}
    if own.name != stored["name"] or (own.name == "muon" and list(own.muon) != stored["muon"]):
        raise UserError(
            f"training.optimizer differs from that of {where} ({stored['name']}): its state cannot be "
            "continued; start a new run with run.init_from"
        )


def _require_same_past(config: Config, progress: Progress, plain: dict, where: Path) -> None:
    """Raise UserError when finished phases changed: it would have no effect, or renumber the steps."""
    phases = config.training.phases
    done = [
        line
        for index in range(min(progress.phase, len(plain["training"]["phases"])))
        for line in _differences(
            plain["training"]["phases"][index], phases[index].model_dump(mode="json"), f"training.phases[{index}]"
        )
    ]
    if done:
        raise UserError(
            f"{where} is past phases that the configuration changes:\n  "
            + "\n  ".join(done[:10])
            + "\nSet them back, or start a new run with run.init_from"
        )


def _require_same_run(
    config: Config, progress: Progress, plain: dict, parts: Sequence[tuple[list[str], list[str]]], where: Path
) -> None:
    """Raise UserError when the checkpoint cannot be continued under this configuration."""
    _require_same_model(config, plain, where)
    phases = config.training.phases
    if progress.phase >= len(phases):
        raise UserError(
            f"{where} is in phase {progress.phase + 1} ({progress.phase_name}), but the configuration has "
            f"{len(phases)} phases"
        )
    if config.run.seed != plain["run"]["seed"]:
        raise UserError(
            f"run.seed is {config.run.seed}, but {where} was begun with {plain['run']['seed']}: the order of "
            "the data would be another one; set it back, or start a new run with run.init_from"
        )
    phase = phases[progress.phase]
    if phase.name != progress.phase_name:
        raise UserError(
            f"{where} is in phase {progress.phase_name!r}, which is {phase.name!r} in the configuration; "
            "phases before it must stay as they were"
        )
    _require_same_past(config, progress, plain, where)
    if set(parts[progress.phase][0]) != set(progress.trained):
        changed = sorted(set(parts[progress.phase][0]) ^ set(progress.trained))
        raise UserError(
            f"training.phases[{progress.phase}].train selects other parts than {where} trained "
            f"({len(changed)} parameters differ, such as {changed[0]}); "
            "start a new run with run.init_from instead"
        )
    if phase.steps < progress.phase_step:
        raise UserError(
            f"training.phases[{progress.phase}].steps={phase.steps}, but {where} has done "
            f"{progress.phase_step} steps of it already"
        )
    if progress.phase_step and phase.keep_optimizer != plain["training"]["phases"][progress.phase]["keep_optimizer"]:
        raise UserError(
            f"training.phases[{progress.phase}].keep_optimizer has changed, but the phase has begun in "
            f"{where}; set it back"
        )
    vocabulary = progress.loader and progress.loader["tokenizer"]
    if vocabulary and vocabulary != cached_tokenizer(config.tokenizer).digest:
        raise UserError(
            f"{where} was trained with another tokenizer (vocabulary, id table or chat template): its tokens "
            "would mean other words; set tokenizer back, or start a new run with run.init_from"
        )


def _differences(before: Any, now: Any, path: str) -> list[str]:
    """`path: before -> now` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for key in {**before, **now}
            for line in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [
            line
            for i, (a, b) in enumerate(zip(before, now, strict=True))
            for line in _differences(a, b, f"{path}[{i}]")
        ]
    return [] if before == now else [f"{path}: {before} -> {now}"]


def _changes(config: Config, plain: dict) -> list[str]:
    before = {**plain, "model": {"family": families.DEFAULT, **plain["model"]}}
    lines = _differences(before, config.model_dump(mode="json"), "")
    silent = tuple(name + end for name in SILENT for end in (":", "."))
    return [line for line in lines if not line.startswith(silent)]
