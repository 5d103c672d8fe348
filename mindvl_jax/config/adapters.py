"""The `adapters` section of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from mindvl_jax.config.base import Section


class AdaptersConfig(Section):
    """Low-rank adapters (LoRA, rank-stabilised LoRA, DoRA) on linear layers.

    The base is frozen unless a phase's `train` names parts of it.
    """

    targets: tuple[str, ...] = Field(
        min_length=1,
        description="Linear layers: PEFT's names (q_proj, self_attn.o_proj, qkv, all-linear) or globs over paths "
        "(language/layers/mlp/*).",
    )
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    ranks: dict[str, PositiveInt] = Field(
        {}, description="Another rank for some of the targets, by the same names and globs; first match wins."
    )
    alphas: dict[str, PositiveFloat] = Field({}, description="Another alpha for some of the targets.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) in place of alpha / rank.")
    dora: bool = Field(False, description="Learn the norm of each output apart from its direction.")
    dropout: Literal[0, 0.0] = Field(0, description="Only 0: dropout on the adapters' input is not built.")  # type: ignore[valid-type]
    base: Literal["nf4"] | None = Field(
        None,
        description="nf4: hold the matrices of the layers in four bits (QLoRA) and dequantise them layer by layer; "
        "none: as model.param_dtype says.",
    )
    init_from: str | None = Field(
        None, description="PEFT folder to start from; its targets, rank and alpha must be those given here."
    )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


ADAPTER_PARAMETERS = "**/lora_*"
"""Glob of the parameters that adapters add: what a phase trains unless its `train` says otherwise."""
