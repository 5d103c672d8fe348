"""Settings of shared layers. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mindvl_jax.config.base import Section, bounded

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of CLIP, which the published preprocessing of the Qwen-VL line uses."""


class TextConfig(Section):
    """Qwen2.5 or Qwen3 decoder."""

    family: Literal["qwen2", "qwen3"] = Field(description="qwen2: q/k/v biases; qwen3: q/k norms, no biases.")
    vocab_size: Annotated[int, bounded(2**24)]
    hidden_size: Annotated[int, bounded(2**20)]
    intermediate_size: Annotated[int, bounded(2**22)]
    num_layers: Annotated[int, bounded(10**4)]
    num_heads: Annotated[int, bounded(2**16)]
    num_kv_heads: Annotated[int, bounded(2**16)]
    head_dim: Annotated[int, bounded(2**14)]
    rope_theta: Annotated[float, Field(gt=0, le=1e15)] = 1e6
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    tie_word_embeddings: bool
    rope: Literal["mrope", "1d"] = Field(description="mrope: temporal, height and width sections; 1d: one running index.")
    mrope_section: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    max_position_embeddings: Annotated[int, bounded(2**31 - 1)] = 32768

    @model_validator(mode="after")
    def _consistent(self):
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of values")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.rope == "mrope":
            if self.mrope_section is None:
                raise ValueError("rope: mrope needs mrope_section (three numbers whose sum is head_dim / 2)")
            if sum(self.mrope_section) * 2 != self.head_dim:
                raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2}")
        return self
