"""Engine of the families' `HFMapping`s: config.json both ways, and every published tensor with the parameters that it
holds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mindvl_jax.config.schema import ModelConfig
from mindvl_jax.models.hf import ConfigReader, HFMapping, ModelType, Rule, Shape
from mindvl_jax.models.registry import SPECS, spec_of
from mindvl_jax.weights.errors import WeightsError, read_json
from mindvl_jax.weights.stored_names import stored_names


def mapping_of(config: ModelConfig) -> HFMapping:
    """The published files of a configuration's family.

    Raises:
      WeightsError: a family that is not published anywhere.
    """
    hf = spec_of(config).hf
    if hf is None:
        raise WeightsError(f"models of family {config.family!r} have no published layout to read or write")
    return hf.get()


def _by_model_type() -> dict[str, HFMapping]:
    mappings = [spec.hf.get() for spec in SPECS.values() if spec.hf is not None]
    return {model_type: mapping for mapping in mappings for model_type in mapping.model_types}


def supported_labels() -> str:
    """All that can be read, for messages: `qwen3 (Qwen3), ...`."""
    return ", ".join(f"{name} ({mapping.model_types[name].label})" for name, mapping in _by_model_type().items())


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes.

    Raises:
      WeightsError: no config.json, an unsupported model_type (the supported ones are named), or settings that are not
        built; all problems at once.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))[:200]
        raise WeightsError(
            f"{folder}: a LoRA adapter (adapter_config.json), not a model; open its base model ({base}) with "
            f"--adapter {folder}, or merge both by `mindvl merge`"
        )
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no config.json; expected a Hugging Face folder or one of our runs (config.yaml and "
            "checkpoints/)"
        )
    content = read_json(path)
    kind = content.get("model_type")
    mapping = _by_model_type().get(kind) if isinstance(kind, str) else None
    if mapping is None:
        raise WeightsError(
            f"{path}: model_type is {kind!r}, which is not supported; supported are {supported_labels()}"
        )
    reader = ConfigReader()
    try:
        config = mapping.read_config(content, reader)
    except (TypeError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        # Families read the published shape; a list where an object belongs fails wherever it is used.
        raise WeightsError(f"{path}: a value has another type than published folders give it ({error})") from error
    if reader.problems:
        count = len(reader.problems)
        raise WeightsError(
            "\n".join(
                [
                    f"{path}: {count} problem{'s' if count > 1 else ''}:",
                    *(f"  {problem}" for problem in reader.problems),
                ]
            )
        )
    if mapping.settle is None or (names := stored_names(folder)) is None:
        return config
    return mapping.settle(config, names)


def config_content(
    config: ModelConfig, dtype: str, *, pad_token_id: int | None = None, eos_token_id: int | None = None
) -> dict[str, Any]:
    """Content of config.json for a model.

    Args:
      dtype: of the weights, by transformers' name (`float32`, `bfloat16`, `float16`).
    """
    mapping = mapping_of(config)
    common = {"dtype": dtype, "pad_token_id": pad_token_id, "eos_token_id": eos_token_id, "bos_token_id": None}
    content = mapping.write_config(config, common)
    return {"architectures": [mapping.model_types[content["model_type"]].architecture], **content}


def model_type(config: ModelConfig) -> tuple[str, ModelType]:
    """Return the model type in a folder's config.json and its meaning."""
    mapping = mapping_of(config)
    name = mapping.write_config(config, {})["model_type"]
    return name, mapping.model_types[name]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One published tensor.

    Attributes:
      index: into the leading stack axes (layer, expert) of the parameters; empty outside stacks.
      shapes: of the parameters, without these axes. shape: the published one.
    """

    name: str
    rule: Rule
    index: Shape
    shapes: tuple[Shape, ...]
    shape: Shape


def slots(config: ModelConfig, shapes: Mapping[str, Shape]) -> Iterator[Slot]:
    """Every published tensor of a model whose parameters have `shapes` (by path), with the shape it must have.

    Raises:
      KeyError: a rule names a parameter that `shapes` lacks.
    """
    return slots_of(mapping_of(config).rules(config), shapes)


def slots_of(rules: Iterable[Rule], shapes: Mapping[str, Shape]) -> Iterator[Slot]:
    """Every published tensor of these rules; see `slots`."""
    for rule in rules:
        axes = rule.stack_axes
        own = tuple(tuple(shapes[path][axes:]) for path in rule.ours)
        published = tuple(rule.form.published_shape(own))
        for index in itertools.product(*(range(size) for size in shapes[rule.ours[0]][:axes])):
            yield Slot(rule.name(index), rule, index, own, published)
