"""Settings of shared layers. Imports no jax."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mindvl_jax.config.base import Section, bounded
from mindvl_jax.data.media.geometry import CLIP_MEAN  # noqa: F401 - the models' layers take it from here

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel statistics of CLIP, which the published preprocessing of the Qwen-VL line uses."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
"""Mean and deviation of SigLIP's channels."""


class TextConfig(Section):
    """Qwen2.5, Qwen3 or Llama decoder."""

    family: Literal["qwen2", "qwen3", "llama"] = Field(
        description="qwen2: q/k/v biases; qwen3: q/k norms, no biases; llama: neither."
    )
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
    rope: Literal["mrope", "1d"] = Field(
        description="mrope: temporal, height and width sections; 1d: one running index."
    )
    mrope_section: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    mrope_interleaved: bool = Field(
        False, description="Time, height and width take turns over the frequencies (Qwen3-VL)."
    )
    max_position_embeddings: Annotated[int, bounded(2**31 - 1)] = 32768
    rope_dynamic_factor: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None,
        description="Published factor of dynamic frequencies. Nothing changes up to max_position_embeddings; longer "
        "samples are not built.",
    )

    @property
    def token_products(self) -> int:
        """Multiply-adds of a token in the matrix products of all layers."""
        attention = self.hidden_size * 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def pair_products(self) -> int:
        """Return multiply-adds per token pair in the attention of all layers: two products, half of each masked by
        causality.
        """
        return self.num_layers * self.num_heads * self.head_dim

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
            if self.mrope_interleaved and 3 * max(self.mrope_section[1:]) > self.head_dim // 2 + 2:
                raise ValueError(f"mrope_section {self.mrope_section} leaves no turns for height and width to take")
        return self


class MoEConfig(Section):
    """Routed feed-forward layers."""

    experts: PositiveInt
    experts_per_token: PositiveInt
    intermediate_size: PositiveInt = Field(description="Feed-forward width of one expert.")
    shared_experts: NonNegativeInt = Field(
        0, description="Experts that every token passes, as one network of their summed width."
    )
    scoring: Literal["softmax", "sigmoid"]
    selection_bias: bool = Field(
        False, description="A bias, moved by load, enters the choice of experts but not their weights (DeepSeek-V3)."
    )
    groups: PositiveInt = Field(
        1, description="Equal groups of experts; the best `groups_kept` of them stay eligible for a token."
    )
    groups_kept: PositiveInt = 1
    renormalize: bool = Field(description="Divide the chosen scores by their sum.")
    scale: PositiveFloat = Field(1.0, description="Factor on the weights of the routed experts.")
    bias_update_rate: NonNegativeFloat = Field(
        0.0, description="Step of the selection bias after each optimizer step; 0 leaves it."
    )
    balance_loss: NonNegativeFloat = Field(0.0, description="Factor of the load-balancing loss.")
    balance: Literal["sequence", "pooled", "layer"] = Field(
        "pooled",
        description="sequence: per packed sample (DeepSeek-V3); pooled: counts and scores of all layers together, not "
        "divided by k (Hugging Face); "
        "layer: per layer, divided by k (Megatron).",
    )
    z_loss: NonNegativeFloat = Field(0.0, description="Factor of the router's z-loss, a mean over tokens and layers.")

    def token_products(self, width: int) -> int:
        """Multiply-adds of a token in one routed layer: router, its experts, the shared ones."""
        return (
            width * self.experts + (self.experts_per_token + self.shared_experts) * 3 * width * self.intermediate_size
        )

    @property
    def sequence_balance(self) -> bool:
        return self.balance == "sequence" and self.balance_loss > 0

    @model_validator(mode="after")
    def _possible(self):
        if self.experts % self.groups or self.groups_kept > self.groups:
            raise ValueError(
                f"{self.experts} experts in {self.groups} groups of which {self.groups_kept} are kept does not work out"
            )
        if self.experts_per_token > self.groups_kept * (self.experts // self.groups):
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) is more than the "
                f"{self.groups_kept * (self.experts // self.groups)} eligible experts"
            )
        if self.groups > 1 and self.experts // self.groups < 2:
            raise ValueError(f"{self.groups} groups of {self.experts} experts leave less than two a group")
        if self.bias_update_rate and not self.selection_bias:
            raise ValueError("bias_update_rate moves the selection bias, which needs selection_bias: true")
        return self


class YarnConfig(Section):
    """Scaled rotary frequencies for contexts longer than the pretrained one (Peng et al., 2023)."""

    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: PositiveFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 0.0


class Qwen3MoETextConfig(TextConfig):
    """Qwen3 decoder whose feed-forward layers are all routed."""

    family: Literal["qwen3_moe"] = "qwen3_moe"
    intermediate_size: PositiveInt = Field(
        1, description="Of dense layers, of which there are none; kept for config.json."
    )
    moe: MoEConfig
    dense_layers: Literal[0] = 0

    @property
    def token_products(self) -> int:
        attention = self.hidden_size * 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * (attention + self.moe.token_products(self.hidden_size))


class DeepSeekV3TextConfig(Section):
    """DeepSeek-V3 decoder: latent attention, dense layers first, then routed ones."""

    family: Literal["deepseek_v3"] = "deepseek_v3"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt = Field(description="Feed-forward width of the dense layers.")
    num_layers: PositiveInt
    dense_layers: NonNegativeInt = Field(description="Layers at the start whose feed-forward is not routed.")
    num_heads: PositiveInt
    q_lora_rank: PositiveInt | None = Field(description="Width of the query latent; None projects queries directly.")
    kv_lora_rank: PositiveInt = Field(description="Width of the latent that keys and values are made of.")
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    moe: MoEConfig
    rope_theta: PositiveFloat = 1e4
    yarn: YarnConfig | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: PositiveInt = 163840
    mtp_layers: NonNegativeInt = Field(
        0, description="Heads that predict the tokens after the next one (multi-token prediction); DeepSeek-V3 has 1."
    )
    mtp_loss: NonNegativeFloat = Field(
        0.1,
        description="Factor of the mean loss of the MTP heads in training. DeepSeek-V3: 0.3 for the first 10T tokens, "
        "then 0.1.",
    )
    rope: Literal["1d"] = "1d"
    mrope_section: None = None

    @property
    def token_products(self) -> int:
        """Multiply-adds of a token in the matrix products of all layers, of the experts that it passes."""
        D, N = self.hidden_size, self.num_heads
        query = D * N * self.qk_head_dim if self.q_lora_rank is None else self.q_lora_rank * (D + N * self.qk_head_dim)
        latent = D * self.cache_width + self.kv_lora_rank * N * (self.qk_nope_head_dim + self.v_head_dim)
        attention = query + latent + N * self.v_head_dim * D
        dense = self.dense_layers * 3 * D * self.intermediate_size
        heads = self.mtp_layers * (attention + self.moe.token_products(D) + 2 * D * D)
        routed = (self.num_layers - self.dense_layers) * self.moe.token_products(D)
        return self.num_layers * attention + dense + routed + heads

    @property
    def pair_products(self) -> int:
        """Return multiply-adds per token pair in the attention of all layers: two products, half of each masked by
        causality.
        """
        layers = self.num_layers + self.mtp_layers
        return layers * self.num_heads * (self.qk_head_dim + self.v_head_dim) // 2

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values that a decode cache keeps for a token and layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @model_validator(mode="after")
    def _consistent(self):
        if self.dense_layers >= self.num_layers:
            raise ValueError(f"dense_layers ({self.dense_layers}) leaves no routed layer of {self.num_layers}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even")
        return self
