"""Reference of MindVL for comparisons: Qwen2.5-VL is transformers' own class, MindVL's pairing is composed from
transformers' parts.

Positions, attention windows and patch order come from transformers' functions here, never from ours: what is compared
must not share code.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

from mindvl_jax.core.errors import UserError
from mindvl_jax.models.layers.qwen_vl_reference import rope_index


class ComposedMindVL(torch.nn.Module):
    """Vision tower of Qwen2.5-VL and a Qwen3 (or Qwen2) decoder, with M-RoPE when its rope has sections.

    Parameter names are those of MindVL's export layout.
    """

    def __init__(self, content: dict[str, Any]):
        super().__init__()
        text = {key: value for key, value in content["text_config"].items() if key not in ("model_type", "dtype")}
        self.sections = (
            text["rope_parameters"].pop("mrope_section", None)
            if isinstance(text.get("rope_parameters"), dict)
            else None
        )
        text["tie_word_embeddings"] = content["tie_word_embeddings"]
        kind = content["text_config"]["model_type"]
        config_class, model_class = {
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
            "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        }[kind]
        self.config = transformers.Qwen2_5_VLConfig(
            text_config=dict(hidden_size=text["hidden_size"], num_attention_heads=1, num_key_value_heads=1),
            vision_config=content["vision_config"],
            **{
                key: content[key]
                for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            },
        )
        # The position index is a method of the published model that reads its configuration only.
        with torch.device("meta"):
            self._indexer = [qwen2_5_vl.Qwen2_5_VLModel(self.config)]
        self.visual = qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(self.config.vision_config)
        decoder = model_class(config_class(**text))
        self.model, self.lm_head = decoder.model, decoder.lm_head
        self._decoder = [decoder]
        if self.sections:
            plain = self.model.rotary_emb
            self._positions: torch.Tensor | None = None
            self.model.rotary_emb = _SectionedRotary(plain, self.sections, lambda: self._positions)

    def get_rope_index(self, *args, **kwargs):
        return self._indexer[0].get_rope_index(*args, **kwargs)

    def forward(self, input_ids, *, mm_token_type_ids=None, attention_mask=None, labels=None, **media):
        embeds = self.model.embed_tokens(input_ids)
        for kind, token in (("", self.config.image_token_id), ("_videos", self.config.video_token_id)):
            pixels = media.get(f"pixel_values{kind}")
            if pixels is not None:
                grid = media["video_grid_thw" if kind else "image_grid_thw"]
                features = self.visual(pixels.to(embeds.dtype), grid_thw=grid).pooler_output
                embeds = embeds.masked_scatter((input_ids == token)[..., None], features.to(embeds.dtype))
        if self.sections:
            self._positions = rope_index(self, input_ids, mm_token_type_ids, media)
        return self._decoder[0](inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


class _SectionedRotary(torch.nn.Module):
    """Tables of three position rows, with the decoder's own frequencies."""

    def __init__(self, plain, sections, positions):
        super().__init__()
        self.plain, self.sections, self.positions = plain, sections, positions

    def forward(self, x, position_ids):
        angles = self.positions()[..., None].float() * self.plain.inv_freq
        chosen = torch.cat([part[row] for row, part in enumerate(angles.split(self.sections, dim=-1))], dim=-1)
        both = torch.cat([chosen, chosen], dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def load(folder: Path, content: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module | None:
    """The composed model of a folder of ours; None: transformers has a class for it.

    Raises:
      UserError: tensors that the reference lacks or does not know.
    """
    if content["model_type"] != "mindvl":
        return None
    with _default_dtype(dtype):
        model = ComposedMindVL(content)
    state = {
        name: tensor.to(dtype)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    missing = model.load_state_dict(state, strict=False)
    lost = [name for name in missing.missing_keys if name != "lm_head.weight"]
    if lost or missing.unexpected_keys:
        raise UserError(f"{folder}: the reference lacks {lost} and does not know {missing.unexpected_keys}")
    if content["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
