"""YAML files and dotted overrides to a `Config`, with errors that name the place and the nearest valid key.

    load("configs/quickstart.yaml", ["run.seed=3", "training.phases[0].steps=50"])

A file may say `extends: other.yaml` (or a list; later ones win): mappings merge key by key, everything else replaces.
All problems of a file are gathered and raised once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pydantic
import yaml

from mindvl_jax.config import families, yaml_text
from mindvl_jax.config.schema import Config, ModelConfig, Section
from mindvl_jax.core.errors import UserError, shortened

Location = tuple[str | int, ...]


class ConfigError(UserError):
    """A configuration that cannot be used; the message lists every problem found."""


@dataclasses.dataclass
class _Document:
    """Merged content with, for each location, where it was written ("file.yaml:12" or "--set")."""

    content: dict
    origins: dict[Location, str]


PACKAGED = Path(__file__).resolve().parent.parent / "configs"
"""Packaged configurations. `quickstart` and `configs/quickstart.yaml` name them from any directory."""

FolderReader = Callable[[str], dict[str, Any]]


def load(path: str | Path, overrides: Iterable[str] = (), *, describe: FolderReader | None = None) -> Config:
    """Read `path`, apply `overrides` ("a.b[0].c=value", values in YAML), checks everything.

    Args:
      path: a file, or the name of a packaged configuration such as `quickstart`.
      describe: returns the sections `model` and `tokenizer` of a folder of weights (`weights.described`), for
        `model.from` and for `run.init_from` without a model section.

    Raises:
      ConfigError: unreadable file, unknown key, wrong type or impossible combination, all of them in one message.
    """
    document = _read(find(path), seen=())
    for override in overrides:
        _apply_override(document, override)
    _expand_folder(document, describe)
    _expand_preset(document)
    return _validate(document)


def find(path: str | Path) -> Path:
    """Return the file, or the packaged configuration of that name when there is no such file."""
    path = Path(path)
    packaged = PACKAGED / f"{path.name.removesuffix('.yaml')}.yaml"
    named = path.parent in (Path("."), Path("configs")) and packaged.is_file()
    return packaged if named and not path.is_file() else path


def packaged_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def from_text(text: str, *, describe: FolderReader | None = None) -> Config:
    """The same checks for YAML that is already in memory."""
    document = _Document(content=_parse(text, "configuration")[1], origins={})
    _expand_folder(document, describe)
    _expand_preset(document)
    return _validate(document)


def from_mapping(content: dict) -> Config:
    """The same checks for a mapping that is already in memory."""
    document = _Document(content=dict(content), origins={})
    _expand_preset(document)
    return _validate(document)


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def json_schema() -> str:
    """JSON schema of the whole configuration, for editors."""
    schema = Config.model_json_schema()
    extends = {
        "description": "File or files that this one builds on.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    schema.pop("required", None)  # a file that extends another may leave anything out
    return json.dumps(schema, indent=2)


# --- reading ---------------------------------------------------------------------------------------------------------


MOST_FILES = (
    64  # that `extends` may lead to: two files that each extend another twice, and so on, double with every floor
)


def _parse(text: str, where: str) -> tuple[Any, Any]:
    try:
        return yaml_text.parse(text, where)
    except yaml_text.YamlError as error:
        raise ConfigError(str(error)) from error


def _read(path: Path, seen: tuple[Path, ...], opened: list[Path] | None = None) -> _Document:
    opened = [] if opened is None else opened
    try:
        resolved = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{str(path)[:200]!r}: not a path of a file ({error})") from error
    if resolved in seen:
        chain = " -> ".join(p.name for p in (*seen, resolved))
        raise ConfigError(f"{path}: `extends` runs in a circle ({chain})")
    if len(opened) >= MOST_FILES:
        raise ConfigError(f"{path}: `extends` leads to more than {MOST_FILES} files")
    opened.append(resolved)
    try:
        text = yaml_text.read(path)
    except (OSError, ValueError) as error:
        if isinstance(error, yaml_text.YamlError):
            raise ConfigError(str(error)) from error
        known = (
            f"; packaged configurations are {', '.join(packaged_names())}"
            if isinstance(error, FileNotFoundError)
            else ""
        )
        raise ConfigError(
            f"{path}: cannot read this configuration file ({getattr(error, 'strerror', None) or error}){known}"
        ) from error
    node, content = _parse(text, str(path))
    if not isinstance(content, dict):
        found = "an empty file" if content is None else type(content).__name__
        raise ConfigError(f"{path}: expected sections such as `run:` and `model:`, found {found}")
    origins: dict[Location, str] = {}
    _record_origins(node, (), str(path), origins)

    parents = content.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise ConfigError(f"{origins.get(('extends',), path)}: `extends` is a file name or a list of file names")
    merged = _Document({}, {})
    for parent in parents:
        _merge(merged, _read(path.parent / parent, (*seen, resolved), opened))
    _merge(merged, _Document(content, origins))
    return merged


def _record_origins(node: yaml.Node | None, location: Location, file: str, origins: dict[Location, str]) -> None:
    if node is None:
        return
    origins.setdefault(location, f"{file}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key_node, value_node in node.value:
            key = key_node.value
            if key in keys:
                raise ConfigError(
                    f"{file}:{key_node.start_mark.line + 1}: `{_dotted((*location, key))}` is written twice"
                )
            keys.add(key)
            origins[(*location, key)] = f"{file}:{key_node.start_mark.line + 1}"
            _record_origins(value_node, (*location, key), file, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_origins(item, (*location, index), file, origins)


def _merge(base: _Document, top: _Document) -> None:
    def merge(old: dict, new: dict, location: Location) -> None:
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                merge(old[key], value, (*location, key))
            else:
                old[key] = value
                replaced.add((*location, key))

    replaced: set[Location] = set()
    merge(base.content, top.content, ())
    base.origins = {
        loc: origin
        for loc, origin in base.origins.items()
        if not any(loc[:length] in replaced for length in range(1, len(loc) + 1))
    }
    base.origins.update(top.origins)


_RIVALS = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "warmup_steps": ("warmup_ratio",),
    "warmup_ratio": ("warmup_steps",),
}
"""Keys of a phase that say the same thing in two ways."""


def _apply_override(document: _Document, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set {shortened(override)}: expected key=value, such as run.seed=3 or training.phases[0].steps=50"
        )
    location: list[str | int] = []
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", key.strip()):
        location.append(int(part[1:-1]) if part.startswith("[") else part)
    try:
        value = yaml_text.parse(text, f"--set {shortened(override)}")[1]
    except yaml_text.YamlError as error:
        raise ConfigError(f"--set {shortened(override)}: the value is not valid YAML ({error})") from error
    target: Any = document.content
    for depth, part in enumerate(location):
        here = _dotted(location[: depth + 1])
        if isinstance(target, list):
            if isinstance(part, str) and part.isdigit():
                part = location[depth] = int(part)
            if not isinstance(part, int) or part >= len(target):
                raise ConfigError(
                    f"--set {shortened(override)}: `{_dotted(location[:depth])}` is a list of {len(target)}; "
                    f"`{here}` is not in it"
                )
        elif not isinstance(target, dict):
            raise ConfigError(
                f"--set {shortened(override)}: `{_dotted(location[:depth])}` is a single value and has no parts"
            )
        if depth == len(location) - 1:
            target[part] = value
        elif isinstance(target, dict):
            if target.get(part) is None:
                target[part] = {}
            target = target[part]
        else:
            target = target[part]
    if isinstance(target, dict) and value is not None and location[0] == "training":
        for rival in _RIVALS.get(str(location[-1]), ()):  # an override of a recipe's steps by epochs replaces them
            if target.pop(rival, None) is not None:
                document.origins.pop((*location[:-1], rival), None)
    here = f"--set {shortened(override)}"
    for length in range(1, len(location)):  # sections that this override has made
        document.origins.setdefault(tuple(location[:length]), here)
    document.origins = {
        place: origin for place, origin in document.origins.items() if place[: len(location)] != tuple(location)
    }
    document.origins[tuple(location)] = here


def _expand_folder(document: _Document, describe: FolderReader | None) -> None:
    """Put a folder's own model and tokenizer under the keys that the file gives (`model.from`, or `run.init_from`
    alone).
    """
    content = document.content
    model, run = content.get("model"), content.get("run")
    model = {} if model is None else model
    if not isinstance(model, dict):
        return
    named = model.get("from")
    if named is not None and model.get("preset") is not None:
        raise ConfigError(
            f"{_origin(('model', 'from'), document)}: `model.from` and `model.preset` both give the sizes of "
            "the model; keep one of them"
        )
    alone = model.get("preset") is None and set(model) <= set(ModelConfig.model_fields)  # nothing about sizes
    start = run.get("init_from") if isinstance(run, dict) else None
    folder, key = (named, ("model", "from")) if named is not None else (start if alone else None, ("run", "init_from"))
    if folder is None:
        return
    if describe is None:
        raise ConfigError(
            f"{_origin(key, document)}: the model of {folder} is not read here; write the sizes into "
            "`model`, or name a preset"
        )
    try:
        found = describe(str(folder))
    except UserError as error:
        raise ConfigError(f"{_origin(key, document)}: {error}") from error
    merged = _Document(found["model"], {})
    _merge(merged, _Document({name: value for name, value in model.items() if name != "from"}, {}))
    content["model"] = merged.content
    if "tokenizer" in found and content.get("tokenizer") is None:
        content["tokenizer"] = found["tokenizer"]


def _expand_preset(document: _Document) -> None:
    """Put the named preset under the keys that the file gives in `model`."""
    model = document.content.get("model")
    if not isinstance(model, dict) or model.get("preset") is None:
        return
    where = document.origins.get(("model", "preset"), "model.preset")
    try:
        base = families.preset(str(model["preset"]))
    except KeyError as error:
        raise ConfigError(f"{where}: {error.args[0]}") from error
    if model.get("family", base.family) != base.family:
        where = document.origins.get(("model", "family"), "model.family")
        raise ConfigError(
            f"{where}: `model.family` is {model['family']!r}, but preset {model['preset']!r} belongs to "
            f"{base.family!r}; leave `family` out"
        )
    merged = _Document(base.model_dump(mode="python"), {})
    _merge(merged, _Document(model, {}))
    document.content["model"] = merged.content


# --- checking --------------------------------------------------------------------------------------------------------


def _validate(document: _Document) -> Config:
    try:
        return Config.model_validate(document.content)
    except pydantic.ValidationError as error:
        lines = [_explain(problem, document) for problem in error.errors()]
    raise ConfigError("\n".join([f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration:", *lines]))


def _explain(problem: Any, document: _Document) -> str:
    location: Location = tuple(problem["loc"])
    where = _origin(location, document)
    name = shortened(_dotted(location)) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"  {where}: `{name}`: unknown key{_suggest(location, document)}"
    if problem["type"] == "missing":
        return f"  {where}: `{name}`: required, but not given"
    found = (
        "" if isinstance(problem.get("input"), (dict, list)) else f" (found {shortened(repr(problem.get('input')))})"
    )
    message = problem["msg"].removeprefix("Value error, ")
    return f"  {where}: `{name}`: {message}{found}"


def _origin(location: Location, document: _Document) -> str:
    for length in range(len(location), -1, -1):
        if origin := document.origins.get(location[:length]):
            return origin
    return "configuration"


def _suggest(location: Location, document: _Document) -> str:
    """The nearest valid key: among its neighbours first, then anywhere in the schema."""
    key = str(location[-1])
    family = _family_class(document)
    neighbours = _keys_at(location[:-1], family)
    if close := difflib.get_close_matches(key, neighbours, n=1, cutoff=0.6):
        return f"; did you mean `{_dotted((*location[:-1], close[0]))}`?"
    elsewhere = dict(_all_keys(Config, (), family))
    if close := difflib.get_close_matches(key, list(elsewhere), n=1, cutoff=0.75):
        return f"; did you mean `{elsewhere[close[0]]}`?"
    return f"; valid here: {', '.join(sorted(neighbours))}" if neighbours else ""


def _sections_of(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [section for part in typing.get_args(annotation) for section in _sections_of(part)]
    return []


def _family_class(document: _Document) -> type[ModelConfig]:
    """Configuration class of the document's family; the base class when its name is unknown."""
    name = families.family_of(document.content.get("model"))
    return families.config_class(name) if name in families.names() else ModelConfig


def _keys_at(location: Location, family: type[ModelConfig]) -> list[str]:
    section: type[Section] = Config
    for part in location:
        if isinstance(part, int):
            continue  # an element of a list has the type that the list's field named
        field = section.model_fields.get(part)
        if field is None:
            continue  # a key of a mapping such as data.sources.<name>
        sections = _sections_of(field.annotation)
        if not sections:
            return []
        section = family if sections[0] is ModelConfig else sections[0]
    return list(section.model_fields)


def _all_keys(section: type[Section], location: Location, family: type[ModelConfig]) -> Iterable[tuple[str, str]]:
    for name, field in section.model_fields.items():
        yield name, _dotted((*location, name))
        for part in _sections_of(field.annotation):
            suffix: Location = (0,) if "tuple" in str(field.annotation) else ()
            yield from _all_keys(family if part is ModelConfig else part, (*location, name, *suffix), family)


def _dotted(location: Iterable[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
