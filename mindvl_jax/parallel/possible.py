"""Whether a configuration can run on a mesh: refused before any work, with the reasons and the nearest mesh that can.

Sizes of the mesh are numbers here; no device is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.parallel.mesh import AXES, ROW_AXES, describe_sizes


def require_possible(config: Config, sizes: Mapping[str, int]) -> None:
    """Raise UserError with every reason why the configuration cannot run on a mesh of these sizes."""
    found = problems(config, sizes)
    if not found:
        return
    near = nearest(config, sizes)
    advice = "no mesh of as many devices can" if near is None else f"the nearest mesh that can: {describe_sizes(near)}"
    raise UserError("\n".join([f"mesh {describe_sizes(sizes)} cannot run this configuration", *found, advice]))


def problems(config: Config, sizes: Mapping[str, int]) -> list[str]:
    """Reasons, one a line, in words of the configuration."""
    context, expert = sizes["context"], sizes["expert"]
    text, vision = getattr(config.model, "text", None), getattr(config.model, "vision", None)
    found = []
    if context > 1:
        if text is None:
            found.append(
                f"mesh.context={context}: model family {config.model.family!r} has no rows of tokens to spread"
            )
        elif config.parallel.context_attention == "ulysses":
            found += _heads(text.num_heads, "model.text.num_heads", sizes)
            if vision is not None:
                found += _heads(vision.num_heads, "model.vision.num_heads", sizes)
        if config.parallel.context_attention == "ring" and getattr(
            getattr(text, "moe", None), "sequence_balance", False
        ):
            found.append(
                "parallel.context_attention=ring: the routers' sequence-wise balancing needs the places of a segment "
                "side by side; use ulysses or all_gather"
            )
    if expert > 1:
        experts = getattr(getattr(text, "moe", None), "experts", None)
        if experts is None:
            found.append(f"mesh.expert={expert}: the model has no routed experts to spread; use mesh.fsdp or mesh.data")
        elif experts % expert:
            found.append(f"mesh.expert={expert} does not divide model.text.moe.experts={experts}")
    if sizes["stage"] > 1:
        found += _stages(config, text, sizes)
    unit = _merged(vision)
    groups = math.prod(sizes[axis] for axis in ROW_AXES)
    for index, phase in enumerate(config.training.phases):
        where = f"training.phases[{index}]"
        if phase.rows % groups and (context > 1 or expert > 1):
            found.append(f"{where}.rows={phase.rows} cannot be spread over {groups} groups of devices")
        chunks = context * (2 if config.parallel.context_attention == "ring" and context > 1 else 1)
        if phase.sequence_length % chunks:
            found.append(
                f"mesh.context={context} does not divide {where}.sequence_length={phase.sequence_length}"
                + (f" into {chunks} even chunks" if chunks > context else "")
            )
        if phase.patches_per_row % (context * unit) and context > 1:
            found.append(
                f"mesh.context={context} does not divide the {phase.patches_per_row / unit:g} merged tokens of "
                f"{where}.patches_per_row={phase.patches_per_row}"
            )
    return found


def nearest(config: Config, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """The mesh of as many devices that can run the configuration and changes least: fewest axes, then by factors."""

    def change(other: dict[str, int]) -> tuple[int, float]:
        factors = [abs(math.log2(other[axis] / sizes[axis])) for axis in AXES]
        return sum(factor > 0 for factor in factors), sum(factors)

    rows = [phase.rows for phase in config.training.phases]

    def possible(other: dict[str, int]) -> bool:
        groups = math.prod(other[axis] for axis in ROW_AXES)
        return not any(count % groups for count in rows) and not problems(config, other)

    return min(filter(possible, _meshes(math.prod(sizes.values()), AXES)), key=change, default=None)


def _stages(config: Config, text, sizes: Mapping[str, int]) -> list[str]:
    stages = sizes["stage"]
    where = f"mesh.stage={stages}"
    if text is None:
        return [f"{where}: model family {config.model.family!r} has no decoder whose layers could be divided"]
    found = []
    if getattr(text, "moe", None) is not None:
        found.append(f"{where}: pipelines of routed decoders are not built; use mesh.expert or mesh.fsdp")
    if getattr(getattr(config.model, "vision", None), "deepstack_blocks", None):
        found.append(
            f"{where}: the tower of family {config.model.family!r} adds features behind several layers of the decoder, "
            "which a pipeline does not carry; use mesh.fsdp"
        )
    if config.training.optimizer.name == "adamw8bit":
        found.append(
            f"{where} with training.optimizer.name=adamw8bit, which updates a stack layer by layer: the layers of "
            "other stages would be gathered; use adamw, or mesh.fsdp in place of stages"
        )
    chunks = config.parallel.pipeline_chunks
    if text.num_layers % (stages * chunks):
        said = where if chunks == 1 else f"{where} x parallel.pipeline_chunks={chunks}"
        found.append(f"{said} does not divide model.text.num_layers={text.num_layers}")
    if sizes["context"] > 1 and config.parallel.context_attention == "ring":
        found.append(
            f"{where} with parallel.context_attention=ring: the permutes of rings wait for all stages, which run "
            "different branches; use ulysses or all_gather"
        )
    # XLA would move parts of a dim that does not divide by permutes, which wait for all devices, inside of branches.
    dims = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    uneven = [name for name in dims if getattr(text, name, 0) % sizes["tensor"]]
    found += [
        f"{where} with mesh.tensor={sizes['tensor']}, which does not divide model.text.{name}={getattr(text, name)}"
        for name in uneven
    ]
    groups = math.prod(sizes[axis] for axis in ROW_AXES)
    cut = config.parallel.micro_batches
    for index, phase in enumerate(config.training.phases):
        rows = phase.rows * stages // groups
        if phase.rows % groups:
            found.append(
                f"training.phases[{index}].rows={phase.rows} cannot be spread over {groups} devices (stages among them)"
            )
        elif chunks > 1 and (cut or rows) % stages:
            found.append(
                f"parallel.pipeline_schedule=interleaved takes micro-batches in groups of one a stage: {cut or rows} "
                f"of training.phases[{index}] are no multiple of {stages}"
            )
        elif cut and rows % cut:
            found.append(
                f"parallel.micro_batches={cut} does not divide the {rows} rows that a group "
                f"of stages takes of training.phases[{index}].rows={phase.rows}"
            )
    return found


def _heads(heads: int, name: str, sizes: Mapping[str, int]) -> list[str]:
    places = sizes["context"] * sizes["tensor"]
    if heads % places == 0:
        return []
    return [
        f"mesh.context x mesh.tensor = {places} does not divide {name}={heads}, which "
        "parallel.context_attention=ulysses needs; parallel.context_attention=all_gather works with any number of heads"
    ]


def _merged(vision) -> int:
    return 1 if vision is None else getattr(vision, "merge_unit", 1)


def _meshes(devices: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Every way to write `devices` as a product over the axes."""
    first, *rest = axes
    if not rest:
        yield {first: devices}
        return
    for size in range(1, devices + 1):
        if devices % size == 0:
            for others in _meshes(devices // size, tuple(rest)):
                yield {first: size, **others}
