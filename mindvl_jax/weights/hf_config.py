"""config.json of Hugging Face folders to our model configurations and back.

Understands the flat form of published folders and the nested one that transformers 5 writes. What would change the mathematics
and is not built (other activations, sliding windows, scaled rotary frequencies) is refused, never ignored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.layers.config import TextConfig
from mindvl_jax.models.mindvl.config import MindVLConfig, VisionConfig
from mindvl_jax.models.qwen.config import QwenConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.core.files import read_text

SUPPORTED = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3": "Qwen3", "qwen2": "Qwen2.5", "mindvl": "MindVL"}
_TOKEN_DEFAULTS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}


class WeightsError(UserError):
    """A folder of weights that cannot be used; the message lists every problem found."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      WeightsError: unreadable, not JSON or not an object.
    """
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
      WeightsError: no config.json, an unsupported model_type (the supported ones are named), or settings that are not built;
        all problems at once.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))[:200]
        raise WeightsError(f"{folder}: a LoRA adapter (adapter_config.json), not a model; open its base model ({base}) with --adapter {folder}, or merge both by `mindvl merge`")
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json; expected a Hugging Face folder or one of our runs (config.yaml and checkpoints/)")
    content = read_json(path)
    kind = content.get("model_type")
    if kind not in SUPPORTED:
        names = ", ".join(f"{key} ({label})" for key, label in SUPPORTED.items())
        raise WeightsError(f"{path}: model_type is {kind!r}, which is not supported; supported are {names}")
    reader = _Reader(path)
    if kind in ("qwen2", "qwen3"):
        text = reader.text(content, kind)
        config = None if text is None else QwenConfig(text=text)
    else:
        config = reader.vision_language(content, kind)
    reader.finish()
    return config


class _Reader:
    """Collects problems while it reads, so that all are told at once."""

    def __init__(self, path: Path):
        self.path = path
        self.problems: list[str] = []

    def finish(self) -> None:
        if self.problems:
            raise WeightsError("\n".join([f"{self.path}: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}:", *(f"  {p}" for p in self.problems)]))

    def expect(self, content: dict, key: str, allowed: tuple, default: Any, where: str) -> None:
        value = content.get(key, default)
        if value not in allowed:
            self.problems.append(f"{where}{key} is {value!r}; supported: {', '.join(map(repr, allowed))}")

    def build(self, kind: type, values: dict, where: str):
        try:
            return kind(**values)
        except pydantic.ValidationError as error:
            self.problems += [f"{where}{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            return None

    def text(self, content: dict, family: str, where: str = "", mrope: bool = False) -> TextConfig | None:
        self.expect(content, "hidden_act", ("silu",), "silu", where)
        self.expect(content, "use_sliding_window", (False, None), False, where)
        if family == "qwen3":
            self.expect(content, "attention_bias", (False, None), False, where)
        rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "mrope"):
            self.problems.append(f"{where}rope type is {rope_type!r}; supported: 'default', 'mrope' (frequencies are not rescaled)")
        heads = content.get("num_attention_heads")
        width = content.get("hidden_size")
        head_dim = content.get("head_dim") or (width // heads if isinstance(heads, int) and isinstance(width, int) and heads else None)
        section = rope.get("mrope_section")
        if mrope and section is None:
            # transformers falls back to the published one; for another head dim that cannot be meant.
            section = [16, 24, 24]
        values = dict(
            family=family, vocab_size=content.get("vocab_size"), hidden_size=width, intermediate_size=content.get("intermediate_size"),
            num_layers=content.get("num_hidden_layers"), num_heads=heads, num_kv_heads=content.get("num_key_value_heads", heads),
            head_dim=head_dim, rope_theta=rope.get("rope_theta", content.get("rope_theta", 10000.0)),
            rms_norm_eps=content.get("rms_norm_eps", 1e-6), tie_word_embeddings=bool(content.get("tie_word_embeddings", False)),
            rope="mrope" if mrope else "1d", mrope_section=tuple(section) if mrope else None,
            max_position_embeddings=content.get("max_position_embeddings", 32768),
        )
        return self.build(TextConfig, values, where)

    def vision(self, content: dict) -> VisionConfig | None:
        where = "vision_config."
        self.expect(content, "hidden_act", ("silu",), "silu", where)
        rope = content.get("rope_parameters") or {}
        values = dict(
            depth=content.get("depth"), hidden_size=content.get("hidden_size"), intermediate_size=content.get("intermediate_size"),
            num_heads=content.get("num_heads"), patch_size=content.get("patch_size", content.get("spatial_patch_size", 14)),
            temporal_patch_size=content.get("temporal_patch_size", 2), spatial_merge_size=content.get("spatial_merge_size", 2),
            in_channels=content.get("in_channels", content.get("in_chans", 3)), window_size=content.get("window_size", 112),
            fullatt_block_indexes=tuple(content.get("fullatt_block_indexes", (7, 15, 23, 31))), tokens_per_second=content.get("tokens_per_second", 4),
            rope_theta=rope.get("rope_theta", 10000.0), rms_norm_eps=content.get("rms_norm_eps", 1e-6),
        )
        return self.build(VisionConfig, values, where)

    def vision_language(self, content: dict, kind: str) -> MindVLConfig | None:
        nested = content.get("text_config")
        text_content = nested if isinstance(nested, dict) else content
        if not isinstance(content.get("vision_config"), dict):
            self.problems.append("vision_config is missing")
            return None
        if isinstance(nested, dict) and "tie_word_embeddings" in content:
            # In the nested form the outer value is the one that ties (transformers reads it there).
            text_content = {**nested, "tie_word_embeddings": content["tie_word_embeddings"]}
        family, mrope = "qwen2", True
        if kind == "mindvl":
            inner = text_content.get("model_type")
            if inner not in ("qwen2", "qwen3"):
                self.problems.append(f"text_config.model_type is {inner!r}; supported: 'qwen2', 'qwen3'")
                return None
            family, mrope = inner, (text_content.get("rope_parameters") or {}).get("mrope_section") is not None
        vision = self.vision(content["vision_config"])
        text = self.text(text_content, family, "text_config." if nested else "", mrope)
        if vision is None or text is None:
            return None
        out = content["vision_config"].get("out_hidden_size", text.hidden_size)
        if out != text.hidden_size:
            self.problems.append(f"vision_config.out_hidden_size is {out}, but the language model's hidden_size is {text.hidden_size}")
        tokens = {key: content.get(key, default) for key, default in _TOKEN_DEFAULTS.items()}
        return self.build(MindVLConfig, dict(vision=vision, text=text, **tokens), "")


def model_type(config: ModelConfig) -> str:
    """What a folder of this model calls itself: transformers' own name where transformers has the model, else `mindvl`."""
    if isinstance(config, QwenConfig):
        return config.text.family
    published = config.text.family == "qwen2" and config.text.rope == "mrope" and config.text.num_heads * config.text.head_dim == config.text.hidden_size
    return "qwen2_5_vl" if published else "mindvl"


_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "mindvl": "MindVLForConditionalGeneration"}


def write_config(config: ModelConfig, dtype: str, *, pad_token_id: int | None = None, eos_token_id: int | None = None) -> dict[str, Any]:
    """The content of config.json for a model.

    Args:
      dtype: of the weights, by transformers' name (`float32`, `bfloat16`, `float16`).
    """
    kind = model_type(config)
    special = {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "bos_token_id": None}
    head = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind, "dtype": dtype, **special}
    if isinstance(config, QwenConfig):
        return {**head, **_text_content(config.text)}
    text_kind = "qwen2_5_vl_text" if kind == "qwen2_5_vl" else config.text.family
    return {
        **head,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        **{key: getattr(config, key) for key in _TOKEN_DEFAULTS},
        "text_config": {"model_type": text_kind, "dtype": dtype, **special, **_text_content(config.text)},
        "vision_config": _vision_content(config.vision, config.text.hidden_size, kind),
    }


def _text_content(text: TextConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.rope_theta}
    if text.rope == "mrope":
        rope["mrope_section"] = list(text.mrope_section)
    content = dict(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size, num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads, num_key_value_heads=text.num_kv_heads, rms_norm_eps=text.rms_norm_eps, hidden_act="silu",
        tie_word_embeddings=text.tie_word_embeddings, max_position_embeddings=text.max_position_embeddings, rope_parameters=rope,
        use_sliding_window=False, sliding_window=None, attention_dropout=0.0, use_cache=True,
    )
    if text.family == "qwen3":
        content |= dict(head_dim=text.head_dim, attention_bias=False)
    elif text.num_heads * text.head_dim != text.hidden_size:
        content["head_dim"] = text.head_dim
    return content


def _vision_content(vision: VisionConfig, out: int, kind: str) -> dict[str, Any]:
    return dict(
        model_type="qwen2_5_vl_vision", depth=vision.depth, hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads, in_channels=vision.in_channels, patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.spatial_merge_size, window_size=vision.window_size, fullatt_block_indexes=list(vision.fullatt_block_indexes),
        tokens_per_second=vision.tokens_per_second, out_hidden_size=out, hidden_act="silu",
        rope_parameters={"rope_type": "axial", "rope_theta": vision.rope_theta},
    )
