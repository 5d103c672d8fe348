"""Base of every section of the configuration, and what the `model` section of every family has."""

from __future__ import annotations

import re
import struct
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

SMALLEST, LARGEST = 1.18e-38, 3.4e38  # normal numbers of float32: what an option becomes on the device
LONGEST_TEXT = 4096


def below_one(value: float) -> float:
    """Raise ValueError for a decay that float32 rounds to 1: what divides by 1 minus it would divide by zero."""
    if struct.unpack("f", struct.pack("f", value))[0] >= 1:
        raise ValueError("rounds to 1 in float32; expected a number below 1")
    return value


Decay = Annotated[float, Field(ge=0, lt=1), AfterValidator(below_one)]
"""Decay of a running average."""


def file_name(value: str) -> str:
    """Raise ValueError for a name that is no safe name of a file on every system: it becomes one in the run folder."""
    if not re.fullmatch(r"\w[\w .,+()\[\]-]{0,79}", value) or value.endswith((" ", ".")) or len(value.encode()) > 200:
        raise ValueError(
            "expected 1 to 80 letters, digits and `_ . , + - ( ) [ ]` or blanks inside, the first a letter, "
            "digit or `_`: the name becomes the name of a file"
        )
    return value


Name = Annotated[str, AfterValidator(file_name)]
"""Name of a phase, source or task."""


def bounded(largest: int, *, least: int = 1) -> Any:
    """Constraint of a whole number from `least` to `largest`: a bound far above what any machine trains, so that a slip
    of the keyboard is said at once.
    """
    return Field(ge=least, le=largest)


def _kinds(annotation: Any) -> set[type]:
    """Types of the leaves of an annotation."""
    if isinstance(annotation, type):
        return {Section} if issubclass(annotation, BaseModel) else {annotation}
    return {kind for part in typing.get_args(annotation) for kind in _kinds(part)}


def _leaves(value: Any) -> Iterator[Any]:
    """Scalars of a value, keys of mappings too; sections check their own."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif not isinstance(value, BaseModel):
        yield value


class Section(BaseModel):
    """Base of every part: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if (
            kinds & {int, float}
            and bool not in kinds
            and Section not in kinds
            and any(isinstance(leaf, bool) for leaf in _leaves(value))
        ):
            raise ValueError("expected a number, found true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _within_what_programs_hold(cls, value: Any) -> Any:
        for leaf in _leaves(value):
            if isinstance(leaf, float) and leaf and not SMALLEST <= abs(leaf) <= LARGEST:
                raise ValueError(f"{leaf:g} is no number that float32 holds (from {SMALLEST:g} to {LARGEST:g})")
            if isinstance(leaf, int) and abs(leaf) >= 2**32:
                raise ValueError("a whole number beyond 32 bits")
            if isinstance(leaf, str) and (
                len(leaf) > LONGEST_TEXT
                or any(
                    ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 or 0xD800 <= ord(letter) < 0xE000 for letter in leaf
                )
            ):
                raise ValueError(f"expected text of at most {LONGEST_TEXT} characters without control characters")
        return value


class ModelConfig(Section):
    """Fields of every family's `model` section.

    `family` selects the subclass; `preset` fills what is not given here.
    """

    family: str
    preset: str | None = Field(
        None,
        description="Name of a published size (`mindvl config --schema` lists the families); keys given beside it "
        "override it.",
    )
    remat: Literal["none", "full", "dots", "attention"] = Field(
        "none", description="What the backward pass recomputes."
    )
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    matmul_precision: Literal["default", "bfloat16", "auto"] = Field(
        "default",
        description="bfloat16: products of float32 operands read them in bfloat16 and sum in float32, for processors "
        "with bfloat16 matrix units. auto: bfloat16 unless this is a CPU without such units, where it would "
        "be slower.",
    )
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "reference", "blocked", "splash"] = Field(
        "auto",
        description="Form of attention on XLA. auto: by platform and shape; reference: holds the scores of a row; "
        "blocked: linear in the row, any platform; splash: Pallas kernels for TPU.",
    )

    def phase_warnings(self, phase: Any) -> list[str]:
        """Return sentences about sizes of a phase that are allowed and probably not meant."""
        return []

    def phase_problems(self, phase: Any) -> dict[str, str]:
        """Sizes of a phase (a `PhaseConfig`) that this model cannot work with: key of the phase -> what is expected of
        it.
        """
        return {}
