"""Find the operation that made a bad step: run its forward and backward pass again, operation by operation where
needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mindvl_jax.checkpoints.checkpoint import load_params
from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.params import Params
from mindvl_jax.models.loading import batch_spec, make_loader
from mindvl_jax.models.outline import outline_of
from mindvl_jax.objectives.registry import make_objective
from mindvl_jax.training.recorder import BAD_BATCH, BAD_STEP
from mindvl_jax.training.state import split_trained

PARAMETERS = "bad_step.npz"
"""In a run folder: parameters that a diverged run stopped with, those from before the first bad step of the row."""


def keep_parameters(run_dir: Path, params: Params) -> None:
    """Write parameters beside bad_step.json. bfloat16 becomes float32, which holds the same values."""
    widened = {
        path: np.asarray(value if value.dtype.itemsize >= 4 else value.astype(jnp.float32))
        for path, value in params.items()
    }
    np.savez(run_dir / PARAMETERS, **widened)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The first operation whose result is not finite although its inputs are.

    Attributes:
      scope: named scopes around it, outermost first; a layer of a scanned stack as `layer 3`.
      backward: whether it belongs to the backward pass.
      source: file and line of the model's code. inputs: largest magnitude of each input.
    """

    scope: str
    operation: str
    backward: bool
    source: str
    inputs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Replay:
    """A bad step, run again.

    Attributes:
      parameters: where they came from. finding: None when everything is finite, as with other parameters than those of
        the step.
      bad_parameters: paths of parameters that were not finite before the step.
    """

    step: int
    phase: str
    sample_ids: tuple[str, ...]
    loss: float
    parameters: str
    finding: Finding | None
    bad_parameters: tuple[str, ...]


def replay(run_dir: Path, config: Config) -> Replay:
    """Search the forward and backward pass of the bad step's batch.

    Raises:
      UserError: the run has no bad step, or its data or parameters are gone.
    """
    file = run_dir / BAD_STEP
    if not file.is_file():
        raise UserError(f"{run_dir} has no {BAD_STEP}: no step of this run had a loss or gradient that is not finite")
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        phase = config.training.phases[kept["phase_index"]]
        int(kept["step"]), kept["phase"], tuple(kept["sample_ids"]), kept["data_before"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error!r}); train on to see the step again") from None
    outline = outline_of(config.model, config.adapters)
    params, origin = _parameters(run_dir, {path: like.dtype for path, like in outline.shapes.items()})
    bad = tuple(path for path, value in params.items() if not bool(jnp.isfinite(value).all()))
    trained, frozen = split_trained(list(outline.shapes), phase.train, "train")
    objective = make_objective(config.model, phase, loss_chunk=config.training.loss_chunk)
    key = jax.random.fold_in(jax.random.key(config.run.seed), kept["step"] - 1) if objective.uses_key else None

    def loss(trained_params: Params, frozen_params: Params, batch: Any) -> jax.Array:
        return objective.loss(outline.merge({**trained_params, **frozen_params}), batch, key).numerator

    parts = {path: params[path] for path in trained}, {path: params[path] for path in frozen}
    finding, total = None, 0.0
    for batch in _batches(run_dir, config, kept):
        finding = finding or first_bad(loss, *parts, batch)
        total += float(jax.jit(loss)(*parts, batch))
    return Replay(kept["step"], kept["phase"], tuple(kept["sample_ids"]), total, origin, finding, bad)


def _batches(run_dir: Path, config: Config, kept: dict[str, Any]) -> Iterator[Any]:
    """Batches of the step: as the run wrote them down, or built again from the data, which must not have changed.

    Raises:
      UserError: a damaged file, or batches of another shape than the configuration's.
    """
    phase = config.training.phases[kept["phase_index"]]
    if (run_dir / BAD_BATCH).is_file():
        like = batch_spec(config, phase).empty()
        leaves, tree = jax.tree.flatten(like)
        try:
            with np.load(run_dir / BAD_BATCH, allow_pickle=False) as stored:
                found = [
                    [stored[f"{micro}/{leaf}"] for leaf in range(len(leaves))]
                    for micro in range(phase.gradient_accumulation)
                ]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{run_dir / BAD_BATCH} is damaged ({error}); delete it to build the batch again") from None
        for micro in found:
            if any(value.shape[1:] != want.shape[1:] for value, want in zip(micro, leaves, strict=True)):
                raise UserError(f"{run_dir / BAD_BATCH} holds batches of another configuration than config.yaml")
            yield jax.tree.unflatten(tree, micro)
        return
    with contextlib.closing(make_loader(config, kept["phase_index"])) as loader:
        if kept["data_before"] is not None:
            loader.restore(kept["data_before"])
        for _ in range(phase.gradient_accumulation):
            yield next(loader).batch


def _parameters(run_dir: Path, dtypes: Mapping[str, Any]) -> tuple[Params, str]:
    if (run_dir / PARAMETERS).is_file():
        try:
            with np.load(run_dir / PARAMETERS, allow_pickle=False) as stored:
                params = {path: jnp.asarray(stored[path]).astype(dtype) for path, dtype in dtypes.items()}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{run_dir / PARAMETERS} is damaged or of another model ({error}); delete it") from None
        return params, "those that the run stopped with"
    return load_params(run_dir)[1], "those of the newest checkpoint, which are not exactly those of the step"


# --- the search ------------------------------------------------------------------------------------------------------


def first_bad(function: Any, *args: Any) -> Finding | None:
    """Return the first operation of a scalar function or of its gradient (by the first argument) that makes NaN or +inf
    out of finite inputs, or None.

    -inf alone is no sign: masks are made of it.
    """
    for searched, backward in ((function, False), (jax.value_and_grad(function), True)):
        closed = jax.make_jaxpr(searched)(*args)
        finding = _search(closed.jaxpr, closed.consts, jax.tree.leaves(args), ())[1]
        if finding is not None:
            return dataclasses.replace(finding, backward=backward)
    return None


def _bad(value: Any) -> bool:
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return False
    return bool((jnp.isnan(value) | jnp.isposinf(value)).any())


def _search(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], scope: tuple[str, ...]
) -> tuple[list[Any], Finding | None]:
    """(outputs, finding); the outputs are whole only where nothing was found."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(variable):
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        given = equation.primitive.get_bind_params(equation.params)
        functions, parameters = (
            given if isinstance(given, tuple) else ((), given)
        )  # the form depends on the version of jax
        with equation.ctx.manager:
            found = equation.primitive.bind(*functions, *inputs, **parameters)
        outputs = list(found) if equation.primitive.multiple_results else [found]
        if any(map(_bad, outputs)) and not any(map(_bad, inputs)):
            return outputs, _inside(equation, inputs, scope) or _named(equation, inputs, scope)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars], None


def _inside(equation: Any, inputs: Sequence[Any], scope: tuple[str, ...]) -> Finding | None:
    """The finding inside a call or a loop, None for a plain operation."""
    inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
    if inner is None:
        return None
    body, consts = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
    scope = (*scope, str(equation.source_info.name_stack))
    if equation.primitive.name != "scan":
        return _search(body, consts, inputs, scope)[1] if len(body.invars) == len(inputs) else None
    fixed, carried, length = equation.params["num_consts"], equation.params["num_carry"], equation.params["length"]
    constants, carry, stacked = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    for number in range(length)[:: -1 if equation.params["reverse"] else 1]:
        outputs, finding = _search(
            body,
            consts,
            [*constants, *carry, *(value[number] for value in stacked)],
            (*scope, f"layer {number}" if length > 1 else ""),
        )
        if finding is not None:
            return finding
        carry = outputs[:carried]
    return None


def _named(equation: Any, inputs: Sequence[Any], scope: tuple[str, ...]) -> Finding:
    names = [name for name in (*scope, str(equation.source_info.name_stack)) if name]
    plain = "/".join(names)
    for wrapper in ("transpose(", "jvp(", "checkpoint", "rematted_computation", ")"):
        plain = plain.replace(wrapper, "")
    plain = "/".join(part for part in plain.split("/") if part)
    frame = next(iter(_frames(equation)), "unknown place")
    sizes = tuple(
        float(jnp.max(jnp.abs(value)))
        for value in inputs
        if jnp.issubdtype(jnp.result_type(value), jnp.floating) and np.size(value)
    )
    return Finding(plain or "outside of any named part", equation.primitive.name, False, frame, sizes)


def _frames(equation: Any) -> list[str]:
    """Places in this project's code, innermost first."""
    traceback = equation.source_info.traceback
    if traceback is None:
        return []
    frames = [
        frame
        for frame in traceback.frames
        if "mindvl_jax/" in frame.file_name.replace("\\", "/") or "npu_bridge/ops" in frame.file_name
    ]
    inner = [frame for frame in frames if not frame.file_name.endswith("replay.py")]
    return [f"{Path(frame.file_name).parent.name}/{Path(frame.file_name).name}:{frame.line_num}" for frame in inner]
