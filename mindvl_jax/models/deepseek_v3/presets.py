"""Published sizes of DeepSeek-V3. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable

from mindvl_jax.models.deepseek_v3.config import DeepSeekV3Config
from mindvl_jax.models.layers.config import DeepSeekV3TextConfig, MoEConfig, YarnConfig


def deepseek_v3_text() -> DeepSeekV3TextConfig:
    """The 671B decoder without its MTP layer. Loss factors are those of the report's sections 4.2 and 2.1.2."""
    return DeepSeekV3TextConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_layers=61,
        dense_layers=3,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe=MoEConfig(
            experts=256,
            experts_per_token=8,
            intermediate_size=2048,
            shared_experts=1,
            scoring="sigmoid",
            selection_bias=True,
            groups=8,
            groups_kept=4,
            renormalize=True,
            scale=2.5,
            bias_update_rate=1e-3,
            balance_loss=1e-4,
            balance="sequence",
        ),
        yarn=YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    )


def _deepseek_v3() -> DeepSeekV3Config:
    return DeepSeekV3Config(text=deepseek_v3_text())


MODELS: dict[str, Callable[[], DeepSeekV3Config]] = {"deepseek-v3": _deepseek_v3}
