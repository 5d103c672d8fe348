"""Search for changes that make a run fit.

Each is planned like the configuration itself; nothing here is a rule of thumb.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

from mindvl_jax.config.schema import Config
from mindvl_jax.core.errors import UserError
from mindvl_jax.planning.phase import PhasePlan, Planner


@dataclasses.dataclass(frozen=True)
class Change:
    """Overrides as `--set` takes them, and a description of their cost.

    Attributes:
      free: needs no more devices, data or communication, so it is tried first and combined with the others.
    """

    overrides: tuple[str, ...]
    cost: str
    free: bool = False

    def __add__(self, other: Change) -> Change:
        """Combine two changes; the second wins where both set a key."""
        keys = {override.split("=")[0] for override in other.overrides}
        kept = tuple(override for override in self.overrides if override.split("=")[0] not in keys)
        return Change(
            (*kept, *other.overrides), "; ".join(filter(None, (self.cost, other.cost))), self.free and other.free
        )


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change and the bytes of its largest phase; `why_not` if the configuration refuses it or it cannot fit."""

    change: Change
    bytes: int | None
    fits: bool
    why_not: str = ""


REMAT = {"none": ("dots", "attention", "full"), "dots": ("attention", "full"), "attention": ("full",), "full": ()}


def families(config: Config, phases: Sequence[int]) -> dict[str, list[Change]]:
    """Changes by kind, each kind ordered from mild to strong. `phases` are the ones that do not fit."""
    mesh = config.mesh.filled
    found = {
        "remat": [
            Change((f"model.remat={policy}",), "recomputes more in the backward pass", free=True)
            for policy in REMAT[config.model.remat]
        ],
        "micro-steps": list(_smaller_micro_steps(config, phases, mesh.data * mesh.expert * mesh.fsdp)),
        "loss chunk": [Change(("training.loss_chunk=256",), "smaller products in the loss", free=True)]
        if config.training.loss_chunk > 256
        else [],
        "data to fsdp": [
            Change(
                ("mesh.data=1", f"mesh.fsdp={mesh.data * mesh.fsdp}"),
                "same devices; parameters are gathered over all of them",
                free=True,
            )
        ]
        if mesh.data > 1
        else [],
        "tensor": [
            Change(
                (f"mesh.fsdp={mesh.fsdp // factor}", f"mesh.tensor={mesh.tensor * factor}"),
                "same devices; activations are exchanged in every layer",
            )
            for factor in (2, 4, 8)
            if mesh.fsdp % factor == 0 and _splits(config, mesh.tensor * factor)
        ],
        "shorter samples": list(_bounded_samples(config, phases)) if config.backend == "xla" else [],
        "shorter rows": list(_shorter_rows(config, phases)),
        "more devices": [_more_devices(config, factor) for factor in (2, 4, 8, 16)],
    }
    return {kind: changes for kind, changes in found.items() if changes}


def _smaller_micro_steps(config: Config, phases: Sequence[int], groups: int) -> Iterator[Change]:
    """More micro-steps of fewer rows, with the same rows in each step."""
    factor = 2
    while any(_divides(config.training.phases[index].rows, groups * factor) for index in phases):
        overrides = []
        for index in phases:
            phase = config.training.phases[index]
            own = factor
            while own > 1 and not _divides(phase.rows, groups * own):
                own //= 2
            if own > 1:
                overrides += [
                    f"training.phases[{index}].rows={phase.rows // own}",
                    f"training.phases[{index}].gradient_accumulation={phase.gradient_accumulation * own}",
                ]
        yield Change(tuple(overrides), "same rows a step, in more micro-steps", free=True)
        factor *= 2


def _bounded_samples(config: Config, phases: Sequence[int]) -> Iterator[Change]:
    """Bound the sample length: without a bound XLA's attention may hold the scores of a whole row."""
    for divisor in (2, 4, 8):
        overrides = []
        for index in phases:
            phase = config.training.phases[index]
            longest, image = (
                phase.max_sample_length or phase.sequence_length,
                phase.max_image_patches or phase.patches_per_row,
            )
            overrides += [
                f"training.phases[{index}].max_sample_length={longest // divisor}",
                *_bounded_images(config, index, image // divisor),
            ]
        yield Change(
            tuple(overrides),
            "longer samples are cut, larger images shrunk; attention needs scores of that length only",
        )


def _shorter_rows(config: Config, phases: Sequence[int]) -> Iterator[Change]:
    vision = getattr(config.model, "vision", None)
    unit = 1 if vision is None else vision.merge_unit
    for divisor in (2, 4, 8):
        overrides = []
        for index in phases:
            phase = config.training.phases[index]
            tokens, patches = phase.sequence_length // divisor, phase.patches_per_row // divisor // unit * unit
            overrides += [
                f"training.phases[{index}].sequence_length={tokens}",
                f"training.phases[{index}].patches_per_row={patches}",
            ]
            if phase.max_sample_length is not None and phase.max_sample_length > tokens:
                overrides.append(f"training.phases[{index}].max_sample_length={tokens}")
            overrides += _bounded_images(config, index, min(patches, phase.max_image_patches or patches))
        yield Change(tuple(overrides), "longer samples are cut, larger images shrunk; fewer tokens a step")


def _bounded_images(config: Config, index: int, patches: int) -> list[str]:
    """Overrides that limit images to `patches`."""
    phase, vision = config.training.phases[index], getattr(config.model, "vision", None)
    if vision is None:
        return []
    patches = patches // vision.merge_unit * vision.merge_unit
    pixels = patches * vision.patch_size**2
    overrides = [f"training.phases[{index}].max_image_patches={patches}"]
    if phase.max_pixels > pixels:
        overrides.append(f"training.phases[{index}].max_pixels={max(pixels, phase.min_pixels)}")
    return overrides


def _more_devices(config: Config, factor: int) -> Change:
    """Spread fsdp over more devices. Below one row a device, use fewer micro-steps; only then more rows."""
    mesh = config.mesh.filled
    groups = mesh.data * mesh.expert * mesh.fsdp * factor
    overrides, grown = [f"mesh.fsdp={mesh.fsdp * factor}"], []
    for index, phase in enumerate(config.training.phases):
        if _divides(phase.rows, groups):
            continue
        rows, whole = -(-phase.rows // groups) * groups, phase.rows * phase.gradient_accumulation
        overrides.append(f"training.phases[{index}].rows={rows}")
        if phase.gradient_accumulation > 1:
            overrides.append(f"training.phases[{index}].gradient_accumulation={max(1, whole // rows)}")
        if whole % rows:
            grown.append(f"{phase.name} {whole} to {rows * max(1, whole // rows)}")
    return Change(
        tuple(overrides),
        f"{groups * mesh.context * mesh.tensor} devices"
        + (f"; rows a step become others ({', '.join(grown)})" if grown else ""),
    )


def _divides(rows: int, groups: int) -> bool:
    return rows >= groups and rows % groups == 0


def _splits(config: Config, tensor: int) -> bool:
    """Whether the key/value heads and the vision heads divide by `tensor`.

    Dims that do not divide are replicated, which saves nothing.
    """
    text, vision = config.model.text, getattr(config.model, "vision", None)
    heads = [getattr(text, "num_kv_heads", text.num_heads), *([] if vision is None else [vision.num_heads])]
    return all(count % tensor == 0 for count in heads)


def search(
    config: Config,
    plans: Sequence[PhasePlan],
    usable: int,
    planner_of: Callable[[Sequence[str]], Planner],
    say: Callable[[str], None] = lambda _: None,
) -> list[Tried]:
    """Plan each kind of change from mild to strong until one fits.

    If none does alone, combine the free ones, then add each other kind.

    Args:
      planner_of: overrides -> a planner of the configuration with them; raises UserError if the configuration is
        invalid.
    """
    phases = [index for index, plan in enumerate(plans) if plan.total > usable]
    now = max(plan.total for plan in plans)
    tried: list[Tried] = []

    def first_that_fits(changes: Iterable[Change]) -> Tried | None:
        """The first change that fits, else the one that needs least, of those that can be planned."""
        own: list[Tried] = []
        for change in changes:
            say(" ".join(change.overrides))
            own.append(evaluate(change, planner_of, phases, usable))
            if own[-1].fits:
                break
        tried.extend(own)
        return min(
            (one for one in own if one.bytes is not None), key=lambda one: (not one.fits, one.bytes), default=None
        )

    best = [first_that_fits(changes) for changes in families(config, phases).values()]
    if any(one.fits for one in tried):
        return tried
    free = [one.change for one in best if one is not None and one.change.free and one.bytes < now]
    together = functools.reduce(Change.__add__, free, Change((), "", free=True))
    if len(free) > 1 and first_that_fits([together]).fits:
        return tried
    if free:
        # The other kinds start from the configuration with the free changes applied.
        for changes in families(planner_of(together.overrides).config, phases).values():
            if not changes[0].free:
                first_that_fits(together + change for change in changes)
    return tried


def evaluate(
    change: Change, planner_of: Callable[[Sequence[str]], Planner], phases: Sequence[int], usable: int
) -> Tried:
    """Plan a change: first the phases that did not fit, the others only if those do."""
    try:
        planner = planner_of(change.overrides)
        least = max(planner.least(index) for index in phases)
        if least > usable:
            return Tried(change, least, False, "its state alone is larger")
        worst = max(plan.total for plan in planner.plan(phases))
        if worst <= usable:
            worst = max(plan.total for plan in planner.plan())
    except UserError as error:
        return Tried(change, None, False, str(error).splitlines()[0])
    return Tried(change, worst, worst <= usable)


def confirm(
    tried: Sequence[Tried],
    planner_of: Callable[[Sequence[str]], Planner],
    usable: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[Tried]:
    """Compile each change that was found to fit, by a planner whose measure is the device's own compiler: its word
    counts. A change that asks for another number of devices than that compiler was asked for is told as not compiled.
    """
    confirmed = []
    for one in tried:
        if not one.fits:
            confirmed.append(one)
            continue
        say(" ".join(one.change.overrides))
        try:
            worst = max(plan.total for plan in planner_of(one.change.overrides).plan())
        except UserError as error:
            why = f"by our estimate it fits; not compiled: {str(error).splitlines()[0]}"
            confirmed.append(dataclasses.replace(one, fits=False, why_not=why))
            continue
        why = "" if worst <= usable else "by our estimate it fits, by its compiler it does not"
        confirmed.append(dataclasses.replace(one, bytes=worst, fits=worst <= usable, why_not=why))
    return confirmed
