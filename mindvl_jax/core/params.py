"""Parameters by path: the model's outline without its values, globs over paths.

In training, parameters are flat dicts `{"language/layers/attention/query/kernel": array}`: easy to select, to shard, to
save, and a plain pytree for every backend. `Outline` turns such a dict into a live module and back.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from mindvl_jax.core.errors import UserError

Params = dict[str, jax.Array]

NF4_LEAVES = ("nf4_codes", "nf4_absmax")
"""Names that stand in place of `kernel` where a matrix is held in NF4: two weights a byte, and the blocks' absmax."""


def in_nf4(path: str) -> bool:
    """Whether a parameter path belongs to a matrix in NF4."""
    return path.rsplit("/", 1)[-1] in NF4_LEAVES


def count_weights(path: str, like: Any) -> int:
    """Weights that an array of a model stands for: its size, but two of each byte in NF4 and none of its absmax."""
    return like.size * {"nf4_codes": 2, "nf4_absmax": 0}.get(path.rsplit("/", 1)[-1], 1)


@functools.lru_cache(maxsize=1024)
def _glob_pattern(glob: str) -> re.Pattern[str]:
    pieces = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile(
        "".join(pieces.get(part, re.escape(part)) for part in re.findall(r"\*\*/|\*\*|\*|\?|[^*?]+", glob))
    )


def matches(path: str, glob: str) -> bool:
    """Whether the whole `path` matches: `*` stays inside one name, `**` crosses slashes."""
    return _glob_pattern(glob).fullmatch(path) is not None


def matches_any(path: str, globs: Iterable[str]) -> bool:
    return any(matches(path, glob) for glob in globs)


def require_matches(paths: Iterable[str], globs: Iterable[str], where: str) -> None:
    """Refuse globs that select nothing: a typo there would silently train or freeze the wrong parts.

    Raises:
      UserError: naming `where` (the config key), every such glob and the nearest parameter group.
    """
    paths = list(paths)
    lost = [glob for glob in globs if not any(matches(path, glob) for path in paths)]
    if not lost:
        return
    groups = sorted({"/".join(path.split("/")[:depth]) for path in paths for depth in (1, 2, 3)} | set(paths))
    lines = []
    for glob in lost:
        near = difflib.get_close_matches(glob.replace("*", "").strip("/"), groups, n=1, cutoff=0.5)
        lines.append(
            f"  {glob!r} matches no parameter"
            + (f"; did you mean {near[0] + '/**'!r}?" if near and near[0] not in paths else "")
        )
    top = ", ".join(f"{group}/**" for group in sorted({path.split("/")[0] for path in paths}))
    raise UserError(
        f"{where}:\n" + "\n".join(lines) + f"\n  the model's parts are {top}; parameters look like {paths[0]}"
    )


@dataclasses.dataclass(frozen=True)
class Outline:
    """Structure of a model: paths, shapes, dtypes and axis names of its parameters, without values.

    Attributes:
      build: makes the module from `nnx.Rngs`.
      shapes: path -> ShapeDtypeStruct, in sorted order.
      axis_names: path -> logical axis name of each dim, or None when the model says nothing.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    variables: Mapping[str, tuple[tuple, nnx.Variable]]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    axis_names: Mapping[str, tuple[str | None, ...] | None]

    @classmethod
    def of(cls, build: Callable[[nnx.Rngs], nnx.Module]) -> Outline:
        """Trace `build` without computing anything."""
        graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
        variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
        variables = dict(sorted(variables.items()))
        values = {path: variable.get_value() for path, (_, variable) in variables.items()}
        names = {path: variable.get_metadata().get("out_sharding") for path, (_, variable) in variables.items()}
        return cls(build, graphdef, variables, values, names)

    def initial(self, key: jax.Array) -> Params:
        """Fresh parameters; trace it under `jax.jit` with `out_shardings` to create them in their places."""
        _, state = nnx.split(self.build(nnx.Rngs(key)), nnx.Param)
        return flatten(state)

    def state(self, params: Mapping[str, Any]) -> nnx.State:
        """The parameters as an nnx.State, as `nnx.update` and `nnx.merge` take it.

        Raises:
          KeyError: a parameter is missing.
        """
        return nnx.from_flat_state(
            [(path, variable.replace(params[name])) for name, (path, variable) in self.variables.items()]
        )

    def merge(self, params: Mapping[str, Any]) -> Any:
        """The live module with these parameters."""
        return nnx.merge(self.graphdef, self.state(params))


def flatten(state: nnx.State) -> Params:
    """nnx.State of parameters -> flat dict by path."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
