"""Registry of model families: the configuration class and the presets behind `model.family` and `model.preset`.

`mindvl_jax.models.registry` registers every family. Imports no jax.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from mindvl_jax.config.base import ModelConfig

DEFAULT = "mindvl"
"""Family of a `model` section that names none: configurations and checkpoints from before there were families."""

_CONFIGS: dict[str, type[ModelConfig]] = {}
_PRESETS: dict[str, Callable[[], ModelConfig]] = {}


def register(name: str, config: type[ModelConfig], presets: Mapping[str, Callable[[], ModelConfig]]) -> None:
    """Add a family.

    Raises:
      ValueError: the family or one of its presets is registered already.
    """
    if taken := [key for key in presets if key in _PRESETS] + [key for key in (name,) if key in _CONFIGS]:
        raise ValueError(f"family {name!r}: {', '.join(taken)} is registered already")
    _CONFIGS[name] = config
    _PRESETS.update(presets)


def names() -> list[str]:
    """Names of all families."""
    return list(_CONFIGS)


def config_class(name: str) -> type[ModelConfig]:
    """Configuration class of a family.

    Raises:
      KeyError: an unknown name; the message has the nearest one and lists all.
    """
    return _CONFIGS[_known(name, _CONFIGS, "model family")]


def preset_names() -> list[str]:
    """Names of the presets of all families."""
    return list(_PRESETS)


def preset(name: str) -> ModelConfig:
    """Configuration of a published size.

    Raises:
      KeyError: an unknown name; the message has the nearest one and lists all.
    """
    return _PRESETS[_known(name, _PRESETS, "model preset")]()


def _known(name: str, table: Mapping[str, Any], what: str) -> str:
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise KeyError(f"no {what} is called {name!r}{hint} There are: {', '.join(table)}")
    return name


def family_of(content: Any) -> str:
    """Family that a `model` section, still a plain mapping, asks for."""
    return content.get("family", DEFAULT) if isinstance(content, Mapping) else DEFAULT


class AnyFamily:
    """Pydantic annotation: validate a `model` section by the configuration class of its family.

    A discriminated union of pydantic would do the same, but needs its members when the schema is defined, and puts the
    family's name into the location of every error.
    """

    @staticmethod
    def _parse(value: Any) -> ModelConfig:
        if isinstance(value, pydantic.BaseModel):
            if not isinstance(value, tuple(_CONFIGS.values())):
                raise PydanticCustomError(
                    "model_family", "{kind} is not the configuration of a family", {"kind": type(value).__name__}
                )
            return value  # type: ignore[return-value]
        try:
            family = config_class(family_of(value))
        except (KeyError, TypeError) as error:
            problem = PydanticCustomError("model_family", "{message}", {"message": str(error.args[0])})
            details = InitErrorDetails(type=problem, loc=("family",), input=family_of(value))
            raise pydantic.ValidationError.from_exception_data("model", [details]) from None
        return family.model_validate(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        variants = [handler(config.__pydantic_core_schema__) for config in _CONFIGS.values()]
        return {"oneOf": variants, "discriminator": {"propertyName": "family"}}
