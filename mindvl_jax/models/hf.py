"""Types that describe a family's published files: `models/<family>/hf.py` fills them in, `mindvl_jax.weights` reads and
writes by them.

Published matrices are (outputs, inputs); ours are (inputs, outputs), with the layers of a stack on a leading axis and
experts on the axis after it. A form says how one published tensor holds one or more parameters of one layer. Imports no
jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pydantic

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.spec import Named

Shape = tuple[int, ...]


# --- forms -----------------------------------------------------------------------------------------------------------


class Form(Protocol):
    """Form of a published tensor. `shapes` are those of our parameters without their stack axes."""

    def published_shape(self, shapes: Sequence[Shape]) -> Shape: ...

    def to_ours(self, tensor: Any, shapes: Sequence[Shape]) -> list[Any]:
        """One array a parameter, views where possible; works on numpy and JAX arrays."""

    def to_published(self, arrays: Sequence[Any]) -> Any:
        """The inverse of `to_ours`."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Parameters one after another along the published first axis, as they are or transposed. Read in blocks of rows.

    Attributes:
      transpose: the published rows are our last axis.
      kernel: published axes after the first, where those of a convolution are one axis of ours; implies `transpose`.
    """

    transpose: bool = False
    kernel: Shape = ()

    def _published(self, shape: Shape) -> Shape:
        if not self.transpose:
            return shape
        return (shape[-1], *self.kernel) if self.kernel else shape[::-1]

    def published_shape(self, shapes: Sequence[Shape]) -> Shape:
        own = [self._published(shape) for shape in shapes]
        return (sum(shape[0] for shape in own), *own[0][1:])

    def rows(self, shapes: Sequence[Shape], member: int) -> slice:
        """Published rows of one of the parameters."""
        sizes = [self._published(shape)[0] for shape in shapes]
        return slice(sum(sizes[:member]), sum(sizes[: member + 1]))

    def to_ours(self, tensor: Any, shapes: Sequence[Shape]) -> list[Any]:
        parts = [tensor[self.rows(shapes, member)] for member in range(len(shapes))]
        return [part.reshape(len(part), -1).T if self.transpose else part for part in parts]

    def to_published(self, arrays: Sequence[Any]) -> Any:
        own = [
            np.ascontiguousarray(array.T if self.transpose else array).reshape(self._published(array.shape))
            for array in arrays
        ]
        return own[0] if len(own) == 1 else np.concatenate(own)


SAME = Rows()
TRANSPOSE = Rows(transpose=True)


def flatten(*kernel: int) -> Rows:
    """Convolution kernel (outputs, *kernel) whose stride is its size: the matrix of a flattened patch, (product of
    kernel, outputs).
    """
    return Rows(transpose=True, kernel=kernel)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Matrices (or biases) whose rows take turns in groups: InternLM2's grouped q, k, v, or q, k, v of each head in
    turn.

    Attributes:
      groups: how often the parameters take turns; each then holds its rows / groups.
      transpose: matrices; False for biases.
    """

    groups: int
    transpose: bool = True

    def published_shape(self, shapes: Sequence[Shape]) -> Shape:
        return Rows(self.transpose).published_shape(shapes)

    def to_ours(self, tensor: Any, shapes: Sequence[Shape]) -> list[Any]:
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        parts, start = [], 0
        for shape in shapes:
            rows = (shape[-1] if self.transpose else shape[0]) // self.groups
            part = grouped[:, start : start + rows].reshape(self.groups * rows, *tensor.shape[1:])
            parts.append(part.T if self.transpose else part)
            start += rows
        return parts

    def to_published(self, arrays: Sequence[Any]) -> Any:
        rows = [np.asarray(array.T if self.transpose else array) for array in arrays]
        grouped = [array.reshape(self.groups, -1, *array.shape[1:]) for array in rows]
        return np.ascontiguousarray(np.concatenate(grouped, 1)).reshape(-1, *rows[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class Columns:
    """Parameters concatenated along the last axis, inputs first: fused gate and up matrices of Qwen3-VL's experts."""

    def published_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    def to_ours(self, tensor: Any, shapes: Sequence[Shape]) -> list[Any]:
        ends = np.cumsum([shape[-1] for shape in shapes])
        return [tensor[..., end - shape[-1] : end] for shape, end in zip(shapes, ends, strict=True)]

    def to_published(self, arrays: Sequence[Any]) -> Any:
        return np.ascontiguousarray(np.concatenate([np.asarray(array) for array in arrays], -1))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Kernel (outputs, *kernel) as the matrix of a patch whose entries lie in another order.

    Attributes:
      kernel: published axes after the first. order: these axes as our rows run through them, slowest first.
    """

    kernel: Shape
    order: tuple[int, ...]

    def published_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (shapes[0][-1], *self.kernel)

    def to_ours(self, tensor: Any, shapes: Sequence[Shape]) -> list[Any]:
        return [tensor.transpose(0, *(axis + 1 for axis in self.order)).reshape(len(tensor), -1).T]

    def to_published(self, arrays: Sequence[Any]) -> Any:
        rows = np.asarray(arrays[0].T).reshape(-1, *(self.kernel[axis] for axis in self.order))
        return np.ascontiguousarray(rows.transpose(0, *(self.order.index(axis) + 1 for axis in range(len(self.order)))))


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """One parameter under another shape of the same order, such as a class token stored as (1, 1, width)."""

    shape: Shape

    def published_shape(self, shapes: Sequence[Shape]) -> Shape:
        if math.prod(self.shape) != math.prod(shapes[0]):
            raise ValueError(f"a tensor of shape {self.shape} cannot hold a parameter of shape {shapes[0]}")
        return self.shape

    def to_ours(self, tensor: Any, shapes: Sequence[Shape]) -> list[Any]:
        return [tensor.reshape(shapes[0])]

    def to_published(self, arrays: Sequence[Any]) -> Any:
        return np.ascontiguousarray(np.asarray(arrays[0]).reshape(self.shape))


# --- rules -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rule:
    """One published name and the parameters that its tensor holds.

    Attributes:
      published: name, with `{layer}` and `{expert}` where they are numbered.
      ours: parameter paths. form: how the tensor holds them.
      first: published number of the stack's first layer, where a stack is not the whole model.
    """

    published: str
    ours: tuple[str, ...]
    form: Form = SAME
    first: int = 0

    @property
    def stack_axes(self) -> int:
        """Leading axes of our parameters that the published name numbers."""
        return sum(mark in self.published for mark in ("{layer}", "{expert}"))

    def name(self, index: Shape) -> str:
        """Published name at an index into our stack axes."""
        marks = [mark for mark in ("layer", "expert") if f"{{{mark}}}" in self.published]
        numbers = dict(zip(marks, index, strict=True))
        if "layer" in numbers:
            numbers["layer"] += self.first
        return self.published.format(**numbers)


def linear(published: str, ours: str, *, bias: bool, **options: Any) -> list[Rule]:
    """Rules of a linear layer."""
    rules = [Rule(f"{published}.weight", (f"{ours}/kernel",), TRANSPOSE, **options)]
    return rules + ([Rule(f"{published}.bias", (f"{ours}/bias",), **options)] if bias else [])


def norm(published: str, ours: str, *, bias: bool = False, **options: Any) -> list[Rule]:
    """Rules of a norm: RMSNorm, or LayerNorm with a bias."""
    rules = [Rule(f"{published}.weight", (f"{ours}/scale",), **options)]
    return rules + ([Rule(f"{published}.bias", (f"{ours}/bias",), **options)] if bias else [])


def fused(published: str, ours: tuple[str, ...]) -> list[Rule]:
    """Rules of one published linear layer that holds several of ours, one after another."""
    return [
        Rule(f"{published}.weight", tuple(f"{path}/kernel" for path in ours), TRANSPOSE),
        Rule(f"{published}.bias", tuple(f"{path}/bias" for path in ours), SAME),
    ]


# --- configuration ---------------------------------------------------------------------------------------------------


class ConfigReader:
    """Collect what is wrong with a config.json while it is read, so that all of it is told at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def expect(self, content: Mapping[str, Any], key: str, allowed: tuple, default: Any, where: str = "") -> None:
        """Note a value that is not built, such as another activation."""
        value = content.get(key, default)
        if value not in allowed:
            self.problems.append(f"{where}{key} is {value!r}; supported: {', '.join(map(repr, allowed))}")

    def build(self, kind: type, values: Mapping[str, Any], where: str = "") -> Any:
        """`kind(**values)`, or None with its problems noted."""
        try:
            return kind(**values)
        except pydantic.ValidationError as error:
            self.problems += [f"{where}{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            return None


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Areas of a resized image, in pixels."""

    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class ModelType:
    """One `model_type` of config.json.

    Attributes:
      label: name for people. architecture: class of transformers, or ours where transformers has none.
      in_transformers: whether transformers opens such a folder.
    """

    label: str
    architecture: str
    in_transformers: bool = True


@dataclasses.dataclass(frozen=True)
class HFMapping:
    """A family's published files.

    Attributes:
      model_types: `model_type` of config.json -> what it is.
      rules: of a configuration: every published tensor.
      read_config: (content of config.json, reader) -> configuration; None after it has noted problems in the reader.
        What would change the mathematics and is not built is noted, never ignored.
      write_config: (configuration, {"dtype": .., "pad_token_id": .., ..}) -> content of config.json without
        `architectures`.
      companions: (configuration, pixel areas) -> file name -> JSON content, such as preprocessor_config.json.
      chat_template: Jinja text for tokenizers that bring none.
      aliases: (prefix, published prefix): other spellings of the same tensors.
      in_memory: published name of a module -> its name in transformers' model, which adapters are saved under.
      ignored: ends of names of tensors that follow from the configuration.
      unread: beginnings of names of tensors of parts that are not built; they are left out of what is written.
      tied: configuration -> (tensor that may be left out, tensor that it then equals), or None.
      copies: configuration -> {tensor that repeats another one: that one}; written with it, read only to compare.
      settle: (configuration, names of a folder's tensors) -> configuration, for parts that config.json may count and
        the folder not hold; None: there are none.
      assemble: (configuration whose tower is taken, configuration whose decoder is taken, mrope=bool) -> configuration
        of both together;
        None: towers of this family serve no other decoder.
      reference: loads the family's reference, (folder, content of config.json, torch dtype) -> torch module; None:
        transformers' class.
      reference_parts: our name of a part -> dotted path in the reference, both with `{layer}`; the first path that
        exists counts.
    """

    model_types: Mapping[str, ModelType]
    rules: Callable[[Any], Sequence[Rule]]
    read_config: Callable[[Mapping[str, Any], ConfigReader], ModelConfig | None]
    write_config: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    companions: Callable[[Any, Pixels], Mapping[str, Any]] = lambda config, pixels: {}
    chat_template: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    in_memory: Callable[[str], str] = lambda name: name
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
    unread: tuple[str, ...] = ()
    tied: Callable[[Any], tuple[str, str] | None] = lambda config: None
    copies: Callable[[Any], Mapping[str, str]] = lambda config: {}
    settle: Callable[[Any, Collection[str]], ModelConfig] | None = None
    assemble: Callable[..., ModelConfig] | None = None
    reference: Named | None = None
    reference_parts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def canonical(self, name: str) -> str:
        """Published spelling of a tensor's name."""
        for other, published in self.aliases:
            if name.startswith(other):
                return published + name.removeprefix(other)
        return name

    def ignorable(self, name: str) -> bool:
        """Whether a tensor of this name follows from the configuration."""
        return name.endswith(self.ignored) or name.startswith(self.unread)
