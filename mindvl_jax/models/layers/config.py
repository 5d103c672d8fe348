"""Settings of shared layers. Imports no jax."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mindvl_jax.config.schema import Section

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of CLIP, which the published preprocessing of the Qwen-VL line uses."""


class TextConfig(Section):
    """Qwen2.5 or Qwen3 decoder."""

    family: Literal["qwen2", "qwen3"] = Field(description="qwen2: q/k/v biases; qwen3: q/k norms, no biases.")
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    rope_theta: PositiveFloat = 1e6
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool
    rope: Literal["mrope", "1d"] = Field(description="mrope: temporal, height and width sections; 1d: one running index.")
    mrope_section: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    max_position_embeddings: PositiveInt = 32768

    @model_validator(mode="after")
    def _consistent(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.rope == "mrope":
            if self.mrope_section is None:
                raise ValueError("rope: mrope needs mrope_section (three numbers whose sum is head_dim / 2)")
            if sum(self.mrope_section) * 2 != self.head_dim:
                raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2}")
        return self
