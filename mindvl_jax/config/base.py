"""Base of every section of the configuration, and what the `model` section of every family has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every part: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """What the `model` section of every family has. `family` selects the subclass; `preset` fills what is not given here."""

    family: str
    preset: str | None = Field(None, description="Name of a published size (`mindvl config --schema` lists the families); keys given beside it override it.")
    remat: Literal["none", "full", "dots", "attention"] = Field("none", description="What the backward pass recomputes.")
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    matmul_precision: Literal["default", "bfloat16"] = Field("default", description="bfloat16: products of float32 operands read them in bfloat16 and sum in float32, for processors with bfloat16 matrix units.")
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "reference", "blocked", "splash"] = Field("auto", description="Form of attention on XLA. auto: by platform and shape; reference: holds the scores of a row; blocked: linear in the row, any platform; splash: Pallas kernels for TPU.")

    def phase_warnings(self, phase: Any) -> list[str]:
        """Return sentences about sizes of a phase that are allowed and probably not meant."""
        return []

    def phase_problems(self, phase: Any) -> dict[str, str]:
        """Sizes of a phase (a `PhaseConfig`) that this model cannot work with: key of the phase -> what is expected of it."""
        return {}
