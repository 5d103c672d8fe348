"""Checkpoints by Orbax: asynchronous, atomic, the newest N kept, restored onto any mesh.

A checkpoint is `checkpoints/<step>/` with four items: `params` (nested by path), `optimizer` (optimizer state and
counters), `progress` (JSON: phase, loader state, fingerprints) and `config` (JSON: the resolved configuration); a run
with `training.ema_decay` adds `ema`. Every array carries a fingerprint of its bits, and progress and config a seal over
both, so a checkpoint that reads without an error but with other values counts as damaged too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh

from mindvl_jax.config.schema import CheckpointConfig, Config, MeshConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Outline, Params
from mindvl_jax.models.outline import outline_of
from mindvl_jax.parallel.mesh import make_mesh
from mindvl_jax.parallel.rules import parameter_shardings

FOLDER = "checkpoints"
log = logging.getLogger(__name__)


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be read whole."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run, on the host.

    Attributes:
      step: optimizer steps done over all phases. phase: index of the phase that the state belongs to. phase_name: its
        name.
      phase_step: steps done in it.
      trained: paths of the parameters that it trains.
      loader: the loader's state after the last batch of `step`, at the end of a phase too: the phase may be made
        longer. None before the first batch of a phase.
      totals: running counts over the run (tokens, samples, seconds).
    """

    step: int
    phase: int
    phase_name: str
    phase_step: int
    trained: tuple[str, ...]
    loader: Any
    totals: Mapping[str, float]


# --- fingerprints ----------------------------------------------------------------------------------------------------


@jax.jit
def _fingerprints(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        width = jnp.dtype(x.dtype).itemsize
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width]).astype(jnp.uint32)
        # An odd weight for each element: swapped values change the sum too. Integer sums wrap and do not depend on the
        # mesh.
        place = jnp.zeros(bits.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(bits.ndim)):
            place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= bits.shape[axis]
        return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

    return {path: one(x) for path, x in arrays.items()}


def fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """32 bits a parameter that change with (nearly) every change of its values; the same on every mesh."""
    return {path: int(value) for path, value in jax.device_get(_fingerprints(dict(arrays))).items()}


def _seal(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Digest of what the host knows of a run: step, phase, data position, waiting samples, totals, fingerprints,
    configuration.
    """
    return hashlib.blake2b(
        json.dumps([record, config], sort_keys=True, allow_nan=True).encode(), digest_size=16
    ).hexdigest()


# --- layout ----------------------------------------------------------------------------------------------------------


def _nest(params: Mapping[str, Any]) -> dict:
    return traverse_util.unflatten_dict(dict(params), sep="/")


def _flat(tree: dict) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _fingerprinted(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of the optimizer item that carry a fingerprint: all but scalar counters."""
    return {name: value for name, value in optimizer.items() if value.ndim}


def _ema_arrays(ema: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {f"ema/{path}": value for path, value in ema.items()}


def locate(path: str | Path) -> tuple[Path, int | None]:
    """(folder of checkpoints, step or None for the newest) of a run folder, its checkpoints folder, or one checkpoint.

    Raises:
      UserError: nothing of the kind is there.
    """
    path = Path(path)
    if path.name.isdigit() and (path / "progress").is_dir():
        return path.parent, int(path.name)
    for folder in (path / FOLDER, path):
        if folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir()):
            return folder, None
    found = (
        "it does not exist"
        if not path.exists()
        else "it holds " + (", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing")
    )
    raise UserError(f"{path}: expected a run folder or one checkpoint (RUN/{FOLDER}/STEP), but {found}")


def has_checkpoints(run_dir: str | Path) -> bool:
    folder = Path(run_dir) / FOLDER
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())


# --- writing ---------------------------------------------------------------------------------------------------------


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
)


def _tells_of(error: BaseException | None, codes: tuple[int, ...]) -> bool:
    """Whether a failed write tells of a full disk, a quota or a limit of file sizes.

    TensorStore says so in its text alone.
    """
    while error is not None:
        if getattr(error, "errno", None) in codes or any(f"os_error_code='{code}'" in str(error) for code in codes):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def room_in(run_dir: str | Path) -> Iterator[None]:
    """Turn what a full, read-only or failing disk raises inside, and memory that runs out, into a UserError that says
    what is safe. A save in the background that failed is heard of at a later call.
    """
    try:
        yield
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][-200:]
        if _tells_of(error, _NO_ROOM):
            raise UserError(
                f"run.dir={run_dir}: no room left to write ({said}). Make room (checkpoint.keep says how "
                "many checkpoints stay) "
                f"and start the same command again: {_safe(run_dir)}"
            ) from error
        if isinstance(error, UserError):
            raise
        if _tells_of(error, _UNWRITABLE):
            raise UserError(
                f"run.dir={run_dir}: a file cannot be read or written ({said}). Put it right and start the "
                f"same command again: {_safe(run_dir)}"
            ) from error
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
            raise UserError(
                f"out of memory ({said}); `mindvl plan` says what the configuration needs. "
                f"{_safe(run_dir).capitalize()}"
            ) from error
        raise


def _safe(run_dir: str | Path) -> str:
    folder = Path(run_dir) / FOLDER
    try:
        whole = sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())
    except OSError:
        whole = []
    return (
        f"the checkpoint of step {whole[-1]} is whole, and run.resume: auto continues from it"
        if whole
        else "there is no checkpoint yet, so the run will start anew"
    )


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax preservation policy: the newest `count` checkpoints, and the best one wherever it stands."""

    count: int
    best: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        first = len(checkpoints) - self.count
        return [number >= first or info.step == self.best() for number, info in enumerate(checkpoints)]


class CheckpointWriter:
    """Save into `run_dir/checkpoints`, in the background when the config says so; use as a context manager.

    Attributes:
      best: step that is kept beside the newest ones; None keeps the newest alone.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig):
        self.best: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(config.keep, lambda: self.best),
            enable_async_checkpointing=config.asynchronous,
            cleanup_tmp_directories=True,
        )
        # Compression takes five times the processor time of everything else in the background, beside the steps on a
        # CPU, and saves 8 % of the disk.
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ("params", "optimizer", "ema")}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ("progress", "config")}
        self._manager = ocp.CheckpointManager(
            (Path(run_dir) / FOLDER).absolute(), options=options, item_handlers=handlers
        )

    def save(
        self,
        params: Mapping[str, jax.Array],
        optimizer: Mapping[str, jax.Array],
        progress: Progress,
        config: Config,
        ema: Mapping[str, jax.Array] | None = None,
    ) -> bool:
        """Copy the arrays, then write them; returns False when this step is saved already.

        The copy is complete on return: the caller may donate the arrays at once.

        Args:
          optimizer: optimizer state and counters by name, such as `mu/<path>` and `step`. ema: the moving average by
            path.
        """
        if progress.step in self._manager.all_steps():
            return False
        record = dataclasses.asdict(progress)
        record["fingerprints"] = {
            **fingerprints(params),
            **fingerprints(_fingerprinted(optimizer)),
            **fingerprints(_ema_arrays(ema or {})),
        }
        plain = config.model_dump(mode="json")
        record["seal"] = _seal(record, plain)
        average = {} if ema is None else {"ema": ocp.args.PyTreeSave(_nest(ema))}
        return self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(_nest(params)),
                optimizer=ocp.args.PyTreeSave(_nest(optimizer)),
                progress=ocp.args.JsonSave(record),
                config=ocp.args.JsonSave(plain),
                **average,
            ),
            force=True,
        )

    def wait(self) -> None:
        """Return when everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error) -> None:
        self.close()


# --- reading ---------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """Read the checkpoints of one folder."""

    def __init__(self, path: str | Path):
        folder, step = locate(path)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(create=False))
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise UserError(
                f"{path}: this checkpoint is not complete; complete ones: {', '.join(map(str, steps)) or 'none'}"
            )
        self.candidates: tuple[int, ...] = tuple(steps) if step is None else (step,)

    def progress(self, step: int) -> tuple[Progress, dict[str, int], dict]:
        """(progress, fingerprints, config as plain data).

        Raises:
          DamagedCheckpoint: it cannot be read.
        """
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(progress=ocp.args.JsonRestore(), config=ocp.args.JsonRestore())
            )
            record = dict(restored["progress"])
            seal = record.pop("seal", None)
            if seal is None:
                self._allow_unsealed(step)
            elif seal != _seal(record, restored["config"]):
                raise ValueError("progress or config is not what was saved (its seal does not fit)")
            prints = record.pop("fingerprints")
            record["trained"] = tuple(record["trained"])
            return Progress(**record), prints, restored["config"]
        except Exception as error:  # Orbax, tensorstore and json each raise their own; all mean the same here.
            raise DamagedCheckpoint(f"{self.folder / str(step)}: {_first_line(error)}") from error

    def _allow_unsealed(self, step: int) -> None:
        """Checkpoints from before there were seals have none. Among sealed ones a seal was taken away.

        Raises:
          ValueError: another checkpoint of the folder has a seal.
        """
        for other in sorted(self._manager.all_steps()):
            if other != step and self._sealed(other):
                raise ValueError(
                    f"its seal was taken away (checkpoint {other} beside it has one), so its data position cannot be "
                    "trusted"
                )
        log.warning(
            "%s has no seal: it was written before there were seals, or the seal was taken away. Data position, "
            "counters and configuration cannot be checked",
            self.folder / str(step),
        )

    def _sealed(self, step: int) -> bool:
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]
        except Exception:  # a damaged one says nothing
            return False
        return isinstance(found, Mapping) and "seal" in found

    def state(
        self, step: int, params: Mapping[str, Any], optimizer: Mapping[str, Any], prints: Mapping[str, int]
    ) -> tuple[Params, dict[str, jax.Array]]:
        """(parameters, optimizer state and counters by name), placed as the `jax.ShapeDtypeStruct`s given say.

        Raises:
          DamagedCheckpoint: it cannot be read, or its values are not those that were saved.
        """
        item = self._restore(
            step, params=ocp.args.StandardRestore(_nest(params)), optimizer=ocp.args.StandardRestore(_nest(optimizer))
        )
        found, arrays = _flat(item["params"]), _flat(item["optimizer"])
        self._verify(step, {**found, **_fingerprinted(arrays)}, prints)
        return found, arrays

    def params(self, step: int, target: Mapping[str, jax.ShapeDtypeStruct], prints: Mapping[str, int]) -> Params:
        """The parameters alone, placed as `target` says; DamagedCheckpoint as `state`."""
        params = _flat(self._restore(step, params=ocp.args.StandardRestore(_nest(target)))["params"])
        self._verify(step, params, prints)
        return params

    def ema(self, step: int, target: Mapping[str, jax.ShapeDtypeStruct], prints: Mapping[str, int]) -> Params | None:
        """The moving average in float32, placed as `target` says, None where the run kept none; DamagedCheckpoint as
        `state`.
        """
        if not any(name.startswith("ema/") for name in prints):
            return None
        wanted = {
            path: jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding) for path, like in target.items()
        }
        ema = _flat(self._restore(step, ema=ocp.args.StandardRestore(_nest(wanted)))["ema"])
        self._verify(step, _ema_arrays(ema), prints)
        return ema

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            _ignore_late_reads()
            raise DamagedCheckpoint(f"{self.folder / str(step)}: {_first_line(error)}") from error

    def _verify(self, step: int, arrays: Mapping[str, jax.Array], prints: Mapping[str, int]) -> None:
        wrong = [path for path, value in fingerprints(arrays).items() if prints.get(path) != value]
        if wrong:
            raise DamagedCheckpoint(
                f"{self.folder / str(step)}: values differ from what was saved in {len(wrong)} arrays, such "
                f"as {wrong[0]}"
            )


def _ignore_late_reads() -> None:
    """Silence errors of Orbax's event loop: when one array cannot be read, the loop closes while others are in flight,
    and each prints a traceback. The one raised error suffices.
    """
    before = sys.unraisablehook
    if getattr(before, "ignores_late_reads", False):
        return

    def hook(unraisable) -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            before(unraisable)

    hook.ignores_late_reads = True
    sys.unraisablehook = hook


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else 'no message'}"


def abstract_params(outline: Outline, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shardings = parameter_shardings(outline.axis_names, {path: s.shape for path, s in outline.shapes.items()}, mesh)
    return {
        path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[path]) for path, s in outline.shapes.items()
    }


def load_params(path: str | Path, mesh: Mesh | None = None, *, ema: bool = False) -> tuple[Config, Params]:
    """(config, parameters by path) of the newest whole checkpoint of a run folder, or of one checkpoint.

    Args:
      mesh: where the parameters go; None puts them on the first device.
      ema: the moving average in place of the parameters, in their dtypes.

    Raises:
      UserError: no checkpoint there, none that can be read, or one without a moving average.
    """
    mesh = mesh if mesh is not None else make_mesh(MeshConfig())
    damaged = []
    with CheckpointReader(path) as reader:
        for step in reader.candidates:
            try:
                _, prints, plain = reader.progress(step)
                config = Config.model_validate(plain)
                target = abstract_params(outline_of(config.model, config.adapters), mesh)
                params = reader.ema(step, target, prints) if ema else reader.params(step, target, prints)
            except DamagedCheckpoint as error:
                log.warning("damaged checkpoint passed over: %s", error)
                damaged.append(str(error))
                continue
            if params is None:
                raise UserError(
                    f"{reader.folder / str(step)} holds no moving average; train with training.ema_decay, or "
                    "leave out `:ema`"
                )
            return config, {p: value.astype(target[p].dtype) for p, value in params.items()} if ema else params
    raise UserError(f"{path}: no checkpoint can be read whole:\n  " + "\n  ".join(damaged or ["there is none"]))
