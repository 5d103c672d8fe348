"""PEFT folders: `adapter_model.safetensors` and `adapter_config.json`, in and out.

PEFT stores A as (r, in) and B as (out, r) for each layer; ours are (layers, in, r) and (layers, r, out). Tensors keep
their dtype, so a folder that is read and written again has equal bytes. Nothing of a folder is ignored in silence:
every key must belong to an adapter of this model, and every option of the configuration that would change the result
must be one that we compute.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mindvl_jax.core.errors import UserError, shortened
from mindvl_jax.models.adapters import LEAVES, Adapter, Layout, leaf_path
from mindvl_jax.weights.adapter_layout import (
    PublishedLinear,
    names_that_cannot_adapt,
    published_linears,
    require_checked_family,
)
from mindvl_jax.weights.errors import finite
from mindvl_jax.weights.mapping import mapping_of, model_type

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Options that change what the adapter computes, with the value that means "not used".
_NEUTRAL = {
    "bias": "none", "modules_to_save": None, "layers_to_transform": None, "fan_in_fan_out": False,
    "megatron_config": None, "layer_replication": None,
    "use_qalora": False, "lora_bias": False, "target_parameters": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None, "corda_config": None,
    "arrow_config": None, "use_bdlora": None,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """One adapter folder.

    Attributes:
      layout: which of our layers carry it. parameters: by path, numpy, in the dtype of the file.
      config: `adapter_config.json` as it was. modern: whether tensors are named as transformers names them in memory
        since 4.52 (`model.language_model.`, `model.visual.`) or as published files are (`model.`, `visual.`).
    """

    layout: Layout
    parameters: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    modern: bool


def module_name(name: str, config: Any, *, modern: bool = True) -> str:
    """Published module name as it is called in PEFT's files of this model."""
    return mapping_of(config).in_memory(name) if modern else name


def read_adapter(folder: Path, config: Any) -> PeftAdapter:
    """Read a PEFT folder for the model that `config` describes.

    Raises:
      UserError: no such folder; an option that we do not compute; keys that are no adapter of this model; a shape that
        does not fit; a rank in the file that is not the one of its configuration; an adapter that covers some layers of
        a stack only.
    """
    require_checked_family(config)
    settings = _read_settings(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        other = (
            "adapter_model.bin is a pickle, which is refused; save it as safetensors"
            if (folder / "adapter_model.bin").is_file()
            else f"expected {WEIGHTS}"
        )
        raise UserError(f"{folder}: no adapter weights ({other})")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    bad = [key for key, value in tensors.items() if not finite(value)]
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(tensors)} tensors hold values that are NaN or infinite, such as {bad[0]}; the "
            "adapter is damaged, or its training diverged"
        )
    found, unknown, modern = {}, [], False
    for key, value in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", key)
        if match is None:
            unknown.append(key)
            continue
        stored, leaf = match.groups()
        published = mapping_of(config).canonical(stored)
        modern |= stored != published
        found[published, leaf.removesuffix(".weight")] = value
    layout, parameters, problems = {}, {}, []
    for linear in published_linears(config):
        _take_linear(linear, found, settings, config, layout, parameters, problems, modern)
    unknown += [f"{PREFIX}{name}.{leaf}" for name, leaf in found]
    if unknown:
        problems.append(
            f"{len(unknown)} tensor{'s' if len(unknown) > 1 else ''} that belong to no adapter of this "
            f"model: {', '.join(sorted(unknown)[:5])}"
        )
    if not layout and not problems:
        problems.append("no adapter in it")
    if problems:
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError(
            "\n".join(
                [
                    f"{folder}: this adapter cannot be used with this model:",
                    *(f"  {problem}" for problem in problems[:10]),
                    *more,
                ]
            )
        )
    return PeftAdapter(layout, parameters, settings, modern or not hasattr(config, "vision"))


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: expected a PEFT folder with {CONFIG} and {WEIGHTS}; there is no {CONFIG}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(settings).__name__}")
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA (with use_rslora, use_dora) is supported"
        )
    missing = [key for key in ("r", "lora_alpha") if not _number(settings.get(key))]
    if missing:
        raise UserError(
            f"{path}: {' and '.join(missing)} missing, or no number above 0; without them the adapter's scale is "
            "unknown"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        _require_patterns(settings.get(key), f"{path}: {key}")
    used = {
        key: settings[key]
        for key, neutral in _NEUTRAL.items()
        if settings.get(key) not in (neutral, None, [], {}, False)
    }
    if used:
        raise UserError(
            f"{path}: options that are not supported, and that would change the result: "
            + ", ".join(f"{key}={value!r}" for key, value in used.items())
        )
    return settings


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31


def _require_patterns(patterns: Any, where: str) -> None:
    """Raise UserError for patterns that are none, or of a form whose search may never end."""
    if not isinstance(patterns, dict | None):
        raise UserError(f"{where} is a {type(patterns).__name__}; expected an object of pattern to number")
    for pattern, value in (patterns or {}).items():
        try:
            re.compile(pattern)
            sound = _number(value) and len(pattern) <= 200
        except (re.error, RecursionError, OverflowError):
            sound = False
        if not sound or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise UserError(
                f"{where} has {shortened(repr(pattern), 80)}: {shortened(repr(value), 80)}; expected a plain regular "
                "expression, without repeated groups, and a number above 0"
            )


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's look-up of `rank_pattern` and `alpha_pattern`: the first regular expression that the end of the name
    matches.
    """
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _take_linear(
    linear: PublishedLinear, found: dict, settings: Mapping[str, Any], config, layout, parameters, problems, modern
) -> None:
    """Move one published linear layer's tensors from `found` into `layout` and `parameters`, or say why not."""
    shapes = linear.shapes(config)
    cells = [
        (name, layer) for name, layer in linear.cells(config) if (name, "lora_A") in found or (name, "lora_B") in found
    ]
    if not cells:
        return
    leaves = ("lora_A", "lora_B", "lora_magnitude_vector") if settings.get("use_dora") else ("lora_A", "lora_B")

    def named(name):
        return module_name(name, config, modern=modern)

    if len(cells) != math.prod(shapes.lead):
        kind = "experts" if len(shapes.lead) > 1 else "layers"
        problems.append(
            f"{linear.name}: adapters on {len(cells)} of {math.prod(shapes.lead)} {kind}; all of a stack or none"
        )
    if len(shapes.lead) > 1 and settings.get("use_dora"):
        problems.append(f"{linear.name}: DoRA on experts is not built")
    got = {leaf: [found.pop((name, leaf), None) for name, _ in cells] for leaf in leaves}
    for leaf in leaves:
        lacking = [name for (name, _), value in zip(cells, got[leaf], strict=True) if value is None]
        if lacking:
            problems.append(
                f"{lacking[0]}.{leaf} is missing" + (f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else "")
            )
    ranks = {_pattern(settings.get("rank_pattern"), named(name), settings["r"]) for name, _ in cells}
    alphas = {float(_pattern(settings.get("alpha_pattern"), named(name), settings["lora_alpha"])) for name, _ in cells}
    if len(ranks) > 1 or len(alphas) > 1:
        problems.append(
            f"{linear.name}: rank {sorted(ranks)}, alpha {sorted(alphas)}: one rank and alpha for all layers "
            "of a stack are supported"
        )
    if problems:
        return
    rank, alpha = ranks.pop(), alphas.pop()
    wanted = {
        "lora_A": (rank, shapes.inputs),
        "lora_B": (sum(shapes.outputs), rank),
        "lora_magnitude_vector": (sum(shapes.outputs),),
    }
    for leaf in leaves:
        wrong = [value.shape for value in got[leaf] if value.shape != wanted[leaf]]
        if wrong:
            problems.append(
                f"{linear.name}.{leaf} has shape {list(wrong[0])}; expected {list(wanted[leaf])} for rank "
                f"{rank} of {CONFIG}"
            )
            return

    def stack(values):
        return np.stack(values).reshape(*shapes.lead, *values[0].shape)

    start = 0
    for path, outputs in zip(linear.modules, shapes.outputs, strict=True):
        rows = slice(start, start + outputs)
        layout[path] = Adapter(
            rank, alpha, bool(settings.get("use_rslora")), bool(settings.get("use_dora")), linear.shares(path)
        )
        if linear.shares(path) is None:
            parameters[leaf_path(path, "lora_a")] = stack([value.T for value in got["lora_A"]])
        parameters[leaf_path(path, "lora_b")] = stack([value[rows].T for value in got["lora_B"]])
        if settings.get("use_dora"):
            parameters[leaf_path(path, "lora_magnitude")] = stack(
                [value[rows] for value in got["lora_magnitude_vector"]]
            )
        start += outputs


def require_layout(found: Layout, wanted: Layout, source: str | Path) -> None:
    """Refuse an adapter folder whose targets, ranks, alphas or kind are not those of the configuration."""
    problems = [f"{path}: in the folder, not among adapters.targets" for path in sorted(set(found) - set(wanted))]
    problems += [f"{path}: among adapters.targets, not in the folder" for path in sorted(set(wanted) - set(found))]
    for path in sorted(set(found) & set(wanted)):
        there, here = dataclasses.asdict(found[path]), dataclasses.asdict(wanted[path])
        other = [
            f"{key} {there[key]} there, {here[key]} in the configuration" for key in here if here[key] != there[key]
        ]
        if other:
            problems.append(f"{path}: {', '.join(other)}")
    if problems:
        raise UserError(
            "\n".join(
                [f"{source} does not fit the adapters of the configuration:", *(f"  {line}" for line in problems[:10])]
            )
        )


# --- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    config: Any,
    layout: Layout,
    parameters: Mapping[str, Any],
    *,
    base: str | None = None,
    like: PeftAdapter | None = None,
) -> None:
    """Write adapters as a PEFT folder.

    Args:
      layout, parameters: as `models.adapters` has them; parameters that are no adapters are not looked at.
      base: name or folder of the base model, for `base_model_name_or_path`.
      like: the folder that they came from: its configuration and naming are kept.

    Adapters of query, key and value apart, which the vision tower publishes as one matrix, become one of their ranks'
    sum with a block-diagonal B; its alpha grows alike, so that the scale stays.

    Raises:
      UserError: DoRA on some parts of a fused matrix only; other ranks than `like` says.
    """
    modern = like.modern if like is not None else True
    tensors: dict[str, np.ndarray] = {}
    ranks, alphas, chosen = {}, {}, []
    for linear in published_linears(config):
        if not any(path in layout for path in linear.modules):
            continue
        rank, alpha, pieces = _published(linear, layout, parameters, config)
        if (ranks.setdefault(linear.name, rank), alphas.setdefault(linear.name, alpha)) != (rank, alpha):
            raise UserError(
                f"{linear.name}: rank {ranks[linear.name]} and {rank}, alpha {alphas[linear.name]:g} and {alpha:g} in "
                "two stacks of layers that have one name in PEFT; merge it instead"
            )
        chosen.append(linear)
        for name, layer in linear.cells(config):
            for leaf, value in pieces(layer).items():
                tensors[f"{PREFIX}{module_name(name, config, modern=modern)}.{leaf}"] = np.ascontiguousarray(value)
    settings = dict(like.config) if like is not None else _settings(config, layout, ranks, alphas, chosen, base, modern)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _published(linear: PublishedLinear, layout: Layout, parameters: Mapping[str, Any], config):
    """(rank, alpha, function of the layer that gives its PEFT tensors) of one published linear layer."""
    present = [path for path in linear.modules if path in layout]
    adapters = [layout[path] for path in present]
    values = {
        path: np.asarray(jax.device_get(parameters[path]))
        for module in present
        for leaf in LEAVES
        if (path := leaf_path(module, leaf)) in parameters
    }

    def at(module, leaf, index):
        return values[leaf_path(module, leaf)][index]

    outputs = dict(zip(linear.modules, linear.shapes(config).outputs, strict=True))
    dora = adapters[0].dora
    if len(present) == len(linear.modules) and (len(present) == 1 or any(adapter.shares for adapter in adapters)):
        owner = min(linear.modules)

        def one(layer):
            found = {
                "lora_A.weight": at(owner, "lora_a", layer).T,
                "lora_B.weight": np.concatenate([at(path, "lora_b", layer).T for path in linear.modules]),
            }
            return found | (
                {
                    "lora_magnitude_vector": np.concatenate(
                        [at(path, "lora_magnitude", layer) for path in linear.modules]
                    )
                }
                if dora
                else {}
            )

        return adapters[0].rank, adapters[0].alpha, one
    if dora and len(present) < len(linear.modules):
        raise UserError(
            f"{linear.name}: DoRA on {', '.join(present)} alone has no PEFT form, which needs a magnitude "
            "for every row; merge it instead"
        )
    if len({adapter.scale for adapter in adapters}) > 1:
        raise UserError(
            f"{linear.name}: {', '.join(present)} have different scales (alpha over rank), which one PEFT "
            "adapter cannot have; merge it instead"
        )
    rank = sum(adapter.rank for adapter in adapters)
    alpha = adapters[0].scale * (rank**0.5 if adapters[0].rslora else rank)

    def blocks(layer):
        b = np.zeros((sum(outputs.values()), rank), values[leaf_path(present[0], "lora_b")].dtype)
        row, column = 0, 0
        for path in linear.modules:
            if path in present:
                b[row : row + outputs[path], column : column + layout[path].rank] = at(path, "lora_b", layer).T
                column += layout[path].rank
            row += outputs[path]
        found = {
            "lora_A.weight": np.concatenate([at(path, "lora_a", layer).T for path in present]),
            "lora_B.weight": b,
        }
        return found | (
            {"lora_magnitude_vector": np.concatenate([at(path, "lora_magnitude", layer) for path in present])}
            if dora
            else {}
        )

    return rank, alpha, blocks


def _settings(
    config,
    layout: Layout,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    chosen: Sequence[PublishedLinear],
    base: str | None,
    modern: bool,
) -> dict[str, Any]:
    """`adapter_config.json` of adapters that were trained here."""
    common = (
        max(set(ranks.values()), key=list(ranks.values()).count),
        max(set(alphas.values()), key=list(alphas.values()).count),
    )

    def whole(value):
        return int(value) if float(value).is_integer() else value

    def pattern(name):
        return (
            re.escape(module_name(name, config, modern=modern))
            .replace(r"\{layer\}", r"\d+")
            .replace(r"\{expert\}", r"\d+")
        )

    any_adapter = next(iter(layout.values()))
    kind, published = model_type(config)
    text_only = not hasattr(config, "vision")
    classes = dict(
        base_model_class=published.architecture, parent_library=f"transformers.models.{kind}.modeling_{kind}"
    )
    return {
        "alpha_pattern": {pattern(name): whole(value) for name, value in alphas.items() if value != common[1]},
        "auto_mapping": None if text_only else classes,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": whole(common[1]),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": common[0],
        "rank_pattern": {pattern(name): value for name, value in ranks.items() if value != common[0]},
        "revision": None,
        "target_modules": target_modules(chosen, config, modern=modern),
        "task_type": "CAUSAL_LM" if text_only else None,
        "use_dora": any_adapter.dora,
        "use_rslora": any_adapter.rslora,
    }


def target_modules(chosen: Sequence[PublishedLinear], config, *, modern: bool = True) -> list[str]:
    """The shortest ends of module names that select these published layers and no others."""
    others = {linear.name for linear in published_linears(config) if linear not in chosen}
    others |= set(names_that_cannot_adapt(config))
    found: set[str] = set()
    for linear in chosen:
        tail = re.split(r"\{(?:layer|expert)\}\.", linear.name)[-1].split(".")
        ends = [".".join(tail[start:]) for start in range(len(tail) - 1, -1, -1) if not tail[start].isdigit()]
        safe = [end for end in ends if not any(other == end or other.endswith("." + end) for other in others)]
        if safe and linear.name not in others:
            found.add(safe[0])
        else:
            found |= {module_name(name, config, modern=modern) for name, _ in linear.cells(config)}
    return sorted(found)


# --- merging ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Update:
    """Weight update of an adapter for one published matrix (out, in). a: (r, in). b: (out, r). magnitude: (out,) for
    DoRA.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """The matrix with the adapter folded in: float32 inside, rounded once to the matrix's dtype."""
        wide = weight.astype(np.float32) + np.float32(self.scale) * (
            self.b.astype(np.float32) @ self.a.astype(np.float32)
        )
        if self.magnitude is not None:
            wide *= (self.magnitude.astype(np.float32) / np.linalg.norm(wide, axis=1))[:, None]
        return wide.astype(weight.dtype)


def published_updates(adapter: PeftAdapter, config: Any) -> dict[str, Update]:
    """Update by published module name, layer by layer."""
    updates = {}
    for linear in published_linears(config):
        if not any(path in adapter.layout for path in linear.modules):
            continue
        _, _, tensors_of = _published(linear, adapter.layout, adapter.parameters, config)
        scale = next(adapter.layout[path].scale for path in linear.modules if path in adapter.layout)
        for name, layer in linear.cells(config):
            tensors = tensors_of(layer)
            updates[name] = Update(
                tensors["lora_A.weight"], tensors["lora_B.weight"], scale, tensors.get("lora_magnitude_vector")
            )
    return updates
